"""Sides that take turns: processes of one thread that must agree."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.peers import material, protocol
from benchmarks.shapes import SHAPES, Shape
from postrain.workdir import commit

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEERS = {
  'generate': ('hf', 'tunix'),
  'grpo': ('trl', 'tunix'),
  'ppo': ('trl', 'tunix'),
  'dpo': ('trl',),
  'sft': ('trl',),
}
LOSSES = 2  # that must agree: the first, and the one behind an update
STEPS = 20  # of `protocol.TRAJECTORY`, all of whose losses must
FOLLOWED = {'small': 'tiny'}  # in place of a shape whose steps take long
WARM_UPS = 2
TOLERANCE = 1e-4
ONE_THREAD = {
  **dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'NPROC'), '1'),
  **dict(JAX_NUM_CPU_DEVICES='1', JAX_PLATFORMS='cpu', HF_HUB_OFFLINE='1'),
  'TOKENIZERS_PARALLELISM': 'false',
}
Answer = dict[str, Any]


class Worker:
  """A side: a process that does a step when it is told to."""

  def __init__(
    self, python: str, side: str, job: str, shape: str, folder: str,
    micro_batches: int,
  ):  # fmt: skip
    self.side = side
    self._log = pathlib.Path(folder) / f'{side}-{job}-{micro_batches}.log'
    command = [
      python, '-m', f'benchmarks.peers.{side}', f'--job={job}',
      f'--shape={shape}', f'--folder={folder}/weights',
      f'--workdir={folder}/{side}-{job}-{micro_batches}',
      f'--micro_batches={micro_batches}',
    ]  # fmt: skip
    with open(self._log, 'w', encoding='utf-8') as log:
      self._process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
      )  # fmt: skip

  def read(self) -> Answer:
    """The next answer.

    Raises:
      ValueError: the process has ended, with the end of what it wrote.
    """
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      last = self._log.read_text(encoding='utf-8').splitlines()[-20:]
      raise ValueError(
        '\n'.join(
          [f'{self.side} ended with status {code}, having said:', *last]
        )
      )
    return json.loads(line)

  def step(self) -> Answer:
    print('step', file=self._process.stdin, flush=True)
    return self.read()

  def close(self) -> None:
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


def interpreters(sides: Sequence[str], peers: str) -> dict[str, str]:
  """The Python of each side.

  Raises:
    ValueError: there is none for the peers.
  """
  others = [side for side in sides if side != 'ours']
  if others and not os.access(peers, os.X_OK):
    raise ValueError(
      f'no interpreter {peers} for {", ".join(others)}:'
      ' run `make peers`, or name one that has them with --python or in'
      ' POSTRAIN_PEERS; --sides=ours needs none'
    )
  peers = os.path.abspath(peers)  # the sides run in the root
  return {side: sys.executable if side == 'ours' else peers for side in sides}


def agree(
  where: str, found: Mapping[str, Answer], shape: Shape, steps: int = LOSSES
) -> dict[str, float]:
  """Largest relative gap of each figure between the first side and others.

  Args:
    where: for the message.
    found: of each side ``logprobs``, and ``values``, ``losses``,
      ``chosen_logprobs`` or ``tokens`` as the job has them.
    shape: tells how many tokens there must be.
    steps: whose losses must agree; those of later ones drift apart.

  Raises:
    ValueError: a side computes something else.
  """
  gaps = {}
  first, *others = found
  for side, answer in found.items():
    expected = shape.num_rows * shape.completion_length
    if answer.get('tokens', expected) != expected:
      raise ValueError(
        f'{where}: {side} sampled {answer["tokens"]} tokens, not {expected}:'
        ' its completions are not of full length; nothing is timed'
      )
  for name in ('logprobs', 'values', 'chosen_logprobs', 'losses'):
    right = found[first].get(name)
    if not right:
      continue
    for side in others:
      given = found[side].get(name)
      size = min(len(right), len(given or []))
      if name in ('chosen_logprobs', 'losses'):
        size = min(size, steps)
      if not size:
        raise ValueError(f'{where}: {side} gave no {name}; nothing is timed')
      a, b = np.array(right[:size]), np.array(given[:size])
      scale = np.abs(a)
      if name == 'values':  # some are next to 0
        scale = scale.max()
      gap = float(np.max(np.abs(a - b) / scale))
      gaps[name] = max(gap, gaps.get(name, 0.0))
      if not gap <= TOLERANCE:
        raise ValueError(
          f'{where}: {side} gives {name} {given[:size]}, {first}'
          f' {right[:size]}: they differ by {gap:.1e} of their size, more than'
          f' {TOLERANCE:g}; nothing is timed'
        )
  return gaps


def warm_up(worker: Worker, wanted: int) -> tuple[Answer, list[Answer]]:
  """Step until all is compiled and ``wanted`` losses are known.

  Returns:
    All that it has told, and its steps.

  Raises:
    ValueError: it does not give so many losses.
  """
  told, steps = {}, []
  while len(steps) < WARM_UPS or len(told.get('losses', ())) < wanted:
    if len(steps) > WARM_UPS + wanted:
      raise ValueError(
        f'{worker.side} gave {told.get("losses")} as losses of {len(steps)}'
        f' steps: {wanted} are needed to compare'
      )
    steps.append(worker.step())
    told |= steps[-1]
  return told, steps


@contextlib.contextmanager
def at_work(
  pythons: Mapping[str, str], *where: Any
) -> Iterator[dict[str, Worker]]:
  """A worker for each side, until the end."""
  with contextlib.ExitStack() as stack:
    workers = {}
    for side, python in pythons.items():
      workers[side] = Worker(python, side, *where)
      stack.callback(workers[side].close)
    yield workers


def follow(
  pythons: Mapping[str, str], shape_name: str, micro_batches: int
) -> Answer:
  """Take the same steps of plain SGD on all sides, and hold them together.

  Returns:
    The losses of each side, and the largest relative gap between them.

  Raises:
    ValueError: a loss differs, so that nothing is worth to be timed.
  """
  job, shape_name = protocol.TRAJECTORY, FOLLOWED.get(shape_name, shape_name)
  where, shape = f'{job} {shape_name}, {STEPS} steps', SHAPES[shape_name]
  with tempfile.TemporaryDirectory() as folder:
    material.make(f'{folder}/weights', shape)
    with at_work(pythons, job, shape_name, folder, micro_batches) as workers:
      for worker in workers.values():
        worker.read()
      told = {side: warm_up(each, STEPS)[0] for side, each in workers.items()}
  gaps = agree(where, told, shape, STEPS)
  losses = {side: each['losses'][:STEPS] for side, each in told.items()}
  print(
    f'{where} of SGD: losses agree to {gaps["losses"]:.1e}', file=sys.stderr
  )
  return {'shape': shape_name, 'gaps': gaps, 'losses': losses}


def measure(
  job: str, shape_name: str, sides: Sequence[str], *, peers: str,
  micro_batches: int = 1, rounds: int = 3,
) -> dict[str, Any]:  # fmt: skip
  """Let the sides take turns; figures of each step come back.

  Raises:
    ValueError: an interpreter is missing, a side fails, or sides disagree.
  """
  if rounds < 1 or not sides:
    raise ValueError(
      f'{job} with rounds={rounds} and sides={list(sides)}: take at least one'
      ' round and a side that does this job'
    )
  shape, pythons = SHAPES[shape_name], interpreters(sides, peers)
  where = f'{job} {shape_name}, {micro_batches} micro-batches'
  together = {}
  if job == 'dpo' and len(sides) > 1:
    together['trajectory'] = follow(pythons, shape_name, micro_batches)
  with tempfile.TemporaryDirectory() as folder:
    material.make(f'{folder}/weights', shape)
    given = job, shape_name, folder, micro_batches
    with at_work(pythons, *given) as workers:
      ready = {side: worker.read() for side, worker in workers.items()}
      gaps = agree(where, ready, shape)
      wanted = LOSSES if job in ('dpo', 'sft') else 0
      warm = {side: warm_up(each, wanted) for side, each in workers.items()}
      gaps |= agree(
        where, {side: told for side, (told, _) in warm.items()}, shape
      )
      words = [f'{name} to {gap:.1e}' for name, gap in gaps.items()]
      if words:
        print(f'{where}: sides agree in {", ".join(words)}', file=sys.stderr)
      steps = {side: [] for side in sides}
      for _ in range(rounds):
        for side, worker in workers.items():
          steps[side].append(worker.step())
      agree(where, {side: each[-1] for side, each in steps.items()}, shape)
  return {
    'job': job, 'shape': shape_name, 'micro_batches': micro_batches,
    'commit': commit(), 'machine': machine(), 'gaps': gaps, **together,
    'sides': {
      side: {
        'versions': ready[side]['versions'],
        'warm_up': trimmed(warm[side][1]),
        'steps': trimmed(steps[side]),
      }
      for side in sides
    },
  }  # fmt: skip


def trimmed(steps: Sequence[Answer]) -> list[Answer]:
  """Steps without what was there to be compared."""
  return [
    {k: v for k, v in each.items() if k not in ('losses', 'chosen_logprobs')}
    for each in steps
  ]


def machine() -> dict[str, Any]:
  """What the figures were taken on."""
  model = platform.processor()
  with contextlib.suppress(OSError, StopIteration):
    with open('/proc/cpuinfo', encoding='utf-8') as lines:
      model = next(x for x in lines if x.startswith('model name'))
    model = model.split(':')[1].strip()
  return {
    'cpu': model,
    'cores': os.cpu_count(),
    'load': os.getloadavg()[0],
    'system': platform.platform(),
    'python': platform.python_version(),
  }
