"""Our side of a job without any peer: phases, arithmetic, memory."""

import argparse
from collections.abc import Callable
import statistics
from typing import Any

from benchmarks.peers.driver import measure
from benchmarks.shapes import SHAPES, Shape


def main(job: str, doc: str, tokens: Callable, flops: Callable) -> None:
  """Measure a job on the command line's shapes and print a table.

  Args:
    job: of `benchmarks.peers.protocol`.
    doc: of the program.
    tokens: shape -> tokens of a step.
    flops: shape -> arithmetic of a step.
  """
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument('--shapes', default='tiny', help='with commas between')
  parser.add_argument('--micro_batches', type=int, default=1)
  parser.add_argument('--rounds', type=int, default=3)
  flags = parser.parse_args()
  header = (
    '| shape | micro-batches | CPU s a step | tokens a CPU s | GFLOP/s'
    ' | of the GEMM rate | peak RSS | phases, of wall time |'
  )
  print(f'{header}\n|' + ' --- |' * (header.count('|') - 1))
  for name in flags.shapes.split(','):
    chosen: dict[str, Any] = dict(
      peers='', micro_batches=flags.micro_batches, rounds=flags.rounds
    )
    found = measure(job, name, ['ours'], **chosen)['sides']['ours']['steps']
    rate = gemm_rate(name)
    cpu = statistics.median(step['cpu'] for step in found)
    shape = SHAPES[name]
    done = flops(shape) / cpu
    print(
      f'| {name} | {flags.micro_batches} | {cpu:.3g} |'
      f' {tokens(shape) / cpu:,.0f} | {done / 1e9:.1f} | {done / rate:.0%} |'
      f' {found[-1]["peak_mib"]:,.0f} MiB | {phases(found)} |',
      flush=True,
    )


def gemm_rate(shape: str) -> float:
  """Operations a CPU second of one large product in float32."""
  found = measure('gemm', shape, ['ours'], peers='')['sides']['ours']['steps']
  return max(step['flops'] / step['cpu'] for step in found)


def phases(steps: list[dict[str, Any]]) -> str:
  """The share of each phase that a step names."""
  shares = {
    name: statistics.median(s['phases'][name] / s['wall'] for s in steps)
    for name in steps[0].get('phases', {})
  }
  return ', '.join(f'{name} {share:.0%}' for name, share in shares.items())


def sampled(shape: Shape) -> float:
  """Arithmetic of a rollout: a prompt once, then a token at a time."""
  length = shape.completion_length
  run = shape.num_prompts * shape.prompt_length + shape.num_rows * (length - 1)
  return shape.forward_flops(run, shape.num_rows * length)


def passed(shape: Shape, rows: int) -> float:
  """Arithmetic of one forward over sequences with their prompts."""
  length = shape.completion_length
  return shape.forward_flops(
    rows * (shape.prompt_length + length), rows * length
  )
