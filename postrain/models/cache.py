"""Keys and values of earlier tokens, and which of them a token sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain.models.attention import Level
from postrain.models.config import Config


class Cache(NamedTuple):
  """Keys and values of the slots so far; all rows append at ``length``.

  The ``prefix`` holds what ``P`` prompts left behind and is shared, not
  copied: row ``b`` continues its row ``b // (B // P)``.
  """

  keys: Float[Array, 'L B K T d']
  values: Float[Array, 'L B K T d']
  positions: Int[Array, 'B T']
  segment_ids: Int[Array, 'B T']
  length: Int[Array, '']
  prefix: Any = None


def lineage(cache: Cache | None) -> list[Cache]:
  """The caches that a row sees, oldest first."""
  return [] if cache is None else [*lineage(cache.prefix), cache]


def append(
  cache: Cache,
  new: Level,
  positions: Int[Array, 'B N'],
  segment_ids: Int[Array, 'B N'],
) -> Cache:
  """Write the keys and values of all layers at once, behind the last slot."""
  zero = jnp.zeros((), cache.length.dtype)
  at = (zero, zero, zero, cache.length, zero)

  def column(buffer: Array, value: Array) -> Array:
    value = value.astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, value, (zero, cache.length))

  return cache._replace(
    keys=jax.lax.dynamic_update_slice(cache.keys, new.keys, at),
    values=jax.lax.dynamic_update_slice(cache.values, new.values, at),
    positions=column(cache.positions, positions),
    segment_ids=column(cache.segment_ids, segment_ids),
    length=cache.length + segment_ids.shape[1],
  )


def is_prefill(cache: Cache | None, tokens: Array) -> bool:
  """Whether the tokens fill an empty cache, so that there is no past to read.

  Raises:
    ValueError: the tokens do not fit the cache.
  """
  if cache is None:
    return False
  rows, slots = cache.segment_ids.shape
  if tokens.shape[0] != rows or tokens.shape[1] > slots:
    raise ValueError(
      f'tokens of shape {tokens.shape} do not fit a cache of {rows} rows and'
      f' {slots} slots: make it with empty_cache(batch_size, length)'
    )
  return cache.prefix is None and tokens.shape[1] == slots


def visibility(
  positions: Int[Array, 'B N'],
  segment_ids: Int[Array, 'B N'],
  past: list[Cache],
  window: int | None,
) -> Bool[Array, 'B N S']:
  """Slots that come before or at a token and carry its segment id.

  In a window also: fewer than ``window`` positions back. Padding sees padding,
  itself at least, so that no softmax is over nothing.
  """
  batch, num_new = segment_ids.shape

  def near(ids: Array, places: Array) -> Array:
    seen = segment_ids[:, :, None] == ids[:, None]
    if window is not None:
      seen &= positions[:, :, None] - places[:, None] < window
    return seen

  parts = []
  for cache in past:
    ids, places = (
      jnp.repeat(x, batch // x.shape[0], axis=0)
      for x in (cache.segment_ids, cache.positions)
    )
    filled = jnp.arange(ids.shape[1], dtype=jnp.int32) < cache.length
    parts.append(near(ids, places) & filled[None, None])
  causal = jnp.tril(jnp.ones((1, num_new, num_new), bool))
  parts.append(causal & near(segment_ids, positions))
  return jnp.concatenate(parts, axis=-1)


def empty_cache(
  config: Config, batch_size: int, length: int, prefix: Cache | None
) -> Cache:
  """Free slots behind an optional prefix; see `postrain.types.EmptyCacheFn`.

  Raises:
    ValueError: the rows of the prefix do not divide ``batch_size``, or there
      are more slots than the model has positions.
  """
  slots = [level.segment_ids.shape for level in lineage(prefix)]
  if slots and batch_size % slots[-1][0]:
    raise ValueError(
      f'batch_size={batch_size} is no multiple of the {slots[-1][0]} rows of'
      ' the prefix: each prompt needs equally many rows'
    )
  total = length + sum(width for _, width in slots)
  if total > config.max_length:
    raise ValueError(
      f'{total} cache slots exceed max_length={config.max_length}: shorten'
      ' prompts or completions, or raise max_length'
    )
  shape = (
    config.num_layers, batch_size, config.num_kv_heads, length,
    config.head_dim,
  )  # fmt: skip
  return Cache(
    keys=jnp.zeros(shape, config.dtype),
    values=jnp.zeros(shape, config.dtype),
    positions=jnp.zeros((batch_size, length), jnp.int32),
    segment_ids=jnp.zeros((batch_size, length), jnp.int32),
    length=jnp.zeros((), jnp.int32),
    prefix=prefix,
  )
