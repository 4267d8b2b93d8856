"""Time and memory of postrain beside Hugging Face, TRL and Tunix.

  make peers
  python benchmarks/peers/run.py --shapes=tiny,small

Every side is a process of one thread that loads the same weights; the sides
take turns, a step each. Before anything is timed they must agree: in the
log-probs and values of given sequences, in the losses of two steps (so also in
what the first update did) and in the number of tokens. What is compared stands
in `benchmarks/peers/README.md`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import statistics
import sys
from typing import Any

# In place of this folder, which has a file of each peer's name.
sys.path.insert(0, os.path.join(sys.path.pop(0), '..', '..'))

from benchmarks.peers.driver import PEERS, ROOT, measure
from benchmarks.peers.protocol import JOBS
from benchmarks.shapes import SHAPES, Shape


def tokens_of(job: str, shape: Shape) -> int:
  """Of a step: those sampled, or those trained on with their prompts."""
  length = shape.completion_length
  if job in ('generate', 'grpo', 'ppo'):
    return shape.num_rows * length
  rows = 2 * shape.num_pairs if job == 'dpo' else shape.num_rows
  return rows * (shape.prompt_length + length)


def figure(
  result: Mapping[str, Any], side: str, name: str = 'cpu',
  rule: Callable = statistics.median,
) -> float:  # fmt: skip
  """Of the timed steps of a side."""
  return rule(step[name] for step in result['sides'][side]['steps'])


HEADER = (
  '| job | shape | micro-batches | side | CPU s a step (least) | tokens a CPU s'
  ' | of it system | wall s | peak RSS | times ours (of least) |'
)


def table_rows(result: Mapping[str, Any]) -> list[str]:
  """A row for each side; where it takes more than one times ours, ours wins."""
  job, name, out = result['job'], result['shape'], []
  for side in result['sides']:
    cpu, least = figure(result, side), figure(result, side, rule=min)
    ratio = ''
    if 'ours' in result['sides']:
      ours, ours_least = (
        figure(result, 'ours', rule=r) for r in (statistics.median, min)
      )
      ratio = f'x {cpu / ours:.2f} (x {least / ours_least:.2f})'
    out.append(
      f'| {job} | {name} | {result["micro_batches"]} | {side} |'
      f' {cpu:.3g} ({least:.3g}) | {tokens_of(job, SHAPES[name]) / cpu:,.0f} |'
      f' {figure(result, side, "system") / cpu:.0%} |'
      f' {figure(result, side, "wall"):.3g} |'
      f' {figure(result, side, "peak_mib", max):,.0f} MiB | {ratio} |'
    )
  return out


def best(results: Sequence[Mapping[str, Any]]) -> str:
  """Each side at its best number of micro-batches, beside ours at its own."""
  found = {
    side: min((figure(r, side), r['micro_batches']) for r in results)
    for side in results[0]['sides']
  }
  words = [f'{side} {cpu:.3g} s at {n}' for side, (cpu, n) in found.items()]
  if 'ours' in found:
    ratios = [cpu / found['ours'][0] for cpu, _ in found.values()]
    words = [f'{w} (x {r:.2f})' for w, r in zip(words, ratios, strict=True)]
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
  parser.add_argument(
    '--jobs', type=names(JOBS), default=[j for j in JOBS if j != 'ppo'],
    help='all but ppo, which wants an older TRL',
  )  # fmt: skip
  parser.add_argument('--shapes', type=names([*SHAPES]), default=['tiny'])
  parser.add_argument(
    '--sides', type=names(['ours', 'hf', 'trl', 'tunix']),
    default=['ours', 'hf', 'trl', 'tunix'],
  )  # fmt: skip
  parser.add_argument('--rounds', type=int, default=3, help='timed steps')
  parser.add_argument('--micro_batches', type=names(['1', '2', '4', '8']),
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
