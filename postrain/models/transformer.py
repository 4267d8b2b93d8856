"""A dense decoder (Llama, Qwen2, Qwen3) as a record of pure functions."""

from typing import Any, NamedTuple

from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from postrain.models.config import Config
from postrain.models.layers import (
  Block,
  Context,
  Level,
  rms_norm,
  rotation,
  used,
  widened,
)
from postrain.types import Model, Params

__all__ = ['Cache', 'Config', 'transformer']


class Cache(NamedTuple):
  """Keys and values of the slots so far; all rows append at ``length``.

  The ``prefix`` holds what ``P`` prompts left behind and is shared, not
  copied: row ``b`` continues its row ``b // (B // P)``.
  """

  keys: Float[Array, 'L B K T d']
  values: Float[Array, 'L B K T d']
  segment_ids: Int[Array, 'B T']
  length: Int[Array, '']
  prefix: Any = None


def lineage(cache: Cache | None) -> list[Cache]:
  """The caches that a row sees, oldest first."""
  return [] if cache is None else [*lineage(cache.prefix), cache]


def append(cache: Cache, new: Level, segment_ids: Int[Array, 'B N']) -> Cache:
  """Write the keys and values of all layers at once, behind the last slot."""
  zero = jnp.zeros((), cache.length.dtype)
  at = (zero, zero, zero, cache.length, zero)
  return cache._replace(
    keys=jax.lax.dynamic_update_slice(cache.keys, new.keys, at),
    values=jax.lax.dynamic_update_slice(cache.values, new.values, at),
    segment_ids=jax.lax.dynamic_update_slice(
      cache.segment_ids,
      segment_ids.astype(cache.segment_ids.dtype),
      (zero, cache.length),
    ),
    length=cache.length + segment_ids.shape[1],
  )


def visibility(
  segment_ids: Int[Array, 'B N'], past: list[Cache]
) -> Bool[Array, 'B N S']:
  """Slots that come before or at a token and carry its segment id.

  Padding sees padding, itself at least, so that no softmax is over nothing.
  """
  batch, num_new = segment_ids.shape
  parts = []
  for cache in past:
    ids = cache.segment_ids
    ids = jnp.repeat(ids, batch // ids.shape[0], axis=0)
    filled = jnp.arange(ids.shape[1], dtype=jnp.int32) < cache.length
    same = segment_ids[:, :, None] == ids[:, None]
    parts.append(same & filled[None, None])
  causal = jnp.tril(jnp.ones((1, num_new, num_new), bool))
  parts.append(causal & (segment_ids[:, :, None] == segment_ids[:, None]))
  return jnp.concatenate(parts, axis=-1)


class Transformer(nn.Module):
  """Embedding, scanned blocks, final norm."""

  config: Config

  def weight(
    self, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str, ...]
  ) -> Array:
    """A parameter in the compute dtype."""
    boxed = nn.with_logical_partitioning(init, axes)
    value = self.param(name, boxed, shape, self.config.param_dtype)
    return used(value, axes, self.config.dtype)

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B N'],
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None]:
    c = self.config
    table, axes = (c.vocab_size, c.model_dim), ('vocab', 'width')
    small = nn.initializers.normal(0.02)  # first logits are close to uniform
    embedding = self.weight('embedding', small, table, axes)
    if not c.tie_embeddings:
      self.weight('unembedding', small, table, axes)
    past = [] if is_prefill(cache, tokens) else lineage(cache)

    x = jnp.take(embedding, tokens, axis=0)
    # Padding may hold any id: what it embeds to must not reach a softmax.
    x = jnp.where((segment_ids != 0)[:, :, None], x, 0)
    x = with_logical_constraint(x, ('batch', 'time', 'embed'))
    cos, sin = rotation(
      positions, head_dim=c.head_dim, theta=c.rope_theta, dtype=c.dtype
    )
    context = Context(cos, sin, visibility(segment_ids, past))
    levels = tuple(Level(level.keys, level.values) for level in past)
    x, new = stack(c)(c, name='layers')(x, context, levels, cache is not None)
    ones = nn.initializers.ones
    scale = self.weight('final_norm', ones, table[1:], axes[1:])
    hidden = rms_norm(x, scale, eps=c.norm_eps)
    return hidden, None if cache is None else append(cache, new, segment_ids)


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


def stack(config: Config) -> Any:
  """The block, rematerialised by policy and scanned over layers."""
  block = Block
  if config.remat is not None:
    policy = getattr(jax.checkpoint_policies, config.remat)
    block = nn.remat(
      Block, policy=policy, prevent_cse=False, static_argnums=(4,)
    )
  in_axes: Any = (nn.broadcast, 0, nn.broadcast)
  return nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    length=config.num_layers,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )


def transformer(config: Config) -> Model:
  """Make a `postrain.types.Model` of a dense decoder.

  Args:
    config: its shape; see `Config`.

  Returns:
    Model whose parameters are plain nested dicts with the layers stacked on a
    leading axis. Token ids outside the vocabulary give NaN, never a neighbour.
  """
  module = Transformer(config)

  def boxed(key: Key[Array, '']) -> Params:
    blank = jnp.zeros((1, 1), jnp.int32)
    return module.init(key, blank, blank, blank, None)['params']

  def hidden(
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None]:
    out: Any = module.apply(
      {'params': params}, tokens, positions, segment_ids, cache
    )
    return out

  def unembed(params: Params, hidden: Array) -> Array:
    name = 'embedding' if config.tie_embeddings else 'unembedding'
    table = used(params[name], ('vocab', 'width'), config.dtype)
    return jnp.einsum(
      '...d,vd->...v', hidden, table,
      preferred_element_type=widened(config.dtype),
    )  # fmt: skip

  def logical_axes() -> Params:
    return jax.tree.map(
      lambda leaf: tuple(leaf.names),
      jax.eval_shape(boxed, jax.random.key(0)),
      is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )

  return Model(
    init=lambda key: nn.unbox(boxed(key)),
    hidden=hidden,
    unembed=unembed,
    empty_cache=lambda batch_size, length, prefix=None: empty_cache(
      config, batch_size, length, prefix
    ),
    vocab_size=config.vocab_size,
    logical_axes=logical_axes,
  )


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
    segment_ids=jnp.zeros((batch_size, length), jnp.int32),
    length=jnp.zeros((), jnp.int32),
    prefix=prefix,
  )
