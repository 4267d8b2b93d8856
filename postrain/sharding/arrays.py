"""Where parameters, moments, rows and states lie, and how they get there."""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax.linen.spmd import logical_to_mesh_axes
import jax
from jax.experimental.multihost_utils import process_allgather
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from postrain.sharding.rules import BATCH_AXES, RULES, fitting
from postrain.types import Model, Params


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
  """The leading axis cut over the devices that share a batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_rows(mesh: Mesh, tree: Any) -> Any:
  """Place arrays with their leading axis cut.

  Raises:
    ValueError: an axis does not divide (it would be replicated silently).
  """
  parts = math.prod(mesh.shape[name] for name in BATCH_AXES)
  for leaf in jax.tree.leaves(tree):
    if leaf.shape[0] % parts:
      raise ValueError(
        f'{leaf.shape[0]} rows do not divide over {parts} devices'
        ' (mesh.data x mesh.fsdp x mesh.expert): change the mesh or the batch'
      )
  place = rows(mesh)
  if jax.process_count() == 1:
    return jax.device_put(tree, place)
  # Each process its own rows, of arrays that are the same on all.
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, place, x.__getitem__),
    on_host(tree),
  )


def on_host(tree: Any) -> Any:
  """Bring arrays to the host of every process, whole."""
  return jax.device_get(
    jax.tree.map(
      lambda x: process_allgather(x, tiled=True) if _scattered(x) else x, tree
    )
  )


def on_one_host(tree: Any) -> Any:
  """Arrays that the first process can write; every process must call this.

  What lies on several devices is brought to the host, a leaf at a time; on
  other processes None stands for it.
  """

  def brought(leaf: Any) -> Any:
    if len(leaf.sharding.device_set) > 1:
      leaf = on_host(leaf)
    return leaf if jax.process_index() == 0 else None

  return jax.tree.map(brought, tree)


def _scattered(array: Any) -> bool:
  """Whether other processes hold parts that this one lacks."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return False
  return not array.is_fully_replicated


def param_shardings(mesh: Mesh, model: Model) -> Params:
  """The sharding of each parameter, from its logical axes."""
  if model.logical_axes is None:
    return jax.tree.map(lambda _: replicated(mesh), model.shapes)

  return shardings(mesh, model.shapes, model.logical_axes())


def shardings(mesh: Mesh, shapes: Any, logical_axes: Any) -> Any:
  """The sharding of each array of a tree, from its logical axes."""

  def sharding(shape: Any, axes: tuple) -> NamedSharding:
    spec = logical_to_mesh_axes(axes, RULES)
    return NamedSharding(mesh, fitting(mesh, shape.shape, spec))

  return jax.tree.map(sharding, shapes, logical_axes)


@functools.cache
def block_writer(
  place: Any,
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
  """Make (shape, dtype) -> zeros, and a function that writes into them.

  It takes an array, a block and a start and writes where the array lies: each
  device its own block, which lies as the array does, at the same start within
  its shard. One program serves all devices.

  Raises:
    ValueError: the sharding is of no mesh.
  """
  if not isinstance(place, NamedSharding):
    raise ValueError(
      f'{place} is no sharding on a mesh: pass those of param_shardings, for'
      ' one device too'
    )

  def write(array: jax.Array, block: jax.Array, start: tuple) -> jax.Array:
    # As bits: XLA's CPU would take all of a bfloat16 array through float32.
    bits = jnp.dtype(f'uint{8 * array.dtype.itemsize}')
    array_bits, block_bits = (
      jax.lax.bitcast_convert_type(x, bits) for x in (array, block)
    )
    written = jax.lax.dynamic_update_slice(array_bits, block_bits, start)
    return jax.lax.bitcast_convert_type(written, array.dtype)

  mapped = jax.shard_map(
    write,
    mesh=place.mesh,
    in_specs=(place.spec, place.spec, PartitionSpec()),
    out_specs=place.spec,
    check_vma=False,
  )
  zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=place)
  return zeros, jax.jit(mapped, donate_argnums=0)


def opt_state_shardings(
  mesh: Mesh, optimizer: optax.GradientTransformation, params: Any,
  shardings: Any,
) -> Any:  # fmt: skip
  """Moments lie as their parameters do, all else is replicated."""
  state = jax.eval_shape(optimizer.init, params)
  placed = []

  def place() -> None:
    placed.append(
      optax.tree.map_params(
        optimizer,
        lambda leaf, sharding: leaf if _masked(leaf) else sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=_masked,
      )
    )

  jax.eval_shape(
    place
  )  # it makes a state of its own, whose zeros would compile
  return placed[0]


def _masked(leaf: Any) -> bool:
  """Whether a role stands there that another's optimiser does not see."""
  return isinstance(leaf, optax.MaskedNode)


def abstract(shapes: Any, shardings: Any) -> Any:
  """Shapes and dtypes with shardings: what a restore needs."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


HOST = 'pinned_host'  # memory of the host that a device reads by itself


def in_host(shapes: Any) -> Any:
  """The same shapes in the memory of the host, each part beside its device."""
  return jax.tree.map(
    lambda x: x.update(sharding=x.sharding.with_memory_kind(HOST)), shapes
  )


def fetched(tree: Any) -> Any:
  """Bring arrays of a traced function to the device."""
  return jax.tree.map(
    lambda x: jax.device_put(x, jax.memory.Space.Device), tree
  )


def device_bytes(tree: Any) -> int:
  """Bytes on one device of arrays, or of shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.sharding.memory_kind != HOST
  )


def of(tree: Any) -> Any:
  """The shardings of arrays, or of shapes that have them."""
  return jax.tree.map(lambda leaf: leaf.sharding, tree)
