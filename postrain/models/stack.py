"""The blocks of a decoder: in a scan, or one after the other."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from postrain.models.attention import View, rotation
from postrain.models.cache import Cache, first_new, visibility
from postrain.models.config import Config
from postrain.models.kernels import kernel
from postrain.models.layers import Block, Layer, used
from postrain.models.norms import widened
from postrain.models.rope import frequencies
from postrain.types import Params


def layer_views(
  config: Config, positions: Array, segment_ids: Array, past: list[Cache],
  own: Cache | None,
) -> tuple[list[View], list[int]]:  # fmt: skip
  """The views of the kinds of layers, and the number of each layer's kind."""
  kinds = config.layer_types or ('full',)
  several = sorted(set(kinds))
  dtype = widened(config.dtype)
  dim = config.rotary_dim or config.head_dim

  # Init, which runs on one token, needs none.
  whole = not past and own is None and positions.shape[1] > 1
  fused = whole and kernel(config) != 'xla'

  def view(kind: str) -> View:
    window = config.sliding_window if kind == 'sliding' else None
    visible = None
    if not fused:
      visible = visibility(positions, segment_ids, past, own, window)
    theta, scaling = config.rope_theta, config.rope_scaling
    if kind == 'sliding' and config.local_rope_theta is not None:
      theta, scaling = config.local_rope_theta, None
    turned = positions if kind != 'unrotated' else jnp.zeros_like(positions)
    speeds, scale = frequencies(dim, theta, scaling, config.max_length, dtype)
    if kind == 'unrotated':
      scale = 1.0
    at = None if own is None else first_new(own, positions.shape[1])
    turns = rotation(turned, speeds, scale)
    if not fused:
      return View(*turns, visible, at)
    number = jnp.int32(config.windows.index(window))
    return View(*turns, None, at, segment_ids, number)

  views = [view(kind) for kind in several]
  return views, [
    several.index(kinds[layer % len(kinds)])
    for layer in range(config.num_layers)
  ]


def blocks(
  config: Config, capture: tuple[str, ...], x: Array, views: list[View],
  layers: list[Layer], keep: bool,
) -> Any:  # fmt: skip
  """All blocks in a scan, rematerialised by policy; captures are stacked."""
  block: Any = Block
  if config.remat is not None:
    policy = getattr(jax.checkpoint_policies, config.remat)
    block = nn.remat(
      Block, policy=policy, prevent_cse=False, static_argnums=(4,)
    )
  if len(views) == 1:
    layers = [layer._replace(kind=None) for layer in layers]
  in_axes: Any = (nn.broadcast, 0, nn.broadcast)
  scanned = nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    length=config.num_layers,
    unroll=1 if config.scan_layers else config.num_layers,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  view = views[0] if len(views) == 1 else stacked(views)
  x, (new, captured) = scanned(config, capture, name='layers')(
    x, view, stacked(layers), keep
  )
  new = [
    jax.tree.map(lambda leaf, i=i: leaf[i], new)
    for i in range(config.num_layers)
  ]
  return x, (new, captured)


def served_blocks(
  config: Config, capture: tuple[str, ...], x: Array, views: list[View],
  layers: list[Layer], keep: bool,
) -> Any:  # fmt: skip
  """The same, one after the other: each reads arrays of its own."""
  levels, captures = [], []
  for i, layer in enumerate(layers):
    view, layer = views[layer.kind], layer._replace(kind=None)
    block = Block(config, capture, name=served_name(i))
    x, (new, captured) = block(x, view, layer, keep)
    levels.append(new)
    captures.append(captured)
  return x, (levels, stacked(captures))


def served_name(layer: int) -> str:
  """What the parameters of a layer are called outside the scan."""
  return f'layer_{layer}'


def stacked(trees: list[Any]) -> Any:
  """Equal trees as one, with a leading axis."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def serving(config: Config, params: Params, axes: Params) -> Params:
  """Parameters as a decode loop reads them, over and over.

  In the compute dtype, gathered along the residual stream, and each layer's by
  itself: a layer of a stack would be copied out of it for every token (half of
  a decode step on a CPU).
  """

  def is_axes(x: Any) -> bool:
    return isinstance(x, tuple)

  def read(axes: Params, params: Params) -> Params:
    return jax.tree.map(
      lambda names, leaf: used(leaf, names, config.dtype),
      axes, params, is_leaf=is_axes,
    )  # fmt: skip

  (layers, params), (inner, axes) = _parted(params), _parted(axes)
  inner = jax.tree.map(lambda names: names[1:], inner, is_leaf=is_axes)
  return read(axes, params) | {
    served_name(i): read(inner, jax.tree.map(lambda x, i=i: x[i], layers))
    for i in range(config.num_layers)
  }


def _parted(tree: Params) -> tuple[Any, Params]:
  """The layers, and the rest."""
  return tree['layers'], {k: v for k, v in tree.items() if k != 'layers'}
