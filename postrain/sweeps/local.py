"""Rows in worker processes of this machine."""

from collections import deque
from collections.abc import Callable, Sequence
import contextlib
import os
import selectors
import subprocess
import sys
from typing import Any

from postrain.sweeps.board import Board
from postrain.sweeps.planning import Planned
from postrain.sweeps.worker import PREEMPTED

COMMAND = (sys.executable, '-m', 'postrain.sweeps.worker')
REFRESH = 1.0  # seconds


class _Worker:
  """A process, and the row that it runs."""

  def __init__(self, command: Sequence[str], cores: Sequence[int]):
    self.process = subprocess.Popen(
      [*command, f'--cores={",".join(map(str, cores))}'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      bufsize=0,
      start_new_session=True,  # an interrupt is for us, who then stop it
    )
    self.stdin: Any = self.process.stdin
    self.stdout: Any = self.process.stdout
    self.cores = cores
    self.row: Planned | None = None

  def start(self, planned: Planned) -> None:
    """Have it run a row; a process that is gone is noticed when it is read."""
    self.row = planned
    with contextlib.suppress(BrokenPipeError):
      self.stdin.write(f'{planned.directory}\n'.encode())

  def stop(self) -> None:
    """End it, whatever it does."""
    self.process.kill()
    self.process.wait()
    self.stdin.close()
    self.stdout.close()


def run(
  rows: Sequence[Planned],
  *,
  num_workers: int,
  num_retries: int = 2,
  command: Sequence[str] = COMMAND,
  say: Callable[[str], Any] = print,
) -> list[Planned]:
  """Run what is not finished, each row in one of the processes.

  A process keeps to its share of the cores, so that a row has the same bits
  whatever runs beside it.

  Args:
    rows: of `planning.plan`, claimed.
    num_workers: processes at a time.
    num_retries: how often a row that failed, or was killed, is started again;
      one that ended with status 75 was preempted, which does not count.
    command: of a worker, see `postrain.sweeps.worker`.
    say: takes the lines that people read.

  Returns:
    The rows that failed.

  Raises:
    ValueError: a number of workers or of retries that cannot be.
  """
  if num_retries < 0:
    raise ValueError(f'retries={num_retries}: give at least 0')
  shares = core_shares(num_workers)
  with _Pool(rows, num_retries, command, Board(rows, say)) as pool:
    for share in shares:
      pool.hire(share)
    while pool.workers:
      pool.heed()
  return [planned for planned in rows if not planned.finished]


class _Pool(contextlib.ExitStack):
  """The processes, what waits for one, and how often what has failed."""

  def __init__(
    self,
    rows: Sequence[Planned],
    num_retries: int,
    command: Sequence[str],
    board: Board,
  ):
    super().__init__()
    self.workers: list[_Worker] = []
    self._waiting = deque(planned for planned in rows if not planned.finished)
    self._failures: dict[str, int] = {}
    self._num_retries, self._command, self._board = num_retries, command, board
    self._selector = self.enter_context(selectors.DefaultSelector())
    self.callback(lambda: [worker.stop() for worker in self.workers])

  def hire(self, share: Sequence[int]) -> None:
    """Start a process on these cores, if a row waits for it."""
    if self._waiting:
      worker = _Worker(self._command, share)
      self.workers.append(worker)
      self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
      self._assign(worker)

  def heed(self) -> None:
    """Wait a moment for what processes say; give them more to do."""
    for key, _ in self._selector.select(REFRESH):
      worker, planned = key.data, key.data.row
      said = os.read(key.fd, 64)
      if said and planned.finished:
        self._board.finished(planned)
        if self._waiting:
          self._assign(worker)
        else:
          self._dismiss(worker)
        continue
      if said:  # of a row that is not finished: it cannot be trusted
        worker.process.kill()
      status = worker.process.wait()
      again = self._again(planned, status)
      self._board.ended(planned, status, again)
      self._dismiss(worker)
      self.hire(worker.cores)
    self._board.refresh()

  def _assign(self, worker: _Worker) -> None:
    planned = self._waiting.popleft()
    worker.start(planned)
    self._board.started(planned)

  def _dismiss(self, worker: _Worker) -> None:
    self._selector.unregister(worker.stdout)
    self.workers.remove(worker)
    worker.stop()

  def _again(self, planned: Planned, status: int) -> bool:
    """Whether a row whose process has ended waits once more."""
    failed = self._failures.get(planned.identity, 0) + (status != PREEMPTED)
    self._failures[planned.identity] = failed
    if failed <= self._num_retries:
      self._waiting.append(planned)
    return failed <= self._num_retries


def core_shares(num_workers: int) -> list[list[int]]:
  """Which cores each process may use, all of the same number.

  Raises:
    ValueError: more processes than cores, or none.
  """
  if hasattr(os, 'sched_getaffinity'):
    cores = sorted(os.sched_getaffinity(0))
  else:
    cores = list(range(os.cpu_count() or 1))
  if not 0 < num_workers <= len(cores):
    raise ValueError(
      f'workers={num_workers}: give 1 to {len(cores)}, the number of cores'
    )
  size = len(cores) // num_workers
  return [cores[i * size : (i + 1) * size] for i in range(num_workers)]
