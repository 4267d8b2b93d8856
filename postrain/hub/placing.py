"""Stream the weights of a directory to where they belong, block by block.

A block is a run of rows of one tensor of a file. It is read, cast, checked,
copied to the devices that hold a part of it, and forgotten before the next one
is read: beside the parameters themselves no more than a few blocks exist.
"""

from collections.abc import Iterator, Mapping
import itertools
import math
from typing import Any

from flax import traverse_util
import jax
import numpy as np

from postrain import sharding
from postrain.hub.directory import TIED_HEAD, Directory
from postrain.hub.headers import Entry
from postrain.models import families
from postrain.models.families import Part
from postrain.types import Params

BLOCK_BYTES = 2**22  # of a file, for all windows together
Home = tuple[str, Entry, Part, tuple[slice, ...]]
Bounds = tuple[tuple[int, int], ...]


def read(directory: Directory, shardings: Any = None) -> Params:
  """Read the parameters into their shards.

  Args:
    directory: of `open`.
    shardings: on meshes, one for all parameters or a tree; this process reads
      what its devices hold. None gives NumPy arrays on the host.

  Raises:
    ValueError: a tensor holds NaN or infinity, or numbers that the parameters'
      dtype lacks; a tied head differs from the embedding.
  """
  shapes = families.param_shapes(directory.config)
  dtype = np.dtype(directory.config.param_dtype)
  homes: dict[Any, dict[tuple[int, ...], Home]] = {path: {} for path in shapes}
  for name, tensor in families.tensors(directory.config).items():
    for part, where in tensor.slices():
      home = name, directory.entries[name], part, where
      homes[part.path][part.index] = home
  if shardings is None:
    leaves = {k: _held(shapes[k], dtype, homes[k]) for k in shapes}
  else:
    tree = traverse_util.unflatten_dict(dict.fromkeys(shapes, 0))
    places = traverse_util.flatten_dict(jax.tree.broadcast(shardings, tree))
    leaves = {k: _placed(shapes[k], dtype, homes[k], places[k]) for k in shapes}
  _check_tied(directory, dtype)
  return traverse_util.unflatten_dict(leaves)


def _held(
  shape: tuple[int, ...], dtype: np.dtype, homes: Mapping[Any, Home]
) -> np.ndarray:
  """A parameter on the host."""
  value = np.empty(shape, dtype)
  whole = tuple((0, size) for size in shape)
  for start, blocks in _blocks(homes, [whole], dtype, BLOCK_BYTES):
    block = blocks[whole]
    ends = zip(start, block.shape, strict=True)
    value[tuple(slice(at, at + size) for at, size in ends)] = block
  return value


def _placed(
  shape: tuple[int, ...], dtype: np.dtype, homes: Mapping[Any, Home], place: Any
) -> jax.Array:
  """A parameter in its shards."""
  zeros, write = sharding.block_writer(place)
  windows = {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    for device, index in place.addressable_devices_indices_map(shape).items()
  }
  local = place.shard_shape(shape)
  value = zeros(shape, dtype)
  # The same on every process, for they run the same programs.
  num_windows = min(math.prod(shape) // math.prod(local), len(windows))
  for start, blocks in _blocks(
    homes, list(set(windows.values())), dtype, BLOCK_BYTES // num_windows
  ):
    sizes = next(iter(blocks.values())).shape
    block = jax.make_array_from_single_device_arrays(
      tuple(n // m * k for n, m, k in zip(shape, local, sizes, strict=True)),
      place,
      [jax.device_put(blocks[w], device) for device, w in windows.items()],
    )
    # Or blocks would queue up faster than they are copied.
    value = jax.block_until_ready(write(value, block, start))
  return value


def _blocks(
  homes: Mapping[Any, Home],
  windows: list[Bounds],
  dtype: np.dtype,
  max_bytes: int,
) -> Iterator[tuple[tuple[int, ...], dict[Bounds, np.ndarray]]]:
  """Where blocks begin in windows of equal size, and the block of each.

  The leading axis of a file is cut, which is the first of the permuted axes or
  that one and some more.
  """
  _, entry, part, _ = next(iter(homes.values()))
  sizes = [stop - start for start, stop in windows[0]]
  depth, axis = len(part.index), part.perm[0]
  rows = part.shape[0] // part.param_shape[axis]
  step = max(1, max_bytes // (rows * entry.row_bytes))
  for lead in itertools.product(*map(range, sizes[:depth])):
    for low in range(0, sizes[depth + axis], step):
      high = min(low + step, sizes[depth + axis])
      blocks = {}
      for window in windows:
        at = tuple(b[0] + i for b, i in zip(window, lead, strict=False))
        wanted = [slice(*bounds) for bounds in window[depth:]]
        first = wanted[axis].start
        wanted[axis] = slice(first + low, first + high)
        block = _block(homes[at], wanted, dtype)
        blocks[window] = block.reshape((1,) * depth + block.shape)
      start = [0] * len(part.param_shape)
      start[axis] = low
      yield (*lead, *start), blocks


def _block(home: Home, wanted: list[slice], dtype: np.dtype) -> np.ndarray:
  """A window of a part, read from its file, cast and checked."""
  name, entry, part, where = home
  sizes = [part.param_shape[axis] for axis in part.perm]
  first, *rest = (wanted[axis] for axis in part.perm)
  rows = part.shape[0] // sizes[0]
  base = where[0].start or 0
  read = entry.rows(
    base + first.start * rows, base + first.stop * rows, *where[1:]
  )
  permuted = read.reshape(-1, *sizes[1:])
  view = permuted[(slice(None), *rest)].transpose(np.argsort(part.perm))
  with np.errstate(all='ignore'):
    block = np.array(view, dtype, order='C')
    finite = np.isfinite(block).all()
  if not finite:
    raise ValueError(
      f'{name} holds NaN or infinity, or numbers beyond {dtype}: use weights'
      ' that are finite, or a dtype with a wider range'
    )
  return block


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
    one, other = (e.rows(low, high).astype(dtype) for e in (head, table))
    if not np.array_equal(one, other):
      raise ValueError(
        f'{head.path}: {TIED_HEAD} differs from the embedding although'
        ' tie_word_embeddings is true: set it to false in config.json'
      )
