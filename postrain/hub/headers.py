"""What files say of themselves: strict JSON, and the headers of safetensors."""

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
    view: of the library: what is sliced from it is read.
  """

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  view: Any

  @property
  def row_bytes(self) -> int:
    """Bytes of one index of the leading axis."""
    return math.prod(self.shape[1:]) * np.dtype(WEIGHTS[self.dtype]).itemsize

  def rows(self, start: int, stop: int, *columns: slice) -> np.ndarray:
    """Copy rows, or some columns of them, out of the file."""
    return self.view[(slice(start, stop), *columns)]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Read an object in which no key stands twice.

  Raises:
    ValueError: the file is missing or something else.
  """
  if not path.is_file():
    raise ValueError(f'{path} is missing: give a Hugging Face directory')
  try:
    text = path.read_bytes().decode('utf-8')
    block = json.loads(text, object_pairs_hook=_unique)
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
  from safetensors import SafetensorError, safe_open

  try:
    file = safe_open(path, 'numpy')
    views = {name: file.get_slice(name) for name in file.offset_keys()}
  except SafetensorError as error:
    raise ValueError(f'{path} is {_kind(path, error)}') from error
  return {
    name: Entry(path, view.get_dtype(), tuple(view.get_shape()), view)
    for name, view in views.items()
  }


def _kind(path: pathlib.Path, error: Exception) -> str:
  """What a file is that is no safetensors file."""
  with path.open('rb') as file:
    start = file.read(32)
  for magic, kind in IMPOSTORS.items():
    # A header of 128 bytes, say, begins as some pickles do.
    if start.startswith(magic) and start[8:9] != b'{':
      return kind
  return f'truncated or no safetensors file ({error}): copy it again'


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
