"""What people see of a sweep that runs: a line when a row starts and ends."""

from collections.abc import Callable, Sequence
import json
import os
import sys
import time
from typing import Any

from postrain.sweeps.planning import Planned
from postrain.sweeps.worker import LOG
from postrain.workdir import FILES

EVERY = 30.0  # seconds between lines on the rows that run, without a terminal


class Board:
  """Plain lines; on a terminal the last one says what is running, and moves.

  Args:
    rows: of the sweep.
    say: takes lines.
  """

  def __init__(self, rows: Sequence[Planned], say: Callable[[str], Any]):
    self._say, self._total = say, len(rows)
    self._finished = sum(planned.finished for planned in rows)
    self._failed = 0
    self._running: dict[str, tuple[Planned, float]] = {}
    self._live = say is print and sys.stdout.isatty()
    self._last = time.monotonic()
    if self._finished:
      self._line('found', f'{self._finished} rows finished')

  def started(self, planned: Planned) -> None:
    """A process runs it."""
    self._running[planned.identity] = planned, time.monotonic()
    self._line('start', planned.row.name)

  def finished(self, planned: Planned) -> None:
    """It has ended well."""
    seconds = self._stopped(planned)
    self._finished += 1
    self._line('done', f'{planned.row.name}  {seconds:.0f} s')

  def ended(self, planned: Planned, status: int, again: bool) -> None:
    """Its process is gone."""
    seconds = self._stopped(planned)
    self._failed += not again
    log = os.path.join(planned.directory, LOG)
    self._line(
      'again' if again else 'FAILED',
      f'{planned.row.name}  {seconds:.0f} s, status {status}, see {log}',
    )

  def refresh(self) -> None:
    """Say now and then how far the rows are."""
    if not self._running or (
      not self._live and time.monotonic() - self._last < EVERY
    ):
      return
    self._last = time.monotonic()
    now = [f'{p.row.name}: {_progress(p)}' for p, _ in self._running.values()]
    if self._live:
      width = os.get_terminal_size().columns - 1
      print(f'\r\x1b[K{"; ".join(now)[:width]}', end='', flush=True)
    else:
      self._line('runs', '; '.join(now))

  def _stopped(self, planned: Planned) -> float:
    return time.monotonic() - self._running.pop(planned.identity)[1]

  def _line(self, event: str, text: str) -> None:
    clear = '\r\x1b[K' if self._live else ''
    counts = f'{self._finished}/{self._total}'
    if self._failed:
      counts += f' ({self._failed} failed)'
    self._say(f'{clear}{counts:>9}  {event:6} {text}')


def _progress(planned: Planned) -> str:
  """The last step that a run has told of."""
  config = planned.config
  steps = config['sft']['num_steps'] + config['preference']['num_steps']
  steps += config['rl']['num_iterations']
  try:
    with open(os.path.join(planned.directory, FILES[0]), 'rb') as f:
      f.seek(max(f.seek(0, os.SEEK_END) - 16_384, 0))
      row = json.loads(f.read().splitlines()[-1])
  except (OSError, ValueError, IndexError):  # not begun, or half a line
    return 'starting'
  return f'step {row["step"]}/{steps}'
