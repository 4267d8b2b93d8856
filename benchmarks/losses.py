"""Time and memory of every loss, value and gradient, beside PyTorch.

  python benchmarks/losses.py

Tokens at [256, 2048] in float32, pairs at [65536], groups at [8192, 8],
divergences at [64, 32, 512]; metrics are not computed. The sides:

- jit: the loss of this library, jitted, and beside it not jitted;
- naive: the formula of the last column in jax.numpy, jitted;
- torch: the same formula in PyTorch where that is installed, eager and
  compiled (where a C++ compiler works).

Before anything is timed all sides must agree, value and gradient, to 1e-4. The
sides take turns; times are the least of all turns, which other work on the
machine disturbs least. Ratios are over the jitted time: above 1 the library is
faster. Memory is the peak of what lives beside arguments and
results: XLA's own figure of the program, and for PyTorch the allocations and
frees that its profiler records in one call.
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

from benchmarks.formulas import NO_LOSS, ROWS, inputs
from benchmarks.formulas.record import (
  Row,
  jax_operations,
  torch,
  torch_operations,
)
from postrain import losses

HOWS = ('eager', 'compiled')
MIB = 2**20


def library(name: str) -> Callable[..., Any]:
  row, fn = ROWS[name], getattr(losses, name)

  def total(*arrays: Any) -> Any:
    out = fn(*arrays, **row.options)
    return (out[0] if isinstance(out, tuple) else out).sum()

  return jax.value_and_grad(total, argnums=tuple(range(row.gradients)))


def naive(row: Row) -> Callable[..., Any]:
  x = jax_operations()
  total = lambda *arrays: row.formula(x, *arrays).sum()  # noqa: E731
  return jax.value_and_grad(total, argnums=tuple(range(row.gradients)))


def compiled(fn: Callable[..., Any], arrays: list) -> tuple[Callable, float]:
  program = jax.jit(fn).lower(*arrays).compile()
  memory = program.memory_analysis().temp_size_in_bytes / MIB
  return lambda: program(*arrays), memory


def torch_side(row: Row, arrays: list, how: str) -> Callable[[], Any]:
  x, tensors = torch_operations(), [torch.as_tensor(v) for v in arrays]
  wanted = [t.requires_grad_() for t in tensors[: row.gradients]]
  total = lambda *arrays: row.formula(x, *arrays).sum()  # noqa: E731
  if how == 'compiled':
    torch.compiler.reset()  # each loss is a program of its own
    total = torch.compile(total)

  def run() -> Any:
    loss = total(*tensors)
    return loss.detach(), torch.autograd.grad(loss, wanted)

  return run


def torch_memory(run: Callable[[], Any]) -> float:
  """Peak of live bytes in one call, less the value and the gradients."""
  activities = [torch.profiler.ProfilerActivity.CPU]
  with torch.profiler.profile(
    activities=activities, profile_memory=True
  ) as profile:
    loss, gradients = run()
  events = profile.profiler.kineto_results.events()
  changes = [e for e in events if e.name() == '[memory]']
  changes = [e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]
  # Gradients that are equal may be one array.
  results = {t.data_ptr(): t.nbytes for t in (loss, *gradients)}
  return (int(np.max(np.cumsum(changes))) - sum(results.values())) / MIB


def agree(name: str, side: str, found: Any, wanted: Any) -> None:
  """Refuses to compare different things."""
  (value, grads), (right, right_grads) = found, wanted
  for a, b in ((value, right), *zip(grads, right_grads, strict=True)):
    a, b = np.asarray(a), np.asarray(b)
    off = ~np.isclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    # At a kink or a tie rounding decides, for one element in ten thousand.
    if off.mean() > 1e-4:
      raise ValueError(
        f'{name}: {side} gives {a[off][:3]}, the library {b[off][:3]}; make the'
        ' formula that of the library'
      )


def least(sides: dict[str, Callable[[], Any]], rounds: int) -> dict:
  times = dict.fromkeys(sides, float('inf'))
  for _ in range(rounds):
    for name, run in sides.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name] = min(times[name], time.perf_counter() - start)
  return {name: 1e3 * t for name, t in times.items()}


def measure(
  name: str, x: dict[str, np.ndarray], rounds: int, hows: tuple[str, ...]
) -> str:
  row = ROWS[name]
  host = [x[k] for k in row.inputs.split()]
  # Trainers hold the mask as numbers and multiply with it.
  masks = [k == 'mask' for k in row.inputs.split()]
  theirs = [np.float32(v) if m else v for v, m in zip(host, masks, strict=True)]
  arrays, others = jax.device_put(host), jax.device_put(theirs)
  fn = library(name)
  sides, memory = {}, {}
  sides['jit'], memory['jit'] = compiled(fn, arrays)
  sides['not jitted'] = lambda: fn(*arrays)
  sides['naive'], memory['naive'] = compiled(naive(row), others)
  for how in hows:
    sides[f'torch {how}'] = torch_side(row, theirs, how)
  wanted = sides['jit']()
  for side, run in sides.items():
    agree(name, side, run(), wanted)
  memory |= {s: torch_memory(r) for s, r in sides.items() if 'torch' in s}
  times = least(sides, rounds)
  base = times.pop('jit')
  cells = [f'`{name}`', f'{base:.2f} ms, {memory["jit"]:.1f} MiB']
  for side, t in times.items():
    size = f', {memory[side]:.1f} MiB' if side in memory else ''
    cells.append(f'x {t / base:.1f}{size}')
  return '| ' + ' | '.join([*cells, row.origin]) + ' |'


def torch_hows() -> tuple[str, ...]:
  """The ways in which PyTorch runs here."""
  if torch is None:
    print('PyTorch is not installed: its columns are left out')
    return ()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  try:
    torch.compile(lambda v: v.sin() + 1)(torch.ones(4))
  except Exception as error:  # whatever a missing compiler raises
    print(f'torch.compile does not work here: {type(error).__name__}')
    return HOWS[:1]
  return HOWS


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--quick', action='store_true', help='small and few')
  parser.add_argument('--cores', type=int, help='use so many; Linux only')
  parser.add_argument('names', nargs='*', help='losses; none for all')
  flags = parser.parse_args()
  unknown = sorted(set(flags.names) - set(ROWS))
  if unknown:
    parser.error(f'no rows for {unknown}; choose of {sorted(ROWS)}')
  if flags.cores:  # before either library starts its threads
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.cores])
  hows = torch_hows()
  x = inputs(16, 128, 64) if flags.quick else inputs(256, 2048, 512)
  heads = ['loss', 'jit', 'not jitted', 'naive', *(f'torch {h}' for h in hows)]
  print('| ' + ' | '.join([*heads, 'formula']) + ' |')
  print('|' + ' --- |' * (len(heads) + 1))
  for name in flags.names or ROWS:
    print(measure(name, x, 3 if flags.quick else 20, hows), flush=True)
  if not flags.names:
    print()
    print('\n'.join(f'- `{k}` has no row: {v}' for k, v in NO_LOSS.items()))


if __name__ == '__main__':
  main()
