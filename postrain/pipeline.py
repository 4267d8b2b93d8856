"""Stages in a row, each in a directory that is named by what it is made of.

A stage is a run of the trainer, or a program that writes files. Its identity is
the digest of its config, of the files that the config names and of the
identities of the stages that it reads. So a stage whose inputs are as they were
is found finished, or is continued at its step; any change makes a new one.
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import importlib
import json
import os
import re
from typing import Any, NamedTuple

from postrain import workdir
from postrain.recipe import make_recipe, plain
from postrain.trainer import Trainer

ARTEFACT = 'artefact.json'
_REFERENCE = re.compile(r'\{stages\.([^}]*)\}')
_NAME = re.compile(r'[a-z][a-z0-9_]*')


class Stage(NamedTuple):
  """A step of a pipeline.

  Attributes:
    name: lower-case letters, digits and underscores.
    config: of a run; or ``program``, 'module:function', and its keyword
      arguments, called with the ``directory`` to write into beside them. Where
      ``{stages.NAME}`` stands in a text, the directory of that earlier stage
      takes its place: ``{stages.supervised}/export`` is its model.
  """

  name: str
  config: Mapping[str, Any]


class Planned(NamedTuple):
  """A stage whose place is known; ``config`` has real paths."""

  name: str
  config: dict[str, Any]
  directory: str
  identity: str


def plan(stages: Sequence[Stage], root: str) -> list[Planned]:
  """Where each stage will stand; nothing is run or written.

  Raises:
    ValueError: a name that is used twice or is none, a stage that reads one
      which does not stand before it, a config that is no recipe.
  """
  found: dict[str, Planned] = {}
  for number, (name, config) in enumerate(stages, start=1):
    if not _NAME.fullmatch(name) or name in found:
      raise ValueError(
        f'stage {number} is called {name!r}: give each a name of its own, of'
        ' lower-case letters, digits and underscores'
      )
    config = plain(config)
    _check_references(name, config, found)
    identities = {k: f'stage:{v.identity}' for k, v in found.items()}
    identity = config_identity(_replaced(config, identities))
    directories = {k: v.directory for k, v in found.items()}
    directory = os.path.join(root, f'{number:02}-{name}-{identity[:12]}')
    config = _replaced(config, directories)
    if 'program' not in config:
      try:
        make_recipe(config)
      except ValueError as error:
        raise ValueError(f'stage {name!r}: {error}') from error
    found[name] = Planned(name, config, directory, identity)
  if not found:
    raise ValueError('a pipeline without a stage: give it one')
  return [*found.values()]


def run(stages: Sequence[Stage], root: str) -> list[Planned]:
  """Run what is not finished yet, in order.

  The same call again goes on where it was stopped. What a finished stage has
  left is held against its digest before another reads it.

  Raises:
    ValueError: see `plan`; a stage that fails, and files of a finished one that
      are no longer as it left them.
  """
  planned = plan(stages, root)
  os.makedirs(root, exist_ok=True)
  for stage in planned:
    if os.path.exists(os.path.join(stage.directory, ARTEFACT)):
      _check_files(stage)
    else:
      print(f'stage {stage.name}: {stage.directory}', flush=True)
      try:
        _run(stage)
      except ValueError as error:
        raise ValueError(f'stage {stage.name!r}: {error}') from error
      workdir.die_at('before_artefact', planned.index(stage))
      record = {'identity': stage.identity, 'files': digests(stage.directory)}
      workdir.write_json(os.path.join(stage.directory, ARTEFACT), record)
  order = [stage._asdict() for stage in planned]
  workdir.write_json(os.path.join(root, 'pipeline.json'), order)
  return planned


def digests(directory: str) -> dict[str, str]:
  """SHA-256 of what a stage leaves for others, by path.

  All files but the state and the logs of a run.
  """
  found = {}
  for folder, folders, names in os.walk(directory):
    folders[:] = sorted(set(folders) - {'checkpoints'})
    for name in sorted({*names} - {ARTEFACT, *workdir.FILES}):
      path = os.path.join(folder, name)
      found[os.path.relpath(path, directory)] = _digest(path)
  return found


def _run(stage: Planned) -> None:
  if 'program' not in stage.config:
    Trainer(stage.config, stage.directory).run()
    return
  arguments = dict(stage.config)
  program = _program(arguments.pop('program'))
  os.makedirs(stage.directory, exist_ok=True)
  program(directory=stage.directory, **arguments)


def _program(path: str) -> Callable[..., Any]:
  module, _, name = path.partition(':')
  try:
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f"program={path!r} cannot be found ({error}): write 'module:function'"
    ) from error


def _check_files(stage: Planned) -> None:
  path = os.path.join(stage.directory, ARTEFACT)
  with open(path) as f:
    left = json.load(f)['files']
  found = digests(stage.directory)
  changed = sorted(k for k in left | found if left.get(k) != found.get(k))
  if changed:
    raise ValueError(
      f'stage {stage.name!r}: {changed[0]} in {stage.directory} is not as the'
      ' stage left it: remove the directory to run the stage again'
    )


def _check_references(
  name: str, config: Any, earlier: Mapping[str, Planned]
) -> None:
  def check(text: str) -> str:
    for reference in _REFERENCE.findall(text):
      if reference not in earlier:
        raise ValueError(
          f'stage {name!r} reads {reference!r}, which is no stage before it;'
          f' there are: {", ".join(earlier) or "none"}'
        )
    return text

  _mapped(config, check)


def _replaced(config: Any, names: Mapping[str, str]) -> Any:
  """The config with a name in the place of each reference."""
  return _mapped(
    config, lambda text: _REFERENCE.sub(lambda match: names[match[1]], text)
  )


def _mapped(tree: Any, fn: Callable[[str], str]) -> Any:
  """The tree with other texts."""
  if isinstance(tree, str):
    return fn(tree)
  if isinstance(tree, dict):
    return {key: _mapped(value, fn) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_mapped(value, fn) for value in tree]
  return tree


def config_identity(config: dict[str, Any]) -> str:
  """SHA-256 of what a config says, and of what is in the files it names."""

  def content(text: str) -> str:
    if os.path.basename(os.path.normpath(text)) in ('', '.', '..'):
      return text  # a full stop, say, is a text
    if os.path.isfile(text):
      return f'file:{_digest(text)}'
    if os.path.isdir(text):
      return f'directory:{digests(text)}'
    return text

  kept = workdir.without(config)
  text = json.dumps(_mapped(kept, content), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: str) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
