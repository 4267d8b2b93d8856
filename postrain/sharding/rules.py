"""What each axis of a mesh cuts, and how traced functions ask for it."""

from collections.abc import Callable, Sequence
import contextlib
import contextvars
import functools
import math
from typing import Any

from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axes. Logical names are all that models know. What a mesh
# axis does follows: `data` repeats the model, `fsdp` cuts its parameters and
# moments along the residual stream, gathered where they are used, `tensor` cuts
# heads, inner widths and the vocabulary, `expert` the experts, and `context`
# the tokens of a row.
AXES: tuple[str, ...] = ('data', 'fsdp', 'expert', 'context', 'tensor')

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

# TPUs of an axis over which XLA gathers, or sums and cuts, in one step. Over
# more it may sum for all where a gather or a scatter sends half of that.
MAX_IN_ONE_STEP = 32

_meshes: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
  'mesh', default=None
)


@contextlib.contextmanager
def on(mesh: Mesh) -> Any:
  """Trace and run under a mesh, with the rules for logical axes."""
  token = _meshes.set(mesh)
  try:
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
      yield
  finally:
    _meshes.reset(token)


def platform() -> str:
  """What programs are made for: the devices of the mesh, here or elsewhere."""
  mesh = _meshes.get()
  return mesh.devices.flat[0].platform if mesh else jax.default_backend()


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
  if (spec := _spec(x, axes)) is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def halfway(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """A step between whole and cut as its logical axes say, in either direction.

  Over a wide ``fsdp`` axis of TPUs the array lies along one half of it alone;
  elsewhere nothing is asked.
  """
  spec, mesh = _spec(x, axes), _meshes.get()
  if (
    spec
    and mesh
    and platform() == 'tpu'
    and mesh.shape.get('fsdp', 1) > MAX_IN_ONE_STEP
    and not jax.sharding.get_abstract_mesh().manual_axes
  ):
    half = NamedSharding(_with_halves(mesh), spec)
    x = jax.lax.with_sharding_constraint(x, half)
  return x


def _spec(x: jax.Array, axes: tuple[str | None, ...]) -> PartitionSpec | None:
  """How an array is cut; None where nothing is."""
  mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
  if not rules or mesh.size == 1:
    return None
  names = {name: _free(mesh, where) for name, where in rules}
  return fitting(mesh, x.shape, [names[a] if a else None for a in axes])


def _with_halves(mesh: Mesh) -> Mesh:
  """The mesh with ``fsdp`` as two axes, of which the first has its name."""
  size, at = mesh.shape['fsdp'], mesh.axis_names.index('fsdp')
  outer = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
  shape = [*mesh.devices.shape[:at], outer, -1, *mesh.devices.shape[at + 1 :]]
  names = [*mesh.axis_names[: at + 1], 'inner', *mesh.axis_names[at + 1 :]]
  kinds = (jax.sharding.AxisType.Auto,) * len(names)
  return Mesh(mesh.devices.reshape(shape), names, axis_types=kinds)


def _free(mesh: Any, axes: Any) -> tuple[str, ...]:
  """Mesh axes of a rule that the compiler places."""
  known = (axes,) if isinstance(axes, str) else axes or ()
  return tuple(a for a in known if a not in mesh.manual_axes)


def fitting(mesh: Any, shape: tuple, spec: Any) -> PartitionSpec:
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


def num_parts() -> int:
  """Devices that share the tokens of a row."""
  axis = dict(nn.get_logical_axis_rules()).get('time')
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def over_rows(
  fn: Callable[..., Any], whole: Any, rows: Sequence[jax.Array], *,
  of_parts: bool = False,
) -> Any:  # fmt: skip
  """Run a function of rows on each device's own; they are all it needs.

  The gradient of what all devices have is summed over them once, at the end,
  and not in each turn of a loop inside.

  Args:
    fn: (whole, *rows) -> a tree of rows.
    whole: what each device needs all of, along the axes that cut rows.
    rows: arrays whose leading axis is cut over these; where it cannot be, this
      is a plain call.
    of_parts: whether `by_parts` has made them.
  """
  axes = (*BATCH_AXES, 'context') if of_parts else BATCH_AXES
  mesh = jax.sharding.get_abstract_mesh()
  number = math.prod(mesh.shape.get(a, 1) for a in axes)
  ruled = nn.get_logical_axis_rules()
  if not ruled or number == 1 or rows[0].shape[0] % number:
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
    fitting(mesh, array.shape, logical_to_mesh_axes(names, rules))
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
