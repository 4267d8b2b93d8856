"""Heads on a language model's hidden states."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from postrain.models.config import Config
from postrain.models.norms import widened
from postrain.types import Cache, Model, Params


def label_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Parameters of a head of labels -> their shapes, none for other heads."""
  if not config.num_labels:
    return {}
  bias = {'score_bias': (config.num_labels,)}
  return {
    'score': (config.model_dim, config.num_labels),
    **(bias if config.head == 'token_labels' else {}),
  }


def label_logits(
  params: Mapping[str, Any], hidden: Float[Array, '*n D']
) -> Float[Array, '*n K']:
  """Logits of the labels, in at least float32."""
  dtype = widened(hidden.dtype)
  score = jnp.asarray(params['score'], dtype)
  logits = jnp.einsum('...d,dk->...k', hidden.astype(dtype), score)
  if 'score_bias' not in params:
    return logits
  bias = jnp.asarray(params['score_bias'], dtype)
  return logits + jnp.broadcast_to(bias, logits.shape)


def with_labels(
  config: Config,
  params: Mapping[str, Any],
  *,
  num_labels: int = 1,
  head: str = 'sequence_labels',
) -> tuple[Config, Params]:
  """Put a head of labels, 0 at first, in place of the unembedding.

  Args:
    config: of a trained language model.
    params: its parameters.
    num_labels: 1 for a reward model, 2 (wrong, right) for a process reward
      model as transformers and TRL have it.
    head: see `Config`.

  Returns:
    The configuration and parameters of the model that scores.
  """
  config = dataclasses.replace(
    config, head=head, num_labels=num_labels, tie_embeddings=True
  )
  shapes = label_shapes(config)
  fresh = {k: jnp.zeros(v, config.param_dtype) for k, v in shapes.items()}
  kept = {k: v for k, v in params.items() if k != 'unembedding'}
  return config, {**kept, **fresh}


def scalar_head(model: Model) -> Model:
  """Replace the unembedding by one number a position: a value or a reward.

  unembed(hidden) = hidden · w, with w = 0 at first: values start at 0, and the
  loss of a pairwise reward model at log 2. The head computes in at least
  float32.

  Args:
    model: the backbone. Start from trained parameters with
      ``{**head_params, 'backbone': trained}``.

  Returns:
    Model with parameters ``{'backbone': ..., 'head': [D, 1]}``.
  """

  def init(key: Key[Array, '']) -> Params:
    backbone = model.init(key)
    blank = jnp.zeros((1, 1), jnp.int32)
    states, _ = jax.eval_shape(
      lambda params: model.hidden(
        params, blank, positions=blank, segment_ids=blank + 1
      ),
      backbone,
    )
    dtype = widened(states.dtype)
    return {
      'backbone': backbone,
      'head': jnp.zeros((states.shape[-1], 1), dtype),
    }

  def hidden(
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None]:
    return model.hidden(
      params['backbone'],
      tokens,
      positions=positions,
      segment_ids=segment_ids,
      cache=cache,
    )

  def of_backbone(fn: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The same function, of the parameters with a head."""
    if fn is None:
      return None
    return lambda params, *args, **how: fn(params['backbone'], *args, **how)

  def unembed(params: Params, hidden: Array) -> Array:
    head = params['head']
    dtype = widened(hidden.dtype)
    return jnp.einsum('...d,do->...o', hidden.astype(dtype), head.astype(dtype))

  def logical_axes() -> Params:
    return {
      'backbone': model.logical_axes() if model.logical_axes else None,
      'head': ('width', None),
    }

  return dataclasses.replace(
    model,
    init=init,
    hidden=hidden,
    unembed=unembed,
    logical_axes=logical_axes if model.logical_axes else None,
    internals=of_backbone(model.internals),
    normalize=of_backbone(model.normalize),
    packed=model.packed and scalar_head(model.packed),
    kernels=None,  # adapt the backbone before it gets a head
  )
