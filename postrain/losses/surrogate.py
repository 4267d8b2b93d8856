"""What the losses of the policy have in common; none of it a loss."""

import jax
from jax import Array
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Float

from postrain import importance
from postrain.dtypes import Scalar

__all__: list[str] = []

Losses = tuple[Float[Array, 'B T'], dict[str, Float[Array, 'B T']]]


def weighted_logprobs(weights: Array, logprobs: Array, mask: Array) -> Array:
  """−sg(w) log π on the mask: the policy gradient under a constant weight."""
  # With the sign under the select XLA fuses the gradient's select with it.
  weights = jnp.where(mask, -stop_gradient(weights), 0)
  return weights * jnp.where(mask, logprobs, 0)


def bounded(
  x: Array, advantages: Array, lowest: Scalar, highest: Scalar
) -> tuple[Array, dict[str, Array]]:
  """x, stopped at the bound that its advantage pushes it over, and where.

  Selected, not min and clip: these halve the gradient at a tie.
  """
  flags = {
    'clip_low': (advantages < 0) & (x < lowest),
    'clip_high': (advantages > 0) & (x > highest),
  }
  x = jnp.where(flags['clip_low'], lowest, x)
  return jnp.where(flags['clip_high'], highest, x), flags


def clipped(
  ratios: Array,
  advantages: Array,
  mask: Array,
  clip_low: Scalar,
  clip_high: Scalar,
  dual_clip: Scalar | None = None,
) -> Losses:
  """The pessimistic surrogate of any ratio, and where each bound acted."""
  advantages = jnp.where(mask, stop_gradient(advantages), 0)
  held, flags = bounded(ratios, advantages, 1 - clip_low, 1 + clip_high)
  if dual_clip is not None:
    flags['dual_clip'] = (advantages < 0) & (ratios > dual_clip)
    held = jnp.where(flags['dual_clip'], dual_clip, held)
  values = jnp.where(mask, -held * advantages, 0)
  return values, indicators(flags, mask, values)


def indicators(
  flags: dict[str, Array], mask: Array, like: Array
) -> dict[str, Array]:
  """Flags on the mask as numbers, for metrics."""
  return {k: (v & mask).astype(like.dtype) for k, v in flags.items()}


def drift(
  logprobs: Array, old_logprobs: Array, mask: Array, limit: Scalar | None
) -> dict[str, Array]:
  """Metrics of all policy losses: how far the policy is from the old one."""
  args = (stop_gradient(logprobs), old_logprobs, mask)
  d = importance.log_ratio(*args, max_log_ratio=limit)
  metrics = {
    'ratio': jnp.where(mask, jnp.exp(d), 0),
    'old_kl': jnp.expm1(d) - d,
    'limit_hits': importance.limit_hits(*args, max_log_ratio=limit),
  }
  return jax.tree.map(stop_gradient, metrics)
