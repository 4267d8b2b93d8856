"""Rewards of texts, in this process or in processes of their own.

A worker is a fresh interpreter at the other end of a socket. Nothing is forked,
which the threads of JAX would not survive, and the main program is not imported
again, as `multiprocessing` would. What passes is plain: blocks of the config,
completions, examples, floats.
"""

from collections import deque
from collections.abc import Iterator, Mapping
import contextlib
import functools
import math
from multiprocessing.connection import Connection, Pipe, wait
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from postrain import rewards
from postrain.binding import bind
from postrain.rewards.scores import call_reward, score_completions
from postrain.types import Completion, RewardFn

Group = tuple[list[Completion], list[dict[str, Any]]]
Blocks = Mapping[str, Mapping[str, Any]]

GONE = (EOFError, ConnectionError)  # the other end
PATIENCE = 5.0  # seconds that idle workers have to tidy up


class Judge:
  """Calls rewards on completions; inside of `working`, in other processes.

  The values are the same bits either way: a worker gets all completions of a
  prompt at once, and what its rewards return is checked here.

  Args:
    blocks: label -> block for `postrain.rewards`.
    prompt: field of the examples that errors show.
    num_workers: processes; 0 for this one.
    timeout: seconds that a reward may take over the completions of a prompt.

  Raises:
    ValueError: a block or a number that cannot be meant.
  """

  def __init__(
    self, blocks: Blocks, *, prompt: str, num_workers: int = 0,
    timeout: float | None = None,
  ):  # fmt: skip
    if num_workers < 0:
      raise ValueError(
        f'environment.num_workers={num_workers}: it must be at least 0, which'
        ' rewards in this process'
      )
    if timeout is not None and not (num_workers and 0 < timeout < math.inf):
      raise ValueError(
        f'environment.timeout={timeout} with num_workers={num_workers}: it must'
        ' be a positive number of seconds, and only rewards in processes of'
        ' their own (num_workers of at least 1) can be stopped'
      )
    self._functions = _bound(blocks)
    self._blocks, self._prompt = blocks, prompt
    self._num_workers, self._timeout = num_workers, timeout
    self._wanted = 0  # workers, while any are
    self._workers: list[_Worker] = []

  def __call__(
    self, completions: list[Completion], examples: list[dict[str, Any]]
  ) -> dict[str, np.ndarray]:
    """Each reward; the completions of an example stand together."""
    size = len(completions) // len(examples)
    functions = self._functions
    if self._wanted:
      groups = [
        (completions[i * size : (i + 1) * size], [example] * size)
        for i, example in enumerate(examples)
      ]
      values = self._graded(groups)
      functions = {k: functools.partial(_known, v) for k, v in values.items()}
    rows = [example for example in examples for _ in range(size)]
    scores = score_completions(functions, completions, rows)
    return dict(zip(functions, scores.rewards, strict=True))

  @contextlib.contextmanager
  def working(self) -> Iterator[None]:
    """Start the workers, and end them whatever happens."""
    self._wanted = self._num_workers
    try:
      self._start()
      yield
    finally:
      self._wanted = 0
      self._end(PATIENCE)

  def _start(self) -> None:
    while len(self._workers) < self._wanted:
      self._workers.append(_Worker(self._blocks))

  def _end(self, patience: float) -> None:
    for worker in self._workers:
      worker.connection.close()
    last = time.monotonic() + patience
    while self._workers:
      self._workers.pop().end(max(last - time.monotonic(), 0.0))

  def _graded(self, groups: list[Group]) -> dict[str, list[Any]]:
    """What each reward returns for all completions, in their order."""
    self._start()
    try:
      answers = self._answers(groups)
    except BaseException:
      self._end(0.0)  # who is still at work must not answer a later question
      raise
    columns = zip(*answers, strict=True)
    return {
      label: [value for values in column for value in values]
      for label, column in zip(self._blocks, columns, strict=True)
    }

  def _answers(self, groups: list[Group]) -> list[list[Any]]:
    """One list of values for each group and reward."""
    answers: list[list[Any]] = [[] for _ in groups]
    waiting, busy = deque(range(len(groups))), {}
    idle = [*self._workers]
    for worker in idle:
      worker.begin()
    while waiting or busy:
      while waiting and idle:
        worker = idle.pop()
        busy[worker] = number = waiting.popleft()
        worker.send(groups[number])
      for worker in self._heard(busy, groups, answers):
        number = busy[worker]
        where = self._where(groups[number], answers[number])
        answers[number].append(worker.receive(where))
        if len(answers[number]) == len(self._blocks):
          del busy[worker]
          idle.append(worker)
    return answers

  def _heard(
    self, busy: Mapping['_Worker', int], groups: list[Group],
    answers: list[list[Any]],
  ) -> list['_Worker']:  # fmt: skip
    """Wait for those that have something to say."""
    last, left = min(busy, key=lambda worker: worker.since), None
    if self._timeout is not None:
      left = max(last.since + self._timeout - time.monotonic(), 0.0)
    heard = wait([worker.connection for worker in busy], left)
    if not heard:
      number = busy[last]
      raise ValueError(
        f'{self._where(groups[number], answers[number])} took more than'
        f' environment.timeout={self._timeout} seconds: raise it, or let the'
        ' reward give up by itself and return a number'
      )
    return [worker for worker in busy if worker.connection in heard]

  def _where(self, group: Group, answers: list[Any]) -> str:
    """The reward that a worker is at, and on what."""
    label = [*self._blocks][len(answers)]
    completions, (example, *_) = group
    return (
      f'reward {label!r} of the {len(completions)} completions of'
      f' {example[self._prompt]!r:.80}'
    )


