"""The directory of an examination: whose it is, and the answers so far."""

from collections.abc import Mapping, Sequence
import importlib.metadata
import json
import os
import pathlib
from typing import Any

from postrain import workdir

ROWS, RESULTS, CONFIG = 'answers.jsonl', 'results.json', 'config.json'


class Journal:
  """Append rows as they come, and know those of an earlier call.

  Args:
    directory: made if absent.
    identity: what makes two examinations the same one.
    source: of the policy, in words.

  Raises:
    ValueError: the directory cannot be made, or belongs to another
      examination or to something else.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    identity: Mapping[str, Any],
    source: str,
  ):
    self._root = pathlib.Path(directory)
    identity = json.loads(json.dumps(identity))
    if (self._root / CONFIG).exists():
      _check_identity(self._root, identity)
    else:
      _claim(self._root, identity, source)
    self.rows = {row['index']: row for row in _stored(self._root / ROWS)}

  def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, and wait until they are on the disk."""
    # Escaped, for a text may hold what no UTF-8 has.
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    with open(self._root / ROWS, 'a', encoding='ascii') as file:
      file.write(lines)
      file.flush()
      os.fsync(file.fileno())
    self.rows |= {row['index']: row for row in rows}

  def finish(self, results: Mapping[str, Any]) -> None:
    """Write the results."""
    workdir.write_json(str(self._root / RESULTS), results)


def _check_identity(root: pathlib.Path, identity: Mapping[str, Any]) -> None:
  try:
    there = json.loads((root / CONFIG).read_text(encoding='utf-8'))['identity']
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'{root / CONFIG} is of no examination: take another output directory'
    ) from error
  if differing := workdir.differences(there, identity):
    raise ValueError(
      f'{root} holds an examination of another configuration:'
      f' {"; ".join(differing)}. Take another output directory, or the same'
      ' configuration'
    )


def _claim(
  root: pathlib.Path, identity: Mapping[str, Any], source: str
) -> None:
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'{root} cannot be made ({error.strerror}): take another output directory'
    ) from error
  if any(path.suffix != '.part' for path in root.iterdir()):
    raise ValueError(
      f'{root} is not empty and holds no examination: take another output'
      ' directory'
    )
  record = {
    'identity': identity,
    'policy': source,
    'commit': workdir.commit(),
    'versions': {p: importlib.metadata.version(p) for p in workdir.PACKAGES},
  }
  workdir.write_json(str(root / CONFIG), record)


def _stored(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of an earlier call; a line that a kill tore is cut off."""
  if not path.exists():
    return []
  content = path.read_bytes()
  whole = content[: content.rfind(b'\n') + 1]
  if len(whole) < len(content):
    os.truncate(path, len(whole))
  try:
    return [json.loads(line) for line in whole.splitlines()]
  except ValueError as error:
    raise ValueError(
      f'{path} has a line that is no JSON ({error}): it was changed by'
      ' something else; take another output directory'
    ) from error
