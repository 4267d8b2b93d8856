"""Optimisers and schedules from config blocks."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from postrain.types import Scalar

__all__ = ['adam', 'adamw', 'sgd']


def adamw(
  *,
  learning_rate: Scalar,
  schedule: str = 'constant',
  warmup_steps: int = 0,
  total_steps: int | None = None,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """AdamW after clipping by the global norm; scales and biases never decay.

  Args:
    learning_rate: its peak.
    schedule: ``constant``, ``linear`` or ``cosine`` (both to 0).
    warmup_steps: of linear rise from 0.
    total_steps: end of the decay; needed unless constant.
    b1: decay of the first moment.
    b2: decay of the second.
    eps: added to the root of the second.
    weight_decay: decoupled.
    clip_norm: of the whole gradient, None for no clipping.

  References:
    Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization,
    arXiv:1711.05101.
  """
  rate = learning_rate_schedule(
    learning_rate, schedule, warmup_steps, total_steps
  )
  parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  parts += [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
  if weight_decay:
    parts += [optax.add_decayed_weights(weight_decay, mask=_decays)]
  return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def adam(
  *,
  learning_rate: Scalar,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """Adam without clipping or schedule.

  References:
    Kingma & Ba 2014, Adam, arXiv:1412.6980.
  """
  return optax.chain(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.scale_by_learning_rate(_constant(learning_rate)),
  )


def sgd(*, learning_rate: Scalar) -> optax.GradientTransformation:
  """Plain gradient descent."""
  return optax.scale_by_learning_rate(_constant(learning_rate))


def _constant(rate: Scalar) -> Any:
  return learning_rate_schedule(rate, 'constant', 0, None)


def learning_rate_schedule(
  peak: Scalar, schedule: str, warmup_steps: int, total_steps: int | None
) -> Scalar | Callable[[Any], Any]:
  """A rate, or a function of the number of updates so far."""
  if schedule not in ('constant', 'linear', 'cosine'):
    raise ValueError(
      f'schedule={schedule!r}: it is one of constant, linear, cosine'
    )
  if schedule != 'constant' and total_steps is None:
    raise ValueError(f'schedule={schedule!r} needs total_steps')
  if isinstance(peak, int | float) and peak < 0:
    raise ValueError(f'learning_rate={peak}: it must be at least 0')
  if schedule != 'constant' and (total_steps or 0) <= warmup_steps:
    raise ValueError(
      f'total_steps={total_steps} leaves no step behind warmup_steps='
      f'{warmup_steps}: raise it, or lower warmup_steps'
    )
  if schedule == 'constant' and not warmup_steps:
    return peak
  rise = optax.schedules.linear_schedule(0.0, peak, max(warmup_steps, 1))
  rest = (total_steps or 0) - warmup_steps
  after = {
    'constant': lambda: optax.schedules.constant_schedule(peak),
    'linear': lambda: optax.schedules.linear_schedule(peak, 0.0, rest),
    'cosine': lambda: optax.schedules.cosine_decay_schedule(peak, rest),
  }[schedule]()
  if not warmup_steps:
    return after
  return optax.schedules.join_schedules([rise, after], [warmup_steps])


def _decays(params: Any) -> Any:
  def matrix(path: Any, _: Any) -> bool:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return not name.endswith(('norm', 'scale', 'bias'))

  return jax.tree_util.tree_map_with_path(matrix, params)
