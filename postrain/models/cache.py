"""Keys and values of earlier tokens, and which of them a token sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain.models.attention import Level
from postrain.models.config import Config


class Cache(NamedTuple):
  """Keys and values of the slots so far, layer by layer.

  All rows append at ``length``, and from the first slot again when all are
  full. Free slots have segment id 0; a cache without slots is only read. The
  ``prefix`` holds what ``P`` prompts left behind and is shared, not copied: row
  ``b`` continues its row ``b // (B // P)``.
  """

  keys: tuple[Float[Array, 'B K d T'], ...]
  values: tuple[Float[Array, 'B K T d'], ...]
  positions: Int[Array, 'B T']
  segment_ids: Int[Array, 'B T']
  length: Int[Array, '']
  prefix: Any = None

  def level(self, layer: int) -> Level:
    """What a layer reads."""
    return Level(self.keys[layer], self.values[layer])


def lineage(cache: Cache | None) -> list[Cache]:
  """The caches that a row sees, oldest first."""
  return [] if cache is None else [*lineage(cache.prefix), cache]


def advance(
  cache: Cache | None, positions: Int[Array, 'B N'],
  segment_ids: Int[Array, 'B N'],
) -> tuple[list[Cache], Cache | None, Cache | None]:  # fmt: skip
  """Put new tokens behind the last slot; their keys come layer by layer.

  Returns:
    The caches that are only read; the one that is written and read, None where
    there is none or nothing in it; the cache afterwards.

  Raises:
    ValueError: the tokens do not fit the cache.
  """
  if cache is None:
    return [], None, None
  num_new = segment_ids.shape[1]
  rows, slots = cache.segment_ids.shape
  if segment_ids.shape[0] != rows or num_new > (slots or num_new):
    raise ValueError(
      f'tokens of shape {segment_ids.shape} do not fit a cache of {rows} rows'
      f' and {slots} slots: make it with empty_cache(batch_size, length)'
    )
  *past, _ = lineage(cache)
  if not slots:
    return past, None, cache
  after = cache._replace(length=cache.length + num_new)

  def put(buffer: Array, value: Array) -> Array:
    value, at = value.astype(buffer.dtype), first_new(after, num_new)
    return jax.lax.dynamic_update_slice_in_dim(buffer, value, at, 1)

  after = after._replace(
    positions=put(cache.positions, positions),
    segment_ids=put(cache.segment_ids, segment_ids),
  )
  prefills = cache.prefix is None and num_new == slots
  return past, None if prefills else after, after


def first_new(cache: Cache, num_new: int) -> Int[Array, '']:
  """The slot of the first of the last ``num_new`` tokens."""
  return (cache.length - num_new) % cache.segment_ids.shape[1]


def visibility(
  positions: Int[Array, 'B N'],
  segment_ids: Int[Array, 'B N'],
  past: list[Cache],
  own: Cache | None,
  window: int | None,
) -> Bool[Array, 'B N S']:
  """Slots that come before or at a token and carry its segment id.

  In a window also: fewer than ``window`` positions back. Padding sees padding,
  itself at least, so that no softmax is over nothing.

  Args:
    positions: of the new tokens.
    segment_ids: likewise.
    past: caches that are read, oldest first.
    own: the cache that the tokens were put into; None where they see each other
      and the past alone.
    window: positions that a token sees, None for all.
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
    parts.append(near(ids, places))
  new = jnp.arange(num_new, dtype=jnp.int32)
  if own is None:
    slots, ids, places = new, segment_ids, positions
  else:
    # Counted from the first new token; slots of the past come after all new.
    num_slots = own.segment_ids.shape[1]
    slots = (
      jnp.arange(num_slots, dtype=jnp.int32) - first_new(own, num_new)
    ) % num_slots
    ids, places = own.segment_ids, own.positions
  causal = (slots[None, :] <= new[:, None]) | (slots >= num_new)[None, :]
  parts.append(causal[None] & near(ids, places))
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
  lead = batch_size, config.num_kv_heads

  def layers(*shape: int) -> tuple[Array, ...]:
    zeros = (jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))
    return tuple(zeros)

  return Cache(
    keys=layers(*lead, config.head_dim, length),
    values=layers(*lead, length, config.head_dim),
    positions=jnp.zeros((batch_size, length), jnp.int32),
    segment_ids=jnp.zeros((batch_size, length), jnp.int32),
    length=jnp.zeros((), jnp.int32),
    prefix=prefix,
  )
