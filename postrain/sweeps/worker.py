"""A process that runs rows, one after another.

  python -m postrain.sweeps.worker DIRECTORY ...  # these, then end
  python -m postrain.sweeps.worker --cores=0,1    # those named on stdin

A line on stdin is the directory of a row; ``done`` is answered when it has
ended, and whatever goes wrong ends the process, so that the next row has a
fresh one. When stdin is closed the process ends at once: a run can be killed
anywhere.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import queue
import signal
import socket
import sys
import threading
from typing import Any

from postrain import workdir

LOG = 'log.txt'
PREEMPTED = 75  # a process that was asked to stop ends so: EX_TEMPFAIL


def run_row(directory: str) -> None:
  """Run a row, continue it, or find it finished.

  Two processes never run one row: the second waits, and finds it finished.

  Raises:
    ValueError: there is no row, and what a run raises.
  """
  import jax

  from postrain.sweeps.planning import ROW, locked
  from postrain.trainer import Trainer

  path = os.path.join(directory, ROW)
  if not os.path.exists(path):
    raise ValueError(
      f'{path}: there is no such file; experiments/sweep.py writes it'
    )
  with open(path) as f:
    record = json.load(f)
  first = jax.process_index() == 0  # of several hosts it does this for all
  with locked(directory, wait=True) if first else contextlib.nullcontext():
    if not os.path.exists(os.path.join(directory, 'finished.json')):
      if first:
        surroundings = os.path.join(directory, 'environment.json')
        workdir.write_json(surroundings, environment())
      Trainer(record['config'], directory, record['overrides']).run()
      jax.clear_caches()  # programs of rows that are over


def environment() -> dict[str, Any]:
  """What a row runs in: code, versions, machine, variables that JAX reads."""
  cores = getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count() or 1))
  prefixes = ('JAX_', 'XLA_', 'LIBTPU_', 'CUDA_VISIBLE', 'OMP_')
  return {
    'commit': workdir.commit(),
    'python': platform.python_version(),
    'versions': {p: importlib.metadata.version(p) for p in workdir.PACKAGES},
    'platform': platform.platform(),
    'host': socket.gethostname(),
    'num_cores': len(cores(0)),
    'variables': {
      k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)
    },
  }


def _serve() -> None:
  """Run the rows that stdin names, until it is closed."""
  rows: queue.SimpleQueue[str] = queue.SimpleQueue()
  answers = os.dup(1)

  def listen() -> None:
    for line in sys.stdin:
      rows.put(line.rstrip('\n'))
    os._exit(0)

  threading.Thread(target=listen, daemon=True).start()
  while True:
    directory = rows.get()
    log = os.open(
      os.path.join(directory, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )
    for stream in (1, 2):
      os.dup2(log, stream)
    os.close(log)
    run_row(directory)
    sys.stdout.flush()
    os.write(answers, b'done\n')


def main() -> None:
  """Run the rows of the command line, or those of stdin."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('rows', nargs='*', help='directories of rows')
  parser.add_argument('--cores', help='numbers, as in 0,1; all where absent')
  parser.add_argument(
    '--distributed', action='store_true', help='one process of several hosts'
  )
  flags = parser.parse_args()
  if flags.cores and hasattr(os, 'sched_setaffinity'):
    # Before the first computation, which makes as many threads.
    os.sched_setaffinity(0, {int(core) for core in flags.cores.split(',')})
  # A run can be killed anywhere, and goes on from its last checkpoint.
  signal.signal(signal.SIGTERM, lambda *_: os._exit(PREEMPTED))
  from postrain import hosts
  from postrain.compilation import use_cache

  with hosts.joined(environment=flags.distributed):
    _quiet()
    use_cache()
    for directory in flags.rows:
      run_row(directory)
    if not flags.rows:
      _serve()


def _quiet() -> None:
  from absl import logging

  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save


if __name__ == '__main__':
  main()
