"""Processor time of programs that take turns."""

from collections.abc import Callable, Mapping
import os
import time
from typing import Any

import jax


def one_thread() -> None:
  """Leave JAX and PyTorch one thread each; before the first array."""
  os.environ |= {'OMP_NUM_THREADS': '1', 'NPROC': '1'}


def least(
  sides: Mapping[Any, Callable[[], Any]], rounds: int
) -> dict[Any, float]:
  """CPU seconds of each side, the least of all turns.

  One turn before them warms up. The time of the process is that of all its
  threads: compare with one thread on each side, or wall time would mix in
  whatever else the machine does.
  """
  times = dict.fromkeys(sides, float('inf'))
  for turn in range(rounds + 1):
    for name, run in sides.items():
      start = time.process_time()
      jax.block_until_ready(run())
      taken = time.process_time() - start
      if turn:
        times[name] = min(times[name], taken)
  return times
