"""A run's directory: who it belongs to and what stands in it."""

from collections.abc import Iterator, Mapping
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from typing import IO, Any

FILES = ('metrics.jsonl', 'timings.jsonl', 'samples.jsonl')
# What changes no bit of what a run ends with: blocks of a config, and fields.
WORKERS = ('environment.num_workers', 'environment.timeout')
APART = ('logging', 'machine', *WORKERS)
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def claim(
  directory: str,
  config: Mapping[str, Any],
  overrides: Mapping[str, Any] | None = None,
) -> None:
  """Make the directory, or check that it belongs to this config.

  Raises:
    ValueError: it cannot be written, or another config stands in it; the
      message names the fields that differ.
  """
  path = os.path.join(directory, 'config.json')
  config = json.loads(json.dumps(config))
  if os.path.exists(path):
    differing = differences(_claimed(path), config)
    if differing:
      raise ValueError(
        f'{directory} holds a run of another config:'
        f' {"; ".join(differing)}. Take another --workdir, or the same config'
      )
  try:
    os.makedirs(directory, exist_ok=True)
    probe = os.path.join(directory, '.writable')
    with open(probe, 'w'):
      pass
    os.remove(probe)
  except OSError as error:
    raise ValueError(
      f'workdir {directory} cannot be written ({error.strerror}): take'
      ' another --workdir'
    ) from error
  if not os.path.exists(path):
    versions = {p: importlib.metadata.version(p) for p in PACKAGES}
    versions['python'] = sys.version.split()[0]
    record = {
      'config': config,
      'overrides': dict(overrides or {}),
      'versions': versions,
      'commit': commit(),
    }
    write_json(path, record)


def _claimed(path: str) -> Any:
  """The config that a directory belongs to."""
  with open(path) as f:
    try:
      return json.load(f)['config']
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f'{path} was not written by a run: take another --workdir'
      ) from error


def release(directory: str) -> None:
  """Undo `claim` where no step was completed: nothing half-made stays."""
  rows = os.path.join(directory, FILES[0])
  checkpoints = os.path.join(directory, 'checkpoints')
  begun = os.path.exists(rows) and os.path.getsize(rows) > 0
  if begun or (os.path.isdir(checkpoints) and os.listdir(checkpoints)):
    return
  for name in (*FILES, 'config.json'):
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(directory, name))
  for path in (checkpoints, directory):
    with contextlib.suppress(OSError):  # not there, or of others, too
      os.rmdir(path)


def die_at(point: str, step: int) -> None:
  """End this process if ``POSTRAIN_FAULT=point:step`` asks for it.

  By SIGKILL, so that nothing is flushed or tidied up: resuming is tested by
  runs that die inside a rollout or inside the write of a checkpoint.
  """
  if os.environ.get('POSTRAIN_FAULT') == f'{point}:{step}':
    os.kill(os.getpid(), signal.SIGKILL)


def differences(
  ours: Any, theirs: Any, where: str = '', ignored: tuple[str, ...] = APART
) -> list[str]:
  """List fields that differ between two nested dicts, ``ignored`` apart."""
  if not (isinstance(ours, dict) and isinstance(theirs, dict)):
    return (
      [] if ours == theirs else [f'{where}: {ours!r} there, {theirs!r} here']
    )
  return [
    line
    for key in sorted(ours.keys() | theirs.keys())
    if (path := f'{where}.{key}' if where else key) not in ignored
    for line in differences(
      ours.get(key, 'absent'), theirs.get(key, 'absent'), path, ignored
    )
  ]


def without(config: Any, where: str = '') -> Any:
  """The config without the fields that change no bit."""
  if not isinstance(config, dict):
    return config
  paths = {key: f'{where}.{key}' if where else key for key in config}
  return {
    key: without(value, paths[key])
    for key, value in config.items()
    if paths[key] not in APART
  }


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """A file that takes the place of another, whole or not at all."""
  part = f'{os.fspath(path)}.part'
  with open(part, 'wb') as f:
    yield f
    f.flush()
    os.fsync(f.fileno())
  os.replace(part, path)


def write_json(path: str, record: Any) -> None:
  """Write a JSON file whole or not at all."""
  with replacing(path) as f:
    f.write(f'{json.dumps(record, indent=2, default=str)}\n'.encode())


def commit() -> str | None:
  """The commit of the code that runs, None outside a repository."""
  try:
    return subprocess.run(
      ['git', 'rev-parse', 'HEAD'],
      cwd=os.path.dirname(__file__),
      capture_output=True,
      check=True,
      text=True,
      timeout=10,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None
