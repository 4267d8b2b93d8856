"""Run a sweep; the same command again runs what is not finished.

  python experiments/sweep.py SWEEP.py --backend=local --workdir=runs/sweep

The file has get_config(), the base, and get_sweep(), which yields rows, or
get_search(); SLURM or XPK, a dict, for those backends. See docs/ablations.md.
"""

import argparse
from collections.abc import Iterator
import contextlib
import os
import runpy
import shlex
import subprocess
import sys
import traceback
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))

import jax

from postrain import sweeps
from postrain.sweeps import jobs, local, searching

Planned = sweeps.Planned


def load(path: str) -> dict[str, Any]:
  """The names that a sweep file defines.

  Raises:
    ValueError: there is no such file, it cannot be read, or a function is
      missing.
  """
  if not os.path.isfile(path):
    raise ValueError(f'{path}: there is no such file')
  with reading(path):
    found = runpy.run_path(path)
  rows = 'get_search' if 'get_search' in found else 'get_sweep'
  for name in ('get_config', rows):
    if not callable(found.get(name)):
      raise ValueError(
        f'{path} has no function {name}(): see docs/ablations.md'
      )
  return found


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
  """Say where in a sweep file something went wrong."""
  try:
    yield
  except ValueError:  # says what is wrong by itself
    raise
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    line = f', line {lines[-1]}' if lines else ''
    raise ValueError(
      f'{path}{line}: {type(error).__name__}: {error}: mend it there'
    ) from error


def main() -> None:
  flags = parse()
  try:
    sys.exit(run(flags))
  except ValueError as error:
    sys.exit(f'error: {" ".join(str(error).split())}')
  except KeyboardInterrupt:
    sys.exit('interrupted; the same command continues')


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('sweep', help='a Python file')
  parser.add_argument('--workdir', required=True)
  parser.add_argument(
    '--backend', choices=('local', 'slurm', 'xpk'), default='local'
  )
  parser.add_argument(
    '--dry-run', action='store_true', help='say what would be done, do nothing'
  )
  parser.add_argument(
    '--workers', type=int, default=1, help='processes of the local backend'
  )
  parser.add_argument(
    '--retries', type=int, default=2, help='of a row that fails'
  )
  return parser.parse_args()


def run(flags: argparse.Namespace) -> int:
  """Run or submit what is not finished; the status of the process."""
  jax.config.update('jax_platforms', 'cpu')  # accelerators are for the workers
  if flags.retries < 0:
    raise ValueError(f'retries={flags.retries}: give at least 0')
  found, root = load(flags.sweep), os.path.abspath(flags.workdir)
  if 'get_search' in found:
    return search(flags, found, root)
  with reading(flags.sweep):
    base, rows = found['get_config'](), found['get_sweep']()
    rows = [*rows] if isinstance(rows, Iterator) else rows
  rows = sweeps.plan(base, rows, root, assemble=flags.backend != 'xpk')
  if flags.backend != 'local':
    return submit(flags, found, rows, root)
  if flags.dry_run:
    for planned in rows:
      state = 'finished' if planned.finished else 'to run'
      print(f'{planned.directory}  {state}  {planned.row.name}')
    return 0
  local.core_shares(flags.workers)
  with sweeps.claim(rows, root):
    failed = local.run(
      rows, num_workers=flags.workers, num_retries=flags.retries
    )
  print(f'{len(rows) - len(failed)} of {len(rows)} rows finished: {root}')
  for planned in failed:
    print(f'failed: {planned.row.name}: {planned.directory}')
  return bool(failed)


def search(flags: argparse.Namespace, found: dict[str, Any], root: str) -> int:
  """Run rows one after another, as a study draws them."""
  if flags.backend != 'local' or flags.workers != 1 or flags.dry_run:
    raise ValueError(
      f'{flags.sweep} has get_search(), whose rows wait for one another: take'
      ' --backend=local, --workers=1 and no --dry-run'
    )
  with reading(flags.sweep):
    base, choices = found['get_config'](), found['get_search']()

  def run_last(rows: list[Planned]) -> list[Planned]:
    with sweeps.claim(rows, root):
      return local.run(rows[-1:], num_workers=1, num_retries=flags.retries)

  trials = searching.search(base, choices, root, run_last)
  best = searching.best(trials, choices)
  if best is None:
    print(f'all {len(trials)} rows failed: {root}')
    return 1
  print(f'best {choices.figure} {best.value:.4g}: {best.planned.row.name}')
  return 0


def submit(
  flags: argparse.Namespace, found: dict[str, Any], rows: list[Planned],
  root: str,
) -> int:  # fmt: skip
  """Write the job file and hand it over, or print both."""
  name = flags.backend.upper()
  rest = [planned for planned in rows if not planned.finished]
  if not rest:
    print(f'all {len(rows)} rows are finished: {root}')
    return 0
  path = os.path.join(root, f'{flags.backend}.sh')
  if flags.backend == 'slurm':
    choices = jobs.settings(jobs.Slurm, found.get(name), name)
    directories = [planned.directory for planned in rest]
    script = jobs.slurm(directories, choices, num_retries=flags.retries)
    logs = os.path.join(root.replace('%', '%%'), 'slurm-%A_%a.log')
    command = ['sbatch', f'--output={logs}', path]
  else:
    choices = jobs.settings(jobs.Xpk, found.get(name), name)
    directories = [
      f'{choices.workdir}/rows/{os.path.basename(planned.directory)}'
      for planned in rest
    ]
    script = jobs.xpk(directories, choices, num_retries=flags.retries)
    command = ['bash', path]
  if flags.dry_run:
    print(f'{script}\n# {shlex.join(command)}')
    return 0
  with sweeps.claim(rows, root), open(path, 'w') as f:
    f.write(script)
  try:
    return subprocess.run(command).returncode
  except FileNotFoundError as error:
    raise ValueError(
      f'{command[0]} is not on this machine: run this where it is, or take'
      ' --dry-run or --backend=local'
    ) from error


if __name__ == '__main__':
  main()
