"""Where the figures of a run go: files, trackers, the screen, a picture."""

from collections.abc import Iterator, Mapping, Sequence
import importlib
import json
import os
import types
from typing import Any, Protocol, runtime_checkable

from postrain.console import Console, StepTimer
from postrain.workdir import replacing

__all__ = [
  'Console',
  'JsonLines',
  'StepTimer',
  'TensorBoard',
  'WeightsAndBiases',
  'Writer',
  'curves',
  'read',
  'truncate',
]


@runtime_checkable
class Writer(Protocol):
  """Takes the figures of each step; `JsonLines` and `Console` do, too."""

  def write(self, step: int, figures: Mapping[str, Any]) -> None: ...

  def close(self) -> None: ...


class JsonLines:
  """Append rows to a file, one JSON object per line.

  Rows reach the file in one system call, so a process killed at any moment
  leaves at most one torn line, the last one. Floats are written as the shortest
  digits that read back to the same bits; NaN and inf in Python's spelling.
  Call `truncate` before appending to the file of an earlier process.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = path

  def write(self, step: int, figures: Mapping[str, Any]) -> None:
    """Append one row that starts with ``step``."""
    if 'step' in figures:
      raise ValueError(
        f"a figure is called 'step' ({figures['step']!r}); that name is taken"
        ' by the number of the step: rename the figure'
      )
    self.append({'step': step, **figures})

  def append(self, *rows: Mapping[str, Any]) -> None:
    """Append rows of any content, together or not at all."""
    lines = ''.join(json.dumps(row, default=_plain) + '\n' for row in rows)
    content = lines.encode('ascii')
    with open(self.path, 'ab', buffering=0) as file:
      written = file.write(content)
    if written != len(content):
      raise OSError(
        f'{self.path}: only {written} of {len(content)} bytes were written;'
        ' free some disk space and start the run again'
      )

  def close(self) -> None:
    """Nothing is held open between rows."""


def read(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """Yield the rows of a JSON-lines file; a torn last line is left out.

  Raises:
    ValueError: a line that is not the last is no JSON object.
  """
  for _, row in _complete_lines(path):
    yield row


def truncate(path: str | os.PathLike, step: int) -> None:
  """Keep the complete lines whose ``'step'`` is less than ``step``.

  The file is replaced in one move: a kill leaves the old or the new one. A
  file that does not exist stays so.

  Raises:
    ValueError: a line is no JSON object, or has no ``'step'``.
  """
  if not os.path.exists(path):
    return
  with replacing(path) as file:
    for line, row in _complete_lines(path):
      if 'step' not in row:
        raise ValueError(
          f"{path}: a line without 'step': {line[:60]!r}; only files of steps"
          ' can be cut at one'
        )
      if row['step'] < step:
        file.write(line)


class TensorBoard:
  """Write figures to event files (extra ``tensorboard``).

  Args:
    directory: where event files go.
    first_step: of this process; what an earlier one wrote from here on is
      hidden, so that a resumed run shows each step once.
  """

  def __init__(self, directory: str | os.PathLike, *, first_step: int = 0):
    tensorboard = _optional('tensorboardX', extra='tensorboard')
    self._writer = tensorboard.SummaryWriter(
      os.fspath(directory), purge_step=first_step
    )

  def write(self, step: int, figures: Mapping[str, Any]) -> None:
    """Add one scalar per figure."""
    for name, value in figures.items():
      self._writer.add_scalar(name, float(value), step)
    self._writer.flush()

  def close(self) -> None:
    """Close the event file."""
    self._writer.close()


class WeightsAndBiases:
  """Log figures to Weights & Biases (extra ``wandb``).

  Args:
    directory: where the local copy of the run goes.
    project: name of the project.
    name: name and id of the run; the same one continues it.
    config: what is shown as the run's configuration.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    project: str,
    name: str,
    config: Mapping[str, Any],
  ):
    wandb = _optional('wandb', extra='wandb')
    self._run = wandb.init(
      dir=os.fspath(directory),
      project=project,
      name=name,
      id=name,
      resume='allow',
      config=dict(config),
    )

  def write(self, step: int, figures: Mapping[str, Any]) -> None:
    """Log all figures under one step."""
    self._run.log(dict(figures), step=step)

  def close(self) -> None:
    """Finish the upload."""
    self._run.finish()


def curves(
  metrics_path: str | os.PathLike,
  out_png: str | os.PathLike,
  keys: Sequence[str],
) -> bool:
  """Draw figures over steps, one panel each (extra ``plots``).

  Args:
    metrics_path: the file of `JsonLines`.
    out_png: the picture, replaced in one move.
    keys: names of figures, from top to bottom; absent ones are left out.

  Returns:
    Whether a picture was drawn; where not, one printed line says why.
  """
  rows = list(read(metrics_path)) if os.path.exists(metrics_path) else []
  present = [key for key in keys if any(key in row for row in rows)]
  if not present:
    print(f'no curves: {metrics_path} has none of {", ".join(keys)}')
    return False
  try:
    matplotlib = _optional('matplotlib.figure', extra='plots')
  except ValueError as error:
    print(f'no curves: {error}')
    return False
  figure = matplotlib.Figure((6.4, 1.8 * len(present)), layout='constrained')
  panels = figure.subplots(len(present), sharex=True, squeeze=False)[:, 0]
  for key, panel in zip(present, panels, strict=True):
    points = [(row['step'], row[key]) for row in rows if key in row]
    marker = '.' if len(points) < 50 else None  # one point has no line
    panel.plot(*zip(*points, strict=True), linewidth=1, marker=marker)
    panel.set_ylabel(key)
    panel.grid(alpha=0.3)
  panels[-1].set_xlabel('step')
  with replacing(out_png) as file:
    figure.savefig(file, format='png', dpi=120)
  return True


def _complete_lines(
  path: str | os.PathLike,
) -> Iterator[tuple[bytes, dict[str, Any]]]:
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b'\n'):
        return  # torn: the process was killed while it wrote
      try:
        row = json.loads(line)
      except ValueError as error:
        raise ValueError(
          f'{path}, line {number}: no JSON: {line[:60]!r}; the file was'
          ' changed by something else: restore or remove that line'
        ) from error
      yield line, row


def _optional(module: str, *, extra: str) -> types.ModuleType:
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ValueError(
      f"{error.name} is not installed: pip install 'postrain[{extra}]'"
    ) from error


def _plain(value: Any) -> Any:
  """Turn an array, of NumPy or JAX, into numbers."""
  if hasattr(value, 'tolist'):
    return value.tolist()
  raise TypeError(f'{value!r} of type {type(value).__name__} is no figure')
