"""A decoder, dense or of experts, as a record of pure functions."""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from postrain import sharding
from postrain.models.attention import wide_einsum
from postrain.models.cache import Cache, advance, empty_cache
from postrain.models.config import Config
from postrain.models.heads import label_logits, label_shapes
from postrain.models.kernels import kernel
from postrain.models.layers import Layer, normalized, used
from postrain.models.stack import (
  blocks,
  layer_views,
  served_blocks,
  serving,
)
from postrain.types import Model, Params, Path

__all__ = ['Cache', 'Config', 'transformer']


class Transformer(nn.Module):
  """Embedding, blocks, final norm."""

  config: Config
  capture: tuple[str, ...] = ()
  served: bool = False  # parameters as `serving` makes them

  def weight(
    self, name: str, init: Any, shape: tuple[int, ...],
    axes: tuple[str | None, ...],
  ) -> Array:  # fmt: skip
    """A parameter in the compute dtype."""
    boxed = nn.with_logical_partitioning(init, axes)
    value = self.param(name, boxed, shape, self.config.param_dtype)
    return used(value, axes, self.config.dtype)

  def embed(self, tokens: Array, positions: Array) -> Array:
    """Embeddings of the tokens and, where learned, of their positions."""
    c = self.config
    table, axes = (c.vocab_size, c.model_dim), ('vocab', 'width')
    small = nn.initializers.normal(0.02)  # first logits are close to uniform
    weight = self.weight('embedding', small, table, axes)
    # The gradient of all rows is summed where each device looks up its own.
    x = sharding.over_rows(
      lambda weight, tokens: jnp.take(weight, tokens, axis=0),
      weight, (tokens,),
    )  # fmt: skip
    if c.embedding_scale is not None:
      x *= jnp.asarray(c.embedding_scale, x.dtype)
    if c.position_embedding == 'learned':
      places = self.weight(
        'position_embedding', small, (c.max_length, c.model_dim),
        (None, 'width'),
      )  # fmt: skip
      x += jnp.take(places, positions, axis=0)
    if not c.tie_embeddings:
      self.weight('unembedding', small, table, axes)
    # Scores start at 0, and the loss of a pairwise reward model at log 2.
    for name, shape in label_shapes(c).items():
      places = ('width', None)[-len(shape) :]
      self.weight(name, nn.initializers.zeros, shape, places)
    return x

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B N'],
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None,
    experts: Int[Array, 'B N L K'] | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None, dict[str, Array]]:
    c = self.config
    past, own, after = advance(cache, positions, segment_ids)
    x = self.embed(tokens, positions)
    # Padding may hold any id: what it embeds to must not reach a softmax.
    x = jnp.where((segment_ids != 0)[:, :, None], x, 0)
    x = sharding.constrained(x, ('batch', 'time', 'embed'))
    views, kinds = layer_views(c, positions, segment_ids, past, own)
    layers = [
      Layer(
        tuple(cache.level(i) for cache in past),
        own and own.level(i),
        kinds[i],
        None if experts is None else experts[:, :, i],
      )
      for i in range(c.num_layers)
    ]
    run = served_blocks if self.served else blocks
    kept = after if after and after.segment_ids.shape[1] else None
    x, (levels, captured) = run(
      c, self.capture, x, views, layers, kept is not None
    )

    def weight(name: str, init: Any) -> Array:
      return self.weight(name, init, (c.model_dim,), ('width',))

    hidden = normalized(c, weight, 'final_norm', x)
    if 'experts' in captured:
      captured['experts'] = jnp.moveaxis(captured['experts'], 0, 2)
    if kept is not None:
      keys, values = zip(*levels, strict=True)
      after = kept._replace(keys=keys, values=values)
    return hidden, after, captured


def transformer(config: Config) -> Model:
  """Make a `postrain.types.Model` of a decoder.

  Args:
    config: its shape; see `Config`.

  Returns:
    Model whose parameters are plain nested dicts with the layers stacked on a
    leading axis. Token ids outside the vocabulary give NaN, never a neighbour.

  Raises:
    ValueError: see `postrain.models.kernels.kernel`.
  """
  packed = None
  if kernel(config) == 'cudnn':
    packed = transformer(dataclasses.replace(config, attention='xla'))

  def boxed(key: Key[Array, '']) -> Params:
    blank = jnp.zeros((1, 1), jnp.int32)
    module = Transformer(config)
    return module.init(key, blank, blank, blank, None)['params']

  def internals(
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None = None,
    capture: tuple[str, ...] = (),
    experts: Int[Array, 'B N L K'] | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None, dict[str, Array]]:
    check_captures(config, capture, experts)
    out: Any = Transformer(config, capture, 'layers' not in params).apply(
      {'params': params}, tokens, positions, segment_ids, cache, experts
    )
    return out

  def hidden(
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None]:
    return internals(
      params, tokens, positions=positions, segment_ids=segment_ids, cache=cache
    )[:2]

  def normalize(params: Params, residual: Array) -> Array:
    def weight(name: str, init: Any) -> Array:
      del init
      return used(params[name], ('width',), config.dtype)

    return normalized(config, weight, 'final_norm', residual)

  def unembed(params: Params, hidden: Array) -> Array:
    if config.num_labels:
      return label_logits(params, hidden)
    name = 'embedding' if config.tie_embeddings else 'unembedding'
    table = used(params[name], ('vocab', 'width'), config.dtype)
    logits = wide_einsum('...d,vd->...v', hidden, table)
    cap = config.logit_soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  @functools.cache
  def logical_axes() -> Params:
    return jax.tree.map(
      lambda leaf: tuple(leaf.names),
      jax.eval_shape(lambda: boxed(jax.random.key(0))),
      is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
    )

  def kernels() -> dict[Path, tuple[int, int]]:
    # What reads the residual stream, and what adds to it.
    found = {}
    flat: dict[Path, Any] = traverse_util.flatten_dict(logical_axes())
    for path, axes in flat.items():
      matrix = axes[0] == 'layers' and len(axes) > 2 and 'experts' not in axes
      if matrix and 'width' in (axes[1], axes[-1]):
        found[path] = (1, 1 if axes[1] == 'width' else len(axes) - 2)
    return found

  return Model(
    init=lambda key: nn.unbox(boxed(key)),
    hidden=hidden,
    unembed=unembed,
    empty_cache=lambda batch_size, length, prefix=None: empty_cache(
      config, batch_size, length, prefix
    ),
    vocab_size=config.vocab_size,
    logical_axes=logical_axes,
    internals=internals,
    serving=lambda params: serving(config, params, logical_axes()),
    reads_prefix=True,
    normalize=normalize,
    num_experts=config.num_experts,
    packed=packed,
    kernels=kernels,
  )


STATES = ('residual', 'attention', 'mlp', 'attention_input', 'mlp_input')
ROUTING = ('experts', 'router_logits')


def check_captures(
  config: Config, capture: tuple[str, ...], experts: Array | None
) -> None:
  """Refuse names that this decoder does not know.

  Raises:
    ValueError: such a name, or one of experts where there are none.
  """
  names = STATES + (ROUTING if config.num_experts else ())
  if unknown := sorted(set(capture) - set(names)):
    raise ValueError(
      f'capture has {", ".join(unknown)}: this model has {", ".join(names)}'
    )
  if experts is not None and not config.num_experts:
    raise ValueError('experts given to a dense model: leave them out')
