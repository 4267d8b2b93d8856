"""What the advantages share."""

from typing import Literal

import jax
from jax import Array
import jax.numpy as jnp

from postrain.dtypes import Scalar, promoted

Singleton = Literal['zero', 'raw']


def shown(rewards: Array, where: Array | None) -> tuple[Array, Array]:
  """Rewards, 0 where there is no sample, and where there is one."""
  (rewards,) = promoted(rewards)
  where = jnp.ones_like(rewards, bool) if where is None else where
  return jnp.where(where, rewards, 0), where


def centered(
  rewards: Array, where: Array | None, weights: Array | None = None
) -> tuple[Array, Array, Array, Array]:
  """Rewards less the (weighted) mean of their row; rewards, where, count."""
  rewards, where = shown(rewards, where)
  counted = where.astype(rewards.dtype)
  count = jnp.sum(counted, axis=1, keepdims=True)
  if weights is not None:
    counted = jnp.where(where, weights.astype(rewards.dtype), 0)
  # Measured from one of them, equal rewards are exactly 0: no noise is left
  # for a small deviation to blow up.
  first = jnp.argmax(where, axis=1, keepdims=True)
  anchor = jnp.take_along_axis(rewards, first, axis=1)
  offset = jnp.where(where, rewards - anchor, 0)
  total = jnp.sum(counted, axis=1, keepdims=True)
  mean = jnp.sum(counted * offset, axis=1, keepdims=True)
  mean = mean / jnp.maximum(total, 1)
  return jnp.where(where, offset - mean, 0), rewards, where, count


def deviation(offsets: Array, rewards: Array, count: Array, ddof: int) -> Array:
  """Standard deviation of each row; 0 where it is rounding alone."""
  squares = jnp.sum(jnp.square(offsets), axis=1, keepdims=True)
  std = jnp.sqrt(squares / jnp.maximum(count - ddof, 1))
  largest = jnp.max(jnp.abs(rewards), axis=1, keepdims=True)
  noise = 8 * jnp.finfo(rewards.dtype).eps * largest
  return jnp.where(std > noise, std, 0)


def scaled(offsets: Array, std: Array, eps: Scalar) -> Array:
  """Offsets over std + ε, 0 where std is 0 (with ε = 0 too)."""
  spread = std > 0
  return jnp.where(spread, offsets / jnp.where(spread, std + eps, 1), 0)


def finished(
  advantages: Array,
  raw: Array,
  where: Array,
  count: Array,
  singleton: Singleton,
) -> Array:
  """Constants, with what the keyword says for groups of one."""
  if singleton == 'raw':
    advantages = jnp.where(where & (count == 1), raw, advantages)
  elif singleton != 'zero':
    raise ValueError(
      f"singleton is {singleton!r}; choose 'zero' or 'raw' for groups of one"
    )
  return jax.lax.stop_gradient(advantages)


def membership(groups: Array, dtype: jnp.dtype) -> Array:
  """Entry (i, j) is 1 where sequences i and j share a group, else 0."""
  return (groups[:, None] == groups[None, :]).astype(dtype)


def pooled(same: Array, x: Array) -> Array:
  """Sums over the group of each row; exact for counts on every device."""
  return jnp.matmul(same, x, precision='highest')
