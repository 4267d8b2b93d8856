"""The one place that knows meshes, rules and shardings."""

from collections.abc import Callable
import contextlib
import functools
import math
from typing import Any

from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
import jax
from jax.experimental.multihost_utils import process_allgather
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import optax

from postrain.types import Model, Params

# Logical axis -> mesh axes. Logical names are all that models know.
BATCH_AXES = ('data', 'fsdp', 'expert')
RULES = (
  ('batch', BATCH_AXES),
  # Rows of the experts' layer: each of its devices meets the tokens of all.
  ('tokens', ('data', 'fsdp')),
  ('time', None),
  ('layers', None),
  ('embed', None),
  ('width', 'fsdp'),
  ('vocab', 'tensor'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('mlp', 'tensor'),
  ('head_dim', None),
  ('experts', 'expert'),
)
AXES = ('data', 'fsdp', 'expert', 'tensor')


def make_mesh(
  *, data: int = 1, fsdp: int = 1, tensor: int = 1, expert: int = 1
) -> Mesh:
  """Make a mesh of the first data x fsdp x expert x tensor devices.

  Raises:
    ValueError: there are fewer devices.
  """
  sizes, devices = (data, fsdp, expert, tensor), jax.devices()
  needed = math.prod(sizes)
  if needed > len(devices):
    raise ValueError(
      f'mesh data={data} x fsdp={fsdp} x expert={expert} x tensor={tensor}'
      f' needs {needed} devices, there are {len(devices)}: change config.mesh'
      f' (on CPU, JAX_NUM_CPU_DEVICES={needed} makes virtual ones)'
    )
  if needed < len(devices) and jax.process_count() > 1:
    raise ValueError(
      f'mesh data={data} x fsdp={fsdp} x expert={expert} x tensor={tensor} has'
      f' {needed} of the {len(devices)} devices of {jax.process_count()}'
      ' processes: change config.mesh so that it has all, or start fewer'
    )
  return jax.make_mesh(
    sizes,
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:needed],
  )


@contextlib.contextmanager
def on(mesh: Mesh) -> Any:
  """Trace and run under a mesh, with the rules for logical axes."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


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
    return NamedSharding(mesh, _fitting(mesh, shape.shape, spec))

  return jax.tree.map(sharding, shapes, logical_axes)


def _fitting(mesh: Any, shape: tuple, spec: Any) -> PartitionSpec:
  """Replicate the axes that the mesh does not divide or does not cut.

  In the form that compiled functions return, or their second call would be
  one of other shardings and compile again.
  """

  def size(axes: Any) -> int:
    names = (axes,) if isinstance(axes, str) else (axes or ())
    return math.prod(mesh.shape[n] for n in names)

  fitting = [
    axes if size(axes) > 1 and width % size(axes) == 0 else None
    for width, axes in zip(shape, spec, strict=True)
  ]
  while fitting and fitting[-1] is None:
    fitting.pop()
  return PartitionSpec(*fitting)


def sum_over_shards(
  fn: Callable[..., jax.Array],
  arrays: tuple[jax.Array, ...],
  axes: tuple[tuple[str | None, ...], ...],
  *,
  check_vma: bool = True,
) -> jax.Array:
  """Run a function on the parts of its arrays that lie on each device.

  Its output lies as the first array does, and is summed over the devices that
  cut another array only, as a product is over the axes that it contracts.
  Outside of `on`, and on one device, this is a plain call.

  Args:
    fn: of the arrays; additive over the axes that its output lacks.
    arrays: what it takes.
    axes: logical axes of each array.
    check_vma: of `jax.shard_map`.

  Returns:
    The output, whole along the axes that were summed over.
  """
  mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
  if not rules or mesh.size == 1:
    return fn(*arrays)
  specs = tuple(
    _fitting(mesh, array.shape, logical_to_mesh_axes(names, rules))
    for array, names in zip(arrays, axes, strict=True)
  )
  cut = [set(jax.tree.leaves(tuple(spec))) for spec in specs]
  summed = tuple(sorted(set().union(*cut) - cut[0]))
  return jax.shard_map(
    lambda *parts: jax.lax.psum(fn(*parts), summed),
    in_specs=specs,
    out_specs=specs[0],
    check_vma=check_vma,
  )(*arrays)


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
