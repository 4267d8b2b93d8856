"""Stream the weights of a directory to where they belong, block by block.

A block is a run of rows of one tensor of a file. It is mapped, cast, checked,
copied to the devices that hold a part of it, and forgotten before the next one
is read: beside the parameters themselves no more than a few blocks exist.
"""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from postrain.hub.directory import TIED_HEAD, Directory
from postrain.hub.headers import Entry
from postrain.models import families
from postrain.models.families import Part
from postrain.types import Params

BLOCK_BYTES = 2**22  # of a file
Window = tuple[slice, ...]


@dataclasses.dataclass
class Shard:
  """A window of a parameter and its copies, on devices or on the host."""

  window: Window
  copies: dict[Any, Any]
  write: Callable[[Any, np.ndarray, tuple], Any]

  def holds(self, index: tuple[int, ...]) -> bool:
    """Whether it has something of a layer (and expert)."""
    pairs = zip(index, self.window, strict=False)
    return all(w.start <= i < w.stop for i, w in pairs)

  def put(self, start: tuple[int, ...], block: np.ndarray) -> None:
    """Write a block that begins somewhere in the parameter."""
    block = block.reshape((1,) * (len(start) - block.ndim) + block.shape)
    pairs = zip(start, self.window, strict=True)
    local = tuple(s - w.start for s, w in pairs)
    for device, value in self.copies.items():
      self.copies[device] = self.write(value, block, local)


def read(directory: Directory, shardings: Any = None) -> Params:
  """Read the parameters into their shards.

  Args:
    directory: of `open`.
    shardings: one for all parameters, or a tree; this process reads what its
      devices hold. None gives NumPy arrays on the host.

  Raises:
    ValueError: a tensor holds NaN or infinity, or numbers that the parameters'
      dtype lacks; a tied head differs from the embedding.
  """
  shapes = families.param_shapes(directory.config)
  dtype = np.dtype(directory.config.param_dtype)
  places = dict.fromkeys(shapes)
  if shardings is not None:
    tree = traverse_util.unflatten_dict(dict.fromkeys(shapes, 0))
    places = traverse_util.flatten_dict(jax.tree.broadcast(shardings, tree))
  shards = {
    path: _shards(shape, dtype, places[path]) for path, shape in shapes.items()
  }
  for name, tensor in families.tensors(directory.config).items():
    for part, where in tensor.slices():
      for shard in shards[part.path]:
        if shard.holds(part.index):
          for start, block in _blocks(
            directory.entries[name], part, where, shard.window, dtype
          ):
            _check_finite(name, block)
            shard.put((*part.index, *start), block)
  _check_tied(directory, dtype)
  return traverse_util.unflatten_dict(
    {
      path: _assembled(shape, places[path], shards[path])
      for path, shape in shapes.items()
    }
  )


def _shards(shape: tuple[int, ...], dtype: np.dtype, place: Any) -> list[Shard]:
  """The windows of a parameter that this process has to fill."""
  if place is None:
    window = tuple(slice(0, n) for n in shape)
    return [Shard(window, {None: np.empty(shape, dtype)}, _written)]
  devices: dict[tuple, list] = {}
  for device, index in place.addressable_devices_indices_map(shape).items():
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    devices.setdefault(bounds, []).append(device)
  return [
    Shard(
      tuple(slice(*b) for b in bounds),
      {
        d: jnp.zeros([stop - start for start, stop in bounds], dtype, device=d)
        for d in holders
      },
      _updated,
    )
    for bounds, holders in devices.items()
  ]


def _written(
  value: np.ndarray, block: np.ndarray, start: tuple[int, ...]
) -> np.ndarray:
  ends = zip(start, block.shape, strict=True)
  value[tuple(slice(at, at + size) for at, size in ends)] = block
  return value


def _updated(
  value: jax.Array, block: np.ndarray, start: tuple[int, ...]
) -> jax.Array:
  # Or blocks would queue up faster than they are copied.
  return jax.block_until_ready(_update(value, block, start))


# Donated: the block is written where the array lies.
_update = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


def _assembled(shape: tuple[int, ...], place: Any, shards: list[Shard]) -> Any:
  copies = {d: value for shard in shards for d, value in shard.copies.items()}
  if place is None:
    return copies[None]
  return jax.make_array_from_single_device_arrays(
    shape, place, [copies[d] for d in place.addressable_devices]
  )


def _blocks(
  entry: Entry, part: Part, where: Window, window: Window, dtype: np.dtype
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
  """What a window has of a part, and where in the part each block begins.

  The file's leading axis is cut, which is the first of the permuted axes or
  that one and some more.
  """
  window = window[len(part.index) :]
  sizes = [part.param_shape[axis] for axis in part.perm]
  wanted = [window[axis] for axis in part.perm]
  rows = part.shape[0] // sizes[0]
  first = where[0].start or 0
  step = max(1, BLOCK_BYTES // (rows * entry.row_bytes))
  for low in range(wanted[0].start, wanted[0].stop, step):
    high = min(low + step, wanted[0].stop)
    mapped = entry.rows(first + low * rows, first + high * rows)
    permuted = mapped[(slice(None), *where[1:])].reshape(high - low, *sizes[1:])
    view = permuted[(slice(None), *wanted[1:])].transpose(np.argsort(part.perm))
    start = [w.start for w in window]
    start[part.perm[0]] = low
    with np.errstate(over='ignore'):  # infinity is refused where it is put
      yield tuple(start), np.array(view, dtype, order='C')


def _check_finite(name: str, block: np.ndarray) -> None:
  if not np.isfinite(block).all():
    raise ValueError(
      f'{name} holds NaN or infinity, or numbers beyond {block.dtype}: use'
      ' weights that are finite, or a dtype with a wider range'
    )


def _check_tied(directory: Directory, dtype: np.dtype) -> None:
  config, entries = directory.config, directory.entries
  if not (config.tie_embeddings and TIED_HEAD in entries):
    return
  (table,) = (
    entries[name]
    for name, tensor in families.tensors(config).items()
    if tensor.parts[0].path == ('embedding',)
  )
  head = entries[TIED_HEAD]
  step = max(1, BLOCK_BYTES // max(table.row_bytes, head.row_bytes))
  for low in range(0, head.shape[0], step):
    high = min(low + step, head.shape[0])
    pair = [np.array(e.rows(low, high), dtype) for e in (head, table)]
    if not np.array_equal(*pair):
      raise ValueError(
        f'{head.path}: {TIED_HEAD} differs from the embedding although'
        ' tie_word_embeddings is true: set it to false in config.json'
      )
