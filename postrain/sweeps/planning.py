"""From rows to places: each has an identity and a directory of its own."""

from collections.abc import Iterator, Mapping
import contextlib
import difflib
import fcntl
import functools
import json
import operator
import os
from typing import Any, NamedTuple

from postrain import actors, pipeline, workdir
from postrain.algorithm import make_algorithm
from postrain.binding import bind
from postrain.checks import check_assembly, check_lengths
from postrain.learned_rewards import unjudged
from postrain.recipe import make_recipe, plain
from postrain.sweeps.rows import Row, as_row

RECORD = 'sweep.json'  # of a sweep, in its workdir
ROW = 'row.json'  # of a row, in its directory


class Planned(NamedTuple):
  """A row whose config is whole and whose place is known."""

  identity: str
  row: Row
  config: dict[str, Any]
  directory: str

  @property
  def finished(self) -> bool:
    """Whether its run has ended."""
    return os.path.exists(os.path.join(self.directory, 'finished.json'))


def plan(
  base: Any, rows: Any, root: str, *, assemble: bool = True
) -> list[Planned]:
  """Where each row will stand; nothing is run or written.

  Args:
    base: the config that rows change.
    rows: yields `Row`, or dicts of overrides.
    root: the workdir of the sweep.
    assemble: hold also the parts of each run against each other; False where
      the files that configs name are on another machine.

  Raises:
    ValueError: no config, no rows, a row that is none, a field that the config
      has not, a value that does not fit, two rows of one name or of one config;
      names it.
  """
  base, checked = plain(base), set()
  if not isinstance(base, dict):
    raise ValueError(
      f'config={base!r:.80}: get_config() must return the config that rows'
      ' change'
    )
  found: dict[str, Planned] = {}
  names: set[str] = set()
  if rows is None or isinstance(rows, str | Mapping):
    raise ValueError(f'rows={rows!r:.80}: a sweep yields rows, or lists them')
  for number, given in enumerate(rows, start=1):
    row = as_row(given, f'row {number}')
    where = f'row {number} ({row.name})'
    config = resolved(base, row.overrides, where)
    try:
      _check(config, checked if assemble else None)
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from error
    identity = pipeline.config_identity(config)
    if identity in found:
      raise ValueError(
        f'{where} has the config of the row ({found[identity].row.name}):'
        ' leave one of them out'
      )
    if row.name in names:
      raise ValueError(
        f'{where}: another row has these labels: give each labels of its own'
      )
    names.add(row.name)
    directory = os.path.join(root, 'rows', identity[:16])
    found[identity] = Planned(identity, row, config, directory)
  if not found:
    raise ValueError('a sweep without a row: yield at least one')
  return [*found.values()]


def resolved(
  base: dict[str, Any], overrides: Mapping[str, Any], where: str
) -> dict[str, Any]:
  """The base with its overrides.

  Raises:
    ValueError: a path that the config has not.
  """
  config = json.loads(json.dumps(base))
  for path, value in overrides.items():
    *blocks, field = path.split('.')
    inner = config
    for depth, name in enumerate((*blocks, field)):
      if not isinstance(inner, dict) or name not in inner:
        _refuse(path, name, '.'.join(('config', *blocks[:depth])), inner, where)
      last, inner = inner, inner[name]
    last[field] = _jsonable(value, path, where)
  return plain(config)


def _refuse(path: str, name: str, above: str, block: Any, where: str) -> None:
  fields = [*block] if isinstance(block, dict) else []
  close = difflib.get_close_matches(name, fields, n=1)
  hint = f' (did you mean {close[0]!r}?)' if close else ''
  raise ValueError(
    f'{where}: {path!r}: {above} has no field {name!r}{hint}; it has:'
    f' {", ".join(fields) or "none"}; a block that must have others is replaced'
    ' whole, by a dict'
  )


