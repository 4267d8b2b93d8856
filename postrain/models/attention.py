"""Rotary positions, and attention over levels of shared keys."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain import sharding
from postrain.models.norms import widened


class View(NamedTuple):
  """Where a kind of layer looks, and how it turns queries and keys.

  ``visible[b, n, s]`` tells whether new token ``n`` sees slot ``s``, where the
  slots are those of the past, level by level, and then those of the cache that
  the new tokens are put into, ``at`` a slot, or, without one, these tokens. It
  is None where a kernel reads whole sequences, by ``segment_ids`` and the
  ``window``, a number of `Config.windows`. The views of several kinds of layers
  are stacked on a leading axis.
  """

  cos: Float[Array, '*K B N 1 half']
  sin: Float[Array, '*K B N 1 half']
  visible: Any  # Bool[Array, '*K B N S']
  at: Any = None  # Int[Array, '*K']
  segment_ids: Any = None  # Int[Array, '*K B N']
  window: Any = None  # Int[Array, '*K']


class Level(NamedTuple):
  """Keys and values of ``P`` sequences, each shared by ``B // P`` rows.

  Slots are the last axis of keys: products with few queries then read memory in
  order (x 5 on a CPU).
  """

  keys: Float[Array, 'P K d S']
  values: Float[Array, 'P K S d']


def new_level(
  keys: Float[Array, 'B N K d'], values: Float[Array, 'B N K d']
) -> Level:
  """A level of new tokens, each row its own."""
  return Level(jnp.moveaxis(keys, 1, 3), values.swapaxes(1, 2))


def written(level: Level, new: Level, at: Int[Array, '']) -> Level:
  """Put new tokens into a level, from slot ``at`` on."""
  put = jax.lax.dynamic_update_slice_in_dim
  return Level(
    put(level.keys, new.keys.astype(level.keys.dtype), at, 3),
    put(level.values, new.values.astype(level.values.dtype), at, 2),
  )


def rotation(
  positions: Int[Array, 'B N'],
  frequencies: Float[Array, ' half'],
  scale: float = 1.0,
) -> tuple[Float[Array, 'B N 1 half'], Float[Array, 'B N 1 half']]:
  """Cosine and sine of the angles position * frequency."""
  angles = jnp.einsum(
    'bn,i->bni', positions.astype(frequencies.dtype), frequencies
  )
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if scale != 1:
    cos, sin = cos * scale, sin * scale
  return cos[:, :, None], sin[:, :, None]


def rotate(
  x: Float[Array, 'B N H d'],
  cos: Float[Array, 'B N 1 half'],
  sin: Float[Array, 'B N 1 half'],
) -> Float[Array, 'B N H d']:
  """Turn the pairs (x[i], x[i + half]), the layout of Hugging Face weights.

  Dimensions from 2 * half on stay as they are.
  """
  turned = 2 * cos.shape[-1]
  first, second = jnp.split(x[..., :turned].astype(cos.dtype), 2, axis=-1)
  parts = [first * cos - second * sin, second * cos + first * sin]
  if turned < x.shape[-1]:
    parts.append(x[..., turned:].astype(cos.dtype))
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def wide_einsum(subscripts: str, left: Array, right: Array) -> Array:
  """Multiply arrays of one type and sum in at least float32."""
  wide = widened(left.dtype)
  if sharding.platform() == 'cpu':  # it lacks such products of some shapes
    left, right = left.astype(wide), right.astype(wide)
  return jnp.einsum(subscripts, left, right, preferred_element_type=wide)


def attention(
  query: Float[Array, 'B N H d'],
  levels: Sequence[Level],
  visible: Bool[Array, 'B N S'],
  *,
  scale: float,
  soft_cap: float | None = None,
) -> Float[Array, 'B N H d']:
  """Attend over levels of shared keys with one softmax over all their slots.

  softmax(cap(scale q·kᵀ)) v, with cap(x) = c tanh(x / c). A level of ``P``
  sequences is read where it lies: its keys are multiplied with the queries of
  all rows that share them, so that the cache of a prompt is never copied to
  its samples.
  """
  batch, num_new, num_heads, head_dim = query.shape
  wide = widened(query.dtype)

  # Products stand in the order that the backends' fast paths know.
  def scores(level: Level) -> Array:
    num_rows, num_kv, _, num_slots = level.keys.shape
    grouped = query.reshape(num_rows, -1, num_new, num_kv,
                            num_heads // num_kv, head_dim)  # fmt: skip
    grouped = jnp.moveaxis(grouped, 3, 1)
    lead = grouped.shape[2:-1]
    flat = grouped.reshape(num_rows, num_kv, -1, head_dim)
    out = wide_einsum('pkmd,pkds->pkms', flat, level.keys)
    out = out.reshape(num_rows, num_kv, *lead, num_slots)  # p k g n r s
    out = jnp.transpose(out, (0, 2, 1, 4, 3, 5))
    return out.reshape(batch, num_heads, num_new, num_slots)

  def mix(weights: Array, level: Level) -> Array:
    num_rows, num_kv, num_slots, _ = level.values.shape
    grouped = weights.reshape(num_rows, -1, num_kv, num_heads // num_kv,
                              num_new, num_slots)  # fmt: skip
    grouped = jnp.transpose(grouped, (0, 2, 1, 4, 3, 5))
    lead = grouped.shape[2:-1]
    flat = grouped.reshape(num_rows, num_kv, -1, num_slots)
    out = wide_einsum('pkms,pksd->pkmd', flat, level.values)
    out = out.reshape(num_rows, num_kv, *lead, head_dim)  # p k g n r d
    return jnp.moveaxis(out, 1, 3).reshape(query.shape)

  logits = jnp.concatenate([scores(level) for level in levels], axis=-1)
  logits *= scale
  if soft_cap is not None:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  logits = jnp.where(visible[:, None], logits, -jnp.inf)
  weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  start, out = 0, jnp.zeros(query.shape, wide)
  for level in levels:
    end = start + level.values.shape[2]
    out += mix(weights[..., start:end], level)
    start = end
  return out.astype(query.dtype)


def whole_attention(
  query: Float[Array, 'B N H d'],
  key: Float[Array, 'B N K d'],
  value: Float[Array, 'B N K d'],
  visible: Bool[Array, 'B N N'],
  *,
  scale: float,
  soft_cap: float | None = None,
) -> Float[Array, 'B N H d']:
  """Attend within whole sequences, in `jax.nn.dot_product_attention`."""
  # It knows no cap, and its softmax is in float32 whatever comes in.
  if soft_cap is not None or query.dtype == jnp.float64:
    level = new_level(key, value)
    return attention(query, (level,), visible, scale=scale, soft_cap=soft_cap)
  with jax.numpy_dtype_promotion('standard'):  # it mixes types inside
    return jax.nn.dot_product_attention(
      query, key, value, mask=visible[:, None], scale=scale
    )
