"""The one place that knows meshes, rules and shardings."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import contextvars
import functools
import math
from typing import Any

from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
import jax
from jax.experimental import mesh_utils
from jax.experimental.multihost_utils import process_allgather
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from postrain.types import Model, Params

# Logical axis -> mesh axes. Logical names are all that models know. What a mesh
# axis does follows: `data` repeats the model, `fsdp` cuts its parameters and
# moments along the residual stream, gathered where they are used, `tensor` cuts
# heads, inner widths and the vocabulary, `expert` the experts, and `context`
# the tokens of a row.
AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
BATCH_AXES = ('data', 'fsdp', 'expert')
RULES = (
  ('batch', BATCH_AXES),
  # Rows of the experts' layer: each of its devices meets the tokens of all.
  ('tokens', ('data', 'fsdp', 'context')),
  ('time', 'context'),
  ('keys', None),  # a token attends to those of all parts
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
# A sampler writes one token at a time, so that what cuts rows elsewhere cuts
# the model there.
SAMPLING = tuple(
  {
    **dict(RULES),
    'tokens': ('data', 'fsdp'),
    'time': None,
    **dict.fromkeys(
      ('vocab', 'heads', 'kv_heads', 'mlp'), ('tensor', 'context')
    ),
  }.items()
)


def make_mesh(
  *, slices: int = 1, devices: Sequence[Any] | None = None, **sizes: int
) -> Mesh:
  """Make a mesh of the first devices, as many as the product of its axes.

  Args:
    slices: of a TPU, or hosts of one network, over which ``data`` is cut
      first: only gradients pass between them.
    devices: those of a topology that is not here; None for the machine's.
    **sizes: devices along the axes of `AXES`, 1 where left out; -1 for one of
      them takes what the others leave.

  Raises:
    ValueError: there are fewer devices, or they do not divide.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _filled(sizes, len(devices))
  shape = tuple(sizes[name] for name in AXES)
  _check_all_take_part(shape, devices)
  if slices > 1:
    grid = _over_slices(shape, slices, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return jax.make_mesh(
    shape,
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[: math.prod(shape)],
  )


def _filled(sizes: Mapping[str, int], available: int) -> dict[str, int]:
  """The size of each axis, with the one that is -1 made to fit."""
  if unknown := sorted(set(sizes) - set(AXES)):
    raise ValueError(
      f'mesh has no axis {", ".join(unknown)}: it has {", ".join(AXES)}'
    )
  sizes = {name: sizes.get(name, 1) for name in AXES}
  written = ' x '.join(f'{name}={size}' for name, size in sizes.items())
  open_axes = [name for name, size in sizes.items() if size == -1]
  wrong = [name for name, size in sizes.items() if size < 1 and size != -1]
  if wrong or len(open_axes) > 1:
    raise ValueError(
      f'mesh {written}: sizes are 1 or more, and one may be -1, which takes the'
      ' devices that the others leave'
    )
  known = math.prod(size for size in sizes.values() if size > 0)
  if open_axes and available % known:
    raise ValueError(
      f'mesh {written}: {available} devices do not divide by {known}, the'
      ' product of the others: change them'
    )
  if open_axes:
    sizes[open_axes[0]] = available // known
  elif known > available:
    raise ValueError(
      f'mesh {written} needs {known} devices, there are {available}: change'
      f' config.mesh (on CPU, JAX_NUM_CPU_DEVICES={known} makes virtual ones)'
    )
  return sizes


def _check_all_take_part(shape: tuple[int, ...], devices: Any) -> None:
  """Each of several processes must have devices of the mesh."""
  needed, processes = math.prod(shape), len({d.process_index for d in devices})
  if needed < len(devices) and processes > 1:
    raise ValueError(
      f'mesh of {needed} of the {len(devices)} devices of {processes}'
      ' processes: change config.mesh so that it has all, or start fewer'
    )


def _over_slices(
  shape: tuple[int, ...], slices: int, devices: Sequence[Any]
) -> np.ndarray:
  """Devices with the first axis outermost over slices."""
  found = len({getattr(d, 'slice_index', 0) for d in devices})
  if found != slices or shape[0] % slices or math.prod(shape) != len(devices):
    raise ValueError(
      f'mesh.slices={slices} with mesh.data={shape[0]}: there are {found}'
      f' slices of together {len(devices)} devices; all of them are needed, and'
      ' data must be a multiple of their number'
    )
  inner = (shape[0] // slices, *shape[1:])
  return mesh_utils.create_hybrid_device_mesh(
    inner, (slices, *(1,) * len(shape[1:])), devices
  )


_platforms: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  'platform', default=None
)


@contextlib.contextmanager
def on(mesh: Mesh) -> Any:
  """Trace and run under a mesh, with the rules for logical axes."""
  token = _platforms.set(mesh.devices.flat[0].platform)
  try:
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
      yield
  finally:
    _platforms.reset(token)


def platform() -> str:
  """What programs are made for: the devices of the mesh, here or elsewhere."""
  return _platforms.get() or jax.default_backend()


def for_sampling(fn: Callable) -> Callable:
  """The function traced under the rules of a sampler, where there are rules."""

  @functools.wraps(fn)
  def ruled(*args: Any, **kwargs: Any) -> Any:
    rules = SAMPLING if nn.get_logical_axis_rules() else ()
    with nn.logical_axis_rules(rules):
      return fn(*args, **kwargs)

  return ruled


def constrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Ask that an array lie as its logical axes say, where there is a mesh.

  Mesh axes that do not divide it are left out, as are those that a function of
  one device's part has no say in.
  """
  mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
  if not rules or mesh.size == 1:
    return x
  names = {name: _free(mesh, where) for name, where in rules}
  spec = _fitting(mesh, x.shape, [names[a] if a else None for a in axes])
  return jax.lax.with_sharding_constraint(x, spec)


def _free(mesh: Any, axes: Any) -> tuple[str, ...]:
  """Mesh axes of a rule that the compiler places."""
  known = (axes,) if isinstance(axes, str) else axes or ()
  return tuple(a for a in known if a not in mesh.manual_axes)


def num_parts() -> int:
  """Devices that share the tokens of a row."""
  axis = dict(nn.get_logical_axis_rules()).get('time')
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def over_rows(
  fn: Callable[..., Any], whole: Any, rows: Sequence[jax.Array]
) -> Any:
  """Run a function of rows on each device's own; they are all it needs.

  The gradient of what all devices have is summed over them once, at the end,
  and not in each turn of a loop inside.

  Args:
    fn: (whole, *rows) -> a tree of rows.
    whole: what each device needs all of, along ``BATCH_AXES`` and 'context'.
    rows: arrays whose leading axis is cut over these.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = (*BATCH_AXES, 'context')
  if not nn.get_logical_axis_rules() or all(mesh.shape[a] == 1 for a in axes):
    return fn(whole, *rows)
  cut = PartitionSpec(axes)
  return jax.shard_map(
    fn,
    in_specs=(PartitionSpec(), *[cut] * len(rows)),
    out_specs=cut,
    axis_names=set(axes),
    check_vma=False,  # or it would sum where they are used, in the loop
  )(whole, *rows)


def by_parts(length: int) -> tuple[Callable, Callable]:
  """Make parts of rows rows of their own, and rows of them again.

  ``[B T ...]`` becomes ``[B C T/C ...]`` with the leading two as one, where C
  devices share a row: what works along time then stays on each device.

  Raises:
    ValueError: they do not divide it.
  """
  parts = num_parts()
  if length % parts:
    raise ValueError(
      f'{length} tokens of a row do not divide over mesh.context={parts}:'
      ' change the mesh, or the lengths of prompts and completions'
    )

  def cut(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[1] // parts, *x.shape[2:])

  def join(x: jax.Array) -> jax.Array:
    return x.reshape(-1, length, *x.shape[2:])

  return cut, join


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

  Shards stay where they are if it has all of them; what is the same on several
  devices or of other processes is brought to the host, a leaf at a time. On
  other processes None stands for each.
  """

  def brought(leaf: Any) -> Any:
    if leaf.is_fully_replicated or not leaf.is_fully_addressable:
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
