"""What this machine can do: matrix products and memory, in JAX and PyTorch.

  python benchmarks/machine.py

One thread each. Products are those of a decoder: square, of an update, and of a
decode step of 64 sequences. 'Triad' is a + 2 b: into an array that is given, or
into a new one, whose pages the system has to hand out first. Rates are of CPU
time, the least of the turns; PyTorch's columns are there where it is installed.
"""

import argparse
from collections.abc import Callable
import os
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp

from benchmarks.timing import least, one_thread

PRODUCTS = ((2048, 2048, 2048), (512, 512, 2816), (64, 512, 2816))
DTYPES = ('float32', 'bfloat16')


def load_torch() -> Any:
  try:
    import torch
  except ImportError:
    return None
  torch.set_num_threads(1)
  return torch


def products(
  torch: Any, sizes: tuple[int, int, int], dtype: str
) -> tuple[int, dict[str, Callable[[], Any]]]:
  """Operations of a turn, and the sides."""
  m, k, n = sizes
  a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
  multiply = jax.jit(jnp.matmul)
  # Small ones many times, or the call is what is measured.
  repeats = max(1, int(2e9 / (m * k * n)))
  sides = {'jax': lambda: [multiply(a, b) for _ in range(repeats)][-1]}
  if torch is not None:
    x = torch.ones((m, k), dtype=getattr(torch, dtype))
    y = torch.ones((k, n), dtype=x.dtype)
    sides['torch'] = lambda: [x @ y for _ in range(repeats)]
  return 2 * m * k * n * repeats, sides


def transfers(torch: Any, size: int) -> dict[str, tuple[int, dict]]:
  """Name -> bytes moved, and the sides."""
  a, b = jnp.ones(size), jnp.ones(size)
  jax.block_until_ready((a, b))
  total = jax.jit(jnp.sum)
  fresh = jax.jit(lambda a, b: a + 2 * b)
  donated = jax.jit(lambda a, b: a + 2 * b, donate_argnums=0)
  held = [jnp.ones(size)]

  def given() -> Any:
    held[0] = donated(held[0], b)
    return held[0]

  sides: dict[str, tuple[int, dict]] = {
    'read (sum)': (4 * size, {'jax': lambda: total(a)}),
    'triad, given': (12 * size, {'jax': given}),
    'triad, new': (12 * size, {'jax': lambda: fresh(a, b)}),
  }
  if torch is not None:
    x, y, out = (torch.ones(size) for _ in range(3))
    sides['read (sum)'][1]['torch'] = x.sum
    sides['triad, given'][1]['torch'] = lambda: torch.add(
      x, y, alpha=2, out=out
    )
    sides['triad, new'][1]['torch'] = lambda: torch.add(x, y, alpha=2)
  return sides


def row(name: str, amount: float, times: dict[str, float], unit: str) -> str:
  cells = [f'{amount / taken / 1e9:.1f} {unit}' for taken in times.values()]
  return '| ' + ' | '.join([name, *cells]) + ' |'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--mebibytes', type=int, default=256)
  flags = parser.parse_args()
  one_thread()
  torch = load_torch()
  columns = ['jax', *(['torch'] if torch is not None else [])]
  print('| ' + ' | '.join(['what', *columns]) + ' |')
  print('|' + ' --- |' * (len(columns) + 1))
  for dtype in DTYPES:
    for sizes in PRODUCTS:
      operations, sides = products(torch, sizes, dtype)
      times = least(sides, flags.rounds)
      name = f'{dtype} ' + ' x '.join(map(str, sizes))
      print(row(name, operations, times, 'GFLOP/s'), flush=True)
  for name, (size, sides) in transfers(torch, flags.mebibytes * 2**18).items():
    times = least(sides, flags.rounds)
    print(row(name, size, times, 'GB/s'), flush=True)


if __name__ == '__main__':
  main()
