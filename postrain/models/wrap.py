"""Strangers' networks behind the record `postrain.types.Model`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from postrain.types import InternalsFn, Model, Params


class Buffer(NamedTuple):
  """The tokens so far: a cache for models that have none."""

  tokens: Int[Array, 'B T']
  positions: Int[Array, 'B T']
  segment_ids: Int[Array, 'B T']
  length: Int[Array, '']


def plain(
  init: Callable[[Key[Array, '']], Params],
  hidden: Callable[[Params, Array, Array, Array], Array],
  unembed: Callable[[Params, Array], Array],
  vocab_size: int,
  *,
  logical_axes: Callable[[], Params] | None = None,
  captured: Callable[..., tuple[Array, dict[str, Array]]] | None = None,
  normalize: Callable[[Params, Array], Array] | None = None,
) -> Model:
  """Make a model of plain functions that know no cache.

  The cache is the token buffer, and every decoding step runs all of it again:
  exact for any causal model, and as slow as it sounds.

  Args:
    init: key -> params, a pytree.
    hidden: (params, tokens [B N], positions [B N], segment_ids [B N]) ->
      [B N D]. A token may look only at slots before or at it that carry its
      segment id; 0 is padding.
    unembed: (params, hidden [... D]) -> logits [... V].
    vocab_size: V.
    logical_axes: see `postrain.types.Model`.
    captured: like hidden, and after its inputs the names to capture; returns
      them as `postrain.types.InternalsFn` says, [L B N ...], with the states.
    normalize: see `postrain.types.Model`.
  """

  def cached_hidden(
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Buffer | None = None,
  ) -> tuple[Float[Array, 'B N D'], Buffer | None]:
    if cache is None:
      return hidden(params, tokens, positions, segment_ids), None
    cache = _append(cache, tokens, positions, segment_ids)
    states = hidden(params, *cache[:3])
    num_new = tokens.shape[1]
    return jax.lax.dynamic_slice_in_dim(
      states, cache.length - num_new, num_new, axis=1
    ), cache

  return Model(
    init=init,
    hidden=cached_hidden,
    unembed=unembed,
    empty_cache=_empty_buffer,
    vocab_size=vocab_size,
    logical_axes=logical_axes,
    internals=None if captured is None else _internals(captured),
    normalize=normalize,
  )


def _internals(
  captured: Callable[..., tuple[Array, dict[str, Array]]],
) -> InternalsFn:
  def internals(
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Buffer | None = None,
    capture: tuple[str, ...] = (),
    experts: Array | None = None,
  ) -> tuple[Float[Array, 'B N D'], Buffer | None, dict[str, Array]]:
    if experts is not None:
      raise ValueError(
        'experts given to a model of plain functions: it has none'
      )
    inputs = (tokens, positions, segment_ids)
    if cache is None:
      states, found = captured(params, *inputs, capture)
      return states, None, found
    cache = _append(cache, *inputs)
    states, found = captured(params, *cache[:3], capture)
    first, num_new = cache.length - tokens.shape[1], tokens.shape[1]

    def new(x: Array, axis: int) -> Array:
      return jax.lax.dynamic_slice_in_dim(x, first, num_new, axis=axis)

    return new(states, 1), cache, {k: new(v, 2) for k, v in found.items()}

  return internals


def _empty_buffer(
  batch_size: int, length: int, prefix: Buffer | None = None
) -> Buffer:
  blank = jnp.zeros((batch_size, length), jnp.int32)
  if prefix is None:
    return Buffer(blank, blank, blank, jnp.zeros((), jnp.int32))
  num_rows, num_slots = prefix.tokens.shape
  if batch_size % num_rows:
    raise ValueError(
      f'batch_size={batch_size} is no multiple of the {num_rows} rows of the'
      ' prefix: each prompt needs equally many rows'
    )
  filled = (
    jnp.concatenate(
      [jnp.repeat(x, batch_size // num_rows, axis=0), blank], axis=1
    )
    for x in prefix[:3]
  )
  return Buffer(*filled, length=jnp.full((), num_slots, jnp.int32))


def _append(cache: Buffer, *columns: Int[Array, 'B N']) -> Buffer:
  """Write tokens, positions and segment ids behind the last slot."""
  rows, slots = cache.tokens.shape
  if columns[0].shape[0] != rows or columns[0].shape[1] > slots:
    raise ValueError(
      f'tokens of shape {columns[0].shape} do not fit a cache of {rows} rows'
      f' and {slots} slots: make it with empty_cache(batch_size, length)'
    )
  written = (
    jax.lax.dynamic_update_slice_in_dim(
      old, new.astype(old.dtype), cache.length, axis=1
    )
    for old, new in zip(cache[:3], columns, strict=True)
  )
  return Buffer(*written, length=cache.length + columns[0].shape[1])


def from_nnx(make: Callable[[Any], Any], vocab_size: int) -> Model:
  """Make a model of a Flax NNX module.

  Args:
    make: nnx.Rngs -> module. ``module(tokens, positions, segment_ids)`` gives
      hidden states under the terms of `plain`, ``module.unembed(hidden)``
      logits.
    vocab_size: size of the logits.

  Raises:
    ValueError: the module holds state other than parameters.
  """
  from flax import nnx  # breaks on some pairs of flax and jax

  def parts(module: Any) -> tuple[Any, Any]:
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    if jax.tree.leaves(rest):
      raise ValueError(
        'the module holds state besides nnx.Param:'
        f' {sorted(nnx.to_pure_dict(rest))}; make it without dropout, batch'
        ' statistics and counters'
      )
    return graph, params

  graph, template = parts(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def module(params: Params) -> Any:
    state = jax.tree.map(lambda x: x, template)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)

  return plain(
    lambda key: nnx.to_pure_dict(parts(make(nnx.Rngs(key)))[1]),
    lambda params, *inputs: module(params)(*inputs),
    lambda params, hidden: module(params).unembed(hidden),
    vocab_size,
  )