class _Worker:
  """A process, and since when it has been silent."""

  def __init__(self, blocks: Blocks):
    self.connection, theirs = Pipe()
    self._begun, self.since = False, 0.0
    with theirs:
      self._process = subprocess.Popen(
        [
          *(sys.executable, '-c'),
          f'import sys; sys.path[:] = {sys.path!r};'
          f' from postrain.grading import serve; serve({theirs.fileno()})',
        ],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        # A worker must not take memory of the device that trains.
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      )
    self.connection.send(blocks)

  def begin(self) -> None:
    """Wait until the rewards are imported, which no timeout counts."""
    if not self._begun:
      self.receive('importing the rewards')
      self._begun = True

  def send(self, group: Group) -> None:
    """Give it a group to grade."""
    # One that died says so when it is listened to.
    with contextlib.suppress(*GONE):
      self.connection.send(group)
    self.since = time.monotonic()

  def receive(self, where: str) -> list[Any]:
    """Its next answer.

    Raises:
      ValueError: what a reward raised, or that the process ended.
    """
    try:
      answer = self.connection.recv()
    except GONE as error:
      self._process.kill()  # it may have closed the socket and live on
      raise ValueError(
        f'{where}: the process ended (exit code {self._process.wait()}) by a'
        ' crash, an exit or for want of memory: mend the reward, which'
        ' environment.num_workers=0 runs in this process, or take fewer workers'
      ) from error
    if isinstance(answer, str):
      raise ValueError(answer)
    self.since = time.monotonic()
    return answer

  def end(self, patience: float) -> None:
    """Wait for the process to end by itself, or end it."""
    try:
      self._process.wait(patience)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()


def serve(descriptor: int) -> None:
  """Grade groups until the other end is closed: the program of a worker.

  Answers with one list per reward, or with the text of an error.

  Args:
    descriptor: of the socket. First come the blocks of the rewards.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # the other end will close
  with Connection(descriptor) as connection, contextlib.suppress(*GONE):
    try:
      functions = _bound(connection.recv())
    except ValueError as error:
      connection.send(str(error))
      return
    connection.send([])
    while True:
      group = connection.recv()
      for label, function in functions.items():
        try:
          answer = call_reward(label, function, *group)
        except ValueError as error:
          answer = str(error)
        connection.send(answer)


def _bound(blocks: Blocks) -> dict[str, RewardFn]:
  return {label: bind(rewards, block) for label, block in blocks.items()}


def _known(
  values: list[Any], completions: list[Completion], examples: list[Any]
) -> list[Any]:
  """A reward whose values are there already."""
  del completions, examples
  return values
