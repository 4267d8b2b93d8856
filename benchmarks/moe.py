"""Time and memory of the forms of a mixture of experts.

  python benchmarks/moe.py

Each form of `postrain.models.moe` at one token, a decode batch and a training
batch, forward, and forward with gradients. The forms take turns; times are
medians. Ratios are over the time of the dense form, every expert on every
token: above 1 the form is faster. The form that `experts_mlp` takes here is
marked with a star. Memory is what the program needs beside its arguments.
"""

import argparse
from collections.abc import Callable
import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import numpy as np

from postrain.models import moe

FORMS = (moe.dense_mlp, moe.grouped_mlp, moe.blocked_mlp)
EXPERTS = ((8, 2, 512), (64, 8, 128))  # of E, K selected, their width F
WIDTH = 256


def arguments(num_tokens: int, num_experts: int, num_selected: int, inner: int):
  """Tokens, experts, gates and weights."""
  keys = jax.random.split(jax.random.key(0), 5)

  def noise(key: Any, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / 16

  routing = moe.route(
    16 * noise(keys[0], num_tokens, num_experts),
    num_selected=num_selected,
    normalize=True,
  )
  return (
    noise(keys[1], num_tokens, WIDTH),
    routing.experts,
    routing.gates,
    noise(keys[2], num_experts, WIDTH, inner),
    noise(keys[3], num_experts, WIDTH, inner),
    noise(keys[4], num_experts, inner, WIDTH),
  )


def program(form: Callable, args: tuple, gradient: bool) -> Any:
  def forward(*args: Any) -> Any:
    return form(*args, activation=jax.nn.silu)

  def backward(*args: Any) -> Any:
    return jax.grad(
      lambda *args: forward(*args).sum(), argnums=(0, 2, 3, 4, 5)
    )(*args)

  return jax.jit(backward if gradient else forward).lower(*args).compile()


def medians(programs: list, args: tuple, rounds: int) -> list[float]:
  times: list[list[float]] = [[] for _ in programs]
  for _ in range(rounds + 1):
    for run, taken in zip(programs, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(run(*args))
      taken.append(time.perf_counter() - start)
  return [1e3 * float(np.median(t[1:])) for t in times]


def measure(sizes: tuple, gradient: bool, rounds: int) -> str:
  num_tokens, num_experts, num_selected, _ = sizes
  args = arguments(*sizes)
  programs = [program(form, args, gradient) for form in FORMS]
  times = medians(programs, args, rounds)
  chosen = moe.fastest(args[1], num_experts=num_experts)
  cells = [
    f'{num_tokens}, {num_selected} of {num_experts}',
    'with gradients' if gradient else 'forward',
  ]
  for form, run, taken in zip(FORMS, programs, times, strict=True):
    memory = run.memory_analysis().temp_size_in_bytes / 2**20
    star = '\\*' if form is chosen else ''
    cells.append(
      f'{taken:.1f} ms (x {times[0] / taken:.1f}), {memory:.0f} MiB{star}'
    )
  return '| ' + ' | '.join(cells) + ' |'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--quick', action='store_true', help='small and few')
  flags = parser.parse_args()
  heads = ['tokens, experts', 'program', *(f'`{f.__name__}`' for f in FORMS)]
  print('| ' + ' | '.join(heads) + ' |')
  print('|' + ' --- |' * len(heads))
  for experts in EXPERTS:
    for num_tokens in (1, 16) if flags.quick else (1, 16, 64, 256, 2048):
      for gradient in (False, True):
        rounds = 1 if flags.quick else 5
        row = measure((num_tokens, *experts), gradient, rounds)
        print(row, flush=True)


if __name__ == '__main__':
  main()
