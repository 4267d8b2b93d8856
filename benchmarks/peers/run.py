"""Time and memory of postrain beside Hugging Face, TRL and Tunix.

  make peers
  python benchmarks/peers/run.py --jobs=generate,grpo,dpo,sft --shapes=tiny,small

Every side is a process of one thread that loads the same weights; the sides
take turns, a step each. Before anything is timed they must agree: in the
log-probs of given sequences, in the losses of two steps (so also in what the
first update did) and in the number of tokens. What is compared stands in
`benchmarks/peers/README.md`.
"""

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT)]  # this folder has a file of each peer's name

import numpy as np

from benchmarks.peers.protocol import JOBS
from benchmarks.shapes import SHAPES, Shape

PEERS = {
  'generate': ('hf', 'tunix'),
  'grpo': ('trl', 'tunix'),
  'dpo': ('trl',),
  'sft': ('trl',),
}
LOSSES = 2  # that must agree: the first, and the one behind an update
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
  if {*sides} - {'ours'} and not os.access(peers, os.X_OK):
    raise ValueError(
      f'no interpreter {peers} for {", ".join(s for s in sides if s != "ours")}:'
      ' run `make peers`, or name one that has them with --python or in'
      ' POSTRAIN_PEERS; --sides=ours needs none'
    )
  return {side: sys.executable if side == 'ours' else peers for side in sides}


