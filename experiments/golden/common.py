"""What the parts of the check share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from postrain import aggregation

Arrays = dict[str, Any]


def weights(hyper: Arrays, mask: jax.Array) -> jax.Array:
  """The peer's aggregation; TRL counts empty rows, verl does not."""
  mode = hyper.get('loss_agg_mode') or hyper.get('loss_type') or 'token-mean'
  every = {'count_empty': 'loss_agg_mode' not in hyper}
  rows = jnp.sum(jnp.any(mask, axis=1))
  if mode in ('token-mean', 'dapo', 'bnpo', 'cispo'):
    scale = jnp.sum(mask) / hyper.get('batch_num_tokens', jnp.sum(mask))
    return aggregation.token_mean(mask) * scale
  if mode in ('seq-mean-token-mean', 'grpo'):
    scale = rows / hyper.get('global_batch_size', rows)
    return aggregation.sequence_mean(mask, **every) * scale
  if mode in ('seq-mean-token-sum', 'luspo'):
    return aggregation.sequence_sum(mask, **every)
  if mode in ('seq-mean-token-sum-norm', 'dr_grpo'):
    length = hyper.get('loss_scale_factor') or hyper['max_completion_length']
    return aggregation.constant_length(mask, length=length, **every)
  if mode == 'token-sum':
    return mask.astype(float)
  raise ValueError(f'no aggregation for {mode!r}')


def differentiated(fn: Callable, inputs: Arrays, *names: str) -> Arrays:
  """Outputs of fn (a dict with ``loss``) and the gradients of the named."""

  def total(x):
    outputs = fn(inputs | x)
    return outputs['loss'], outputs

  by = {name: inputs[name] for name in names}
  gradients, outputs = jax.grad(total, has_aux=True)(by)
  return outputs | {f'grad_{name}': g for name, g in gradients.items()}


def tokens_of(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.broadcast_to(x[:, None], mask.shape) if x.ndim == 1 else x
