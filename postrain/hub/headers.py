"""What files say of themselves: strict JSON, and the headers of safetensors.

A safetensors file is the length of its header in eight bytes, the header as
JSON, and the tensors, one after the other without gaps.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

# Those that weights may have; the names are the format's.
WEIGHTS = {
  'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
}  # fmt: skip
BITS = {
  'BOOL': 8, 'F4': 4, 'F6_E2M3': 6, 'F6_E3M2': 6, 'U8': 8, 'I8': 8,
  'F8_E5M2': 8, 'F8_E4M3': 8, 'F8_E8M0': 8, 'F8_E4M3FNUZ': 8, 'F8_E5M2FNUZ': 8,
  'I16': 16, 'U16': 16, 'F16': 16, 'BF16': 16, 'I32': 32, 'U32': 32, 'F32': 32,
  'C64': 64, 'F64': 64, 'I64': 64, 'U64': 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # as the format has it
# What lies under a name of weights by mistake, by its first bytes.
IMPOSTORS = {
  b'PK\x03\x04': 'a pickle of PyTorch, which may run code when read: convert'
  ' it to safetensors',
  b'\x80': 'a pickle, which may run code when read: convert it to safetensors',
  b'version https://git-lfs': 'a pointer of Git LFS: fetch the file itself with'
  ' git lfs pull',
  b'<': 'a page of HTML: copy the file itself',
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor of a file.

  Attributes:
    path: of the file.
    dtype: name that the format gives it.
    shape: of the tensor.
    offset: of its first byte in the file.
  """

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  @property
  def row_bytes(self) -> int:
    """Bytes of one index of the leading axis."""
    return math.prod(self.shape[1:]) * BITS[self.dtype] // 8

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Map rows into memory: what is not looked at is not read."""
    return np.memmap(
      self.path,
      WEIGHTS[self.dtype],
      'r',
      self.offset + start * self.row_bytes,
      (stop - start, *self.shape[1:]),
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Read an object in which no key stands twice.

  Raises:
    ValueError: the file is missing or something else.
  """
  if not path.is_file():
    raise ValueError(f'{path} is missing: give a Hugging Face directory')
  with path.open('rb') as file:
    return parse_json(path, file.read(MAX_HEADER_BYTES))


def parse_json(path: pathlib.Path, text: bytes) -> dict[str, Any]:
  """Parse an object in which no key stands twice, of a file."""
  try:
    block = json.loads(text.decode('utf-8'), object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is no JSON: {error}; copy it again') from error
  if not isinstance(block, dict):
    raise ValueError(f'{path} holds no JSON object; copy it again')
  return block


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  block = dict(pairs)
  if len(block) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    raise ValueError(f'the key {", ".join(map(repr, twice))} stands twice')
  return block


def read_header(path: pathlib.Path) -> dict[str, Entry]:
  """Read where a safetensors file has its tensors.

  Raises:
    ValueError: the file is truncated or something else, or its header does not
      describe it.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    start = file.read(32)
    for magic, kind in IMPOSTORS.items():
      # A header of 128 bytes, say, begins as some pickles do.
      if start.startswith(magic) and start[8:9] != b'{':
        raise ValueError(f'{path} is {kind}')
    length = int.from_bytes(start[:8], 'little')
    if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
      raise ValueError(
        f'{path} is truncated or no safetensors file: its {size} bytes should'
        f' begin with a header of {length}; copy it again'
      )
    file.seek(8)
    header = parse_json(path, file.read(length))
  header.pop('__metadata__', None)
  entries = dict(_entries(path, header, 8 + length))
  _check_extents(path, header, size - 8 - length)
  return entries


def _entries(
  path: pathlib.Path, header: Mapping[str, Any], base: int
) -> Iterator[tuple[str, Entry]]:
  for name, said in header.items():
    match said:
      case {
        'dtype': str(dtype),
        'shape': [*shape],
        'data_offsets': [int(start), int(stop)],
      } if all(type(n) is int and n >= 0 for n in (*shape, start)):
        pass
      case _:
        raise ValueError(
          f'{path}: the header says {said!r} of {name}, not its dtype, shape'
          ' and data_offsets; copy it again'
        )
    if dtype not in BITS:
      raise ValueError(
        f'{path}: {name} has the unknown dtype {dtype}; weights may be'
        f' {", ".join(WEIGHTS)}'
      )
    if 8 * (stop - start) != math.prod(shape) * BITS[dtype]:
      raise ValueError(
        f'{path}: the header gives {stop - start} bytes to {name}, which is'
        f' {dtype} of shape {tuple(shape)}; copy it again'
      )
    yield name, Entry(path, dtype, tuple(shape), base + start)


def _check_extents(
  path: pathlib.Path, header: Mapping[str, Any], size: int
) -> None:
  end = 0
  extents = ((*said['data_offsets'], name) for name, said in header.items())
  for start, stop, name in sorted(extents):
    if start != end:
      raise ValueError(
        f'{path}: {name} begins at byte {start} of the tensors, where the one'
        f' before ends at {end}: the header lies; copy it again'
      )
    end = stop
  if end != size:
    raise ValueError(
      f'{path} is truncated or padded: its tensors take {end} bytes, it has'
      f' {size}; copy it again'
    )


def files_inside(
  root: pathlib.Path, names: list[str]
) -> dict[str, pathlib.Path]:
  """Paths of files, none of which a link leads elsewhere.

  The links of a download cache lead from its snapshots to its blobs.

  Raises:
    ValueError: a file lies outside of the directory.
  """
  home = os.path.realpath(root)
  allowed = [home]
  if os.path.basename(os.path.dirname(home)) == 'snapshots':
    allowed.append(os.path.join(home, '..', '..', 'blobs'))
  for name in names:
    real = pathlib.Path(os.path.realpath(root / name))
    if not any(real.is_relative_to(os.path.realpath(a)) for a in allowed):
      raise ValueError(
        f'{root / name} is a link to {real}, outside of the directory: put the'
        ' file itself there'
      )
  return {name: root / name for name in names}