def agree(
  where: str, found: Mapping[str, Answer], shape: Shape
) -> dict[str, float]:
  """Largest relative gap of each figure between the first side and others.

  Args:
    where: for the message.
    found: of each side ``logprobs``, and ``losses``, ``pair_logprobs`` or
      ``tokens`` as the job has them.
    shape: tells how many tokens there must be.

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
  for name in ('logprobs', 'pair_logprobs', 'losses'):
    right = found[first].get(name)
    if not right:
      continue
    for side in others:
      given = found[side].get(name)
      size = min(len(right), len(given or []))
      if not size:
        raise ValueError(f'{where}: {side} gave no {name}; nothing is timed')
      a, b = np.array(right[:size]), np.array(given[:size])
      gap = float(np.max(np.abs(a - b) / np.abs(a)))
      gaps[name] = max(gap, gaps.get(name, 0.0))
      if not gap <= TOLERANCE:
        raise ValueError(
          f'{where}: {side} gives {name} {given[:size]}, {first}'
          f' {right[:size]}: they differ by {gap:.1e} of their size, more than'
          f' {TOLERANCE:g}; nothing is timed'
        )
  return gaps


def warm_up(
  job: str, workers: Sequence[Worker]
) -> tuple[dict[str, Answer], dict[str, list[Answer]]]:
  """Step until all is compiled and enough losses are known.

  Returns:
    All that each side has told, and its steps.
  """
  told = {w.side: w.read() for w in workers}
  steps = {w.side: [] for w in workers}
  for worker in workers:
    while len(steps[worker.side]) < LOSSES or (
      job in ('dpo', 'sft') and len(told[worker.side]['losses']) < LOSSES
    ):
      steps[worker.side].append(worker.step())
      told[worker.side] |= steps[worker.side][-1]
  return told, steps


def measure(
  job: str, shape_name: str, sides: Sequence[str], *, peers: str,
  micro_batches: int = 1, rounds: int = 3,
) -> dict[str, Any]:  # fmt: skip
  """Let the sides take turns; see `result` for what comes back.

  Raises:
    ValueError: an interpreter is missing, a side fails, or sides disagree.
  """
  shape, pythons = SHAPES[shape_name], interpreters(sides, peers)
  where = f'{job} {shape_name}, {micro_batches} micro-batches'
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    from benchmarks.peers import material

    material.make(f'{folder}/weights', shape)
    workers = []
    for side, python in pythons.items():
      worker = Worker(python, side, job, shape_name, folder, micro_batches)
      stack.callback(worker.close)
      workers.append(worker)
    told, warm = warm_up(job, workers)
    gaps = agree(where, told, shape) if job in PEERS else {}
    words = [f'{name} to {gap:.1e}' for name, gap in gaps.items()]
    if words:
      print(f'{where}: sides agree in {", ".join(words)}', file=sys.stderr)
    steps = {side: [] for side in sides}
    for _ in range(rounds):
      for worker in workers:
        steps[worker.side].append(worker.step())
    for side in sides:
      agree(where, {side: steps[side][-1]}, shape)
  return {
    'job': job, 'shape': shape_name, 'micro_batches': micro_batches,
    'machine': machine(), 'gaps': gaps,
    'sides': {
      side: {
        'versions': told[side]['versions'],
        'warm_up': trimmed(warm[side]),
        'steps': trimmed(steps[side]),
      }
      for side in sides
    },
  }  # fmt: skip


def trimmed(steps: Sequence[Answer]) -> list[Answer]:
  """Steps without what was there to be compared."""
  return [
    {k: v for k, v in each.items() if k not in ('losses', 'pair_logprobs')}
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


def tokens_of(job: str, shape: Shape) -> int:
  """Of a step: those sampled, or those trained on with their prompts."""
  length = shape.completion_length
  if job in ('generate', 'grpo'):
    return shape.num_rows * length
  rows = 2 * shape.num_pairs if job == 'dpo' else shape.num_rows
  return rows * (shape.prompt_length + length)


def median(result: Mapping[str, Any], side: str, figure: str = 'cpu') -> float:
  """Of a figure over the timed steps of a side."""
  return statistics.median(s[figure] for s in result['sides'][side]['steps'])


HEADER = (
  '| job | shape | micro-batches | side | CPU s a step (least) | tokens a CPU s'
  ' | wall s | peak RSS | times ours |'
)


def table_rows(result: Mapping[str, Any]) -> list[str]:
  """A row for each side; the ratio is of medians, above 1 ours is faster."""
  job, name = result['job'], result['shape']
  out = []
  for side, found in result['sides'].items():
    cpu = median(result, side)
    ratio = ''
    if 'ours' in result['sides']:
      ratio = f'x {cpu / median(result, "ours"):.2f}'
    least = min(step['cpu'] for step in found['steps'])
    peak = found['steps'][-1]['peak_mib']
    out.append(
      f'| {job} | {name} | {result["micro_batches"]} | {side} |'
      f' {cpu:.3g} ({least:.3g}) | {tokens_of(job, SHAPES[name]) / cpu:,.0f} |'
      f' {median(result, side, "wall"):.3g} | {peak:,.0f} MiB | {ratio} |'
    )
  return out


def best(results: Sequence[Mapping[str, Any]]) -> str:
  """Each side at its best number of micro-batches, beside ours at its own."""
  found = {
    side: min((median(r, side), r['micro_batches']) for r in results)
    for side in results[0]['sides']
  }
  ours = found.get('ours')
  words = [
    f'{side} {cpu:.3g} s at {micro}'
    + (f' (x {cpu / ours[0]:.2f})' if ours else '')
    for side, (cpu, micro) in found.items()
  ]
  return f'{results[0]["job"]} {results[0]["shape"]}, best: {", ".join(words)}'


def main() -> None:
  def names(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
      for name in (chosen := text.split(',')):
        if name not in known:
          raise argparse.ArgumentTypeError(
            f'{name!r} is none of {", ".join(known)}'
          )
      return chosen

    return parse

  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--jobs', type=names(JOBS), default=[*JOBS])
  parser.add_argument('--shapes', type=names([*SHAPES]), default=['tiny'])
  parser.add_argument(
    '--sides', type=names(['ours', 'hf', 'trl', 'tunix']),
    default=['ours', 'hf', 'trl', 'tunix'],
  )  # fmt: skip
  parser.add_argument('--rounds', type=int, default=3, help='timed steps')
  parser.add_argument('--micro_batches', type=names('1 2 4 8'.split()),
                      default=['1', '4'])  # fmt: skip
  parser.add_argument('--out', default=str(ROOT / 'benchmarks' / 'results'))
  parser.add_argument(
    '--python', help='interpreter of the peers',
    default=os.environ.get('POSTRAIN_PEERS', str(ROOT / '.peers/bin/python')),
  )  # fmt: skip
  flags = parser.parse_args()
  out = pathlib.Path(flags.out)
  out.mkdir(parents=True, exist_ok=True)
  print(HEADER + '\n|' + ' --- |' * (HEADER.count('|') - 1), flush=True)
  summary = []
  for shape in flags.shapes:
    for job in flags.jobs:
      sides = [s for s in flags.sides if s == 'ours' or s in PEERS[job]]
      micro = ['1'] if job == 'generate' else flags.micro_batches
      results = []
      for number in map(int, micro):
        results.append(
          measure(
            job, shape, sides, peers=flags.python, micro_batches=number,
            rounds=flags.rounds,
          )
        )  # fmt: skip
        print('\n'.join(table_rows(results[-1])), flush=True)
        text = json.dumps(results[-1], indent=2) + '\n'
        (out / f'peers-{job}-{shape}-{number}.json').write_text(text)
      summary.append(best(results))
  print('\n' + '\n'.join(summary))


if __name__ == '__main__':
  main()