def _jsonable(value: Any, path: str, where: str) -> Any:
  from ml_collections import ConfigDict

  try:
    # Placeholders of blocks in it become what they hold.
    value = plain(ConfigDict({'value': value}))['value']
    return json.loads(json.dumps(value))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{where}: {path}={value!r:.80} is nothing that a config can hold'
      f' ({error}): give numbers, texts, lists and dicts'
    ) from error


def _check(config: dict[str, Any], checked: set[str] | None) -> None:
  """Refuse what cannot run; configs that differ in their seed are alike."""
  recipe = make_recipe(config)
  alike = json.dumps({**config, 'seed': 0}, sort_keys=True)
  if checked is None or alike in checked:
    return
  environment = unjudged(recipe)
  actor = bind(actors, recipe.model)(environment)
  make_algorithm(
    recipe, actor.model, pad_id=environment.pad_id,
    stop_ids=environment.stop_ids, prompt_length=environment.prompt_length,
  )  # fmt: skip
  check_assembly(recipe, environment, actor.model)
  check_lengths(recipe, environment, actor.max_length)
  checked.add(alike)


@contextlib.contextmanager
def claim(rows: list[Planned], root: str) -> Iterator[None]:
  """Write down what will run, and keep others from the workdir meanwhile.

  sweep.json lists the rows, each directory has a row.json.

  Raises:
    ValueError: the workdir cannot be written, holds rows of another sweep, or
      another process runs it.
  """
  path = os.path.join(root, RECORD)
  known = {planned.identity for planned in rows}
  others = [
    entry['name'] for entry in recorded(root) if entry['identity'] not in known
  ]
  if others:
    raise ValueError(
      f'{root} holds {len(others)} rows that this sweep has not, such as'
      f' ({others[0]}): take another --workdir, or put them back (rows may be'
      ' added)'
    )
  with contextlib.ExitStack() as stack:
    try:
      os.makedirs(root, exist_ok=True)
      stack.enter_context(locked(root, wait=False))
      for planned in rows:
        os.makedirs(planned.directory, exist_ok=True)
        record = {**_entry(planned), 'config': planned.config}
        if not os.path.exists(os.path.join(planned.directory, ROW)):
          workdir.write_json(os.path.join(planned.directory, ROW), record)
      workdir.write_json(path, [_entry(planned) for planned in rows])
    except BlockingIOError as error:
      raise ValueError(
        f'another process runs the sweep in {root}: wait for its end, or take'
        ' another --workdir'
      ) from error
    except OSError as error:
      raise ValueError(
        f'workdir {root} cannot be written ({error.strerror}): take another'
        ' --workdir'
      ) from error
    yield


@contextlib.contextmanager
def locked(directory: str, *, wait: bool) -> Iterator[None]:
  """Hold the lock of a directory; it ends with the process that has it.

  Raises:
    BlockingIOError: another process has it, and ``wait`` is False.
  """
  with open(os.path.join(directory, '.lock'), 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    yield


def _entry(planned: Planned) -> dict[str, Any]:
  return {
    'identity': planned.identity,
    'name': planned.row.name,
    'labels': dict(planned.row.labels),
    'overrides': {
      path: functools.reduce(operator.getitem, path.split('.'), planned.config)
      for path in planned.row.overrides
    },
    'directory': os.path.join('rows', os.path.basename(planned.directory)),
  }


def recorded(root: str) -> list[dict[str, Any]]:
  """The rows of a workdir, in order; none where no sweep stands.

  Raises:
    ValueError: a file that no sweep wrote, or the workdir of a single run.
  """
  path = os.path.join(root, RECORD)
  if os.path.exists(os.path.join(root, 'config.json')):
    raise ValueError(
      f'{root} is the workdir of a single run: take another --workdir'
    )
  if not os.path.exists(path):
    return []
  with open(path) as f:
    try:
      entries = json.load(f)
      for entry in entries:
        _ = (
          entry['identity'],
          entry['name'],
          entry['labels'],
          entry['directory'],
        )
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f'{path} was not written by a sweep: take another --workdir'
      ) from error
  return entries
