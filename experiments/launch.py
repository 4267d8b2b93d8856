"""Run a program as several processes of this machine.

  python experiments/launch.py --num_processes=2 --devices=4 -- \\
    experiments/train.py --config=configs/quickstart.py --config.mesh.data=8 \\
    --workdir=runs/quickstart

Each process has so many virtual devices of the CPU, and gets the flags that
`experiments/train.py` takes: --coordinator, --num_processes, --process_id.
Where one ends with an error the others are ended, and its exit status is that
of this program; a SIGTERM is passed on to all.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

POLL = 0.05


def start(program: list[str], num_processes: int, devices: int) -> list:
  """Start the processes, numbered from 0."""
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
  }
  return [
    subprocess.Popen(
      [
        sys.executable, *program, f'--coordinator=localhost:{port}',
        f'--num_processes={num_processes}', f'--process_id={number}',
      ],
      env=environment,
    )
    for number in range(num_processes)
  ]  # fmt: skip


def watch(processes: list[subprocess.Popen], patience: float) -> int:
  """Wait for all; the status of the first that failed, which ends the rest.

  Args:
    processes: what to wait for.
    patience: seconds that the rest have to say why they end.
  """
  while True:
    statuses = [process.poll() for process in processes]
    if all(status == 0 for status in statuses):
      return 0
    if any(statuses):
      break
    time.sleep(POLL)
  number = next(i for i, status in enumerate(statuses) if status)
  last = time.monotonic() + patience
  while None in [p.poll() for p in processes] and time.monotonic() < last:
    time.sleep(POLL)
  for process in processes:
    process.kill()
    process.wait()
  status = statuses[number]
  print(f'process {number} ended with {status}', file=sys.stderr)
  return status if status > 0 else 128 - status


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--num_processes', type=int, default=2)
  parser.add_argument('--devices', type=int, default=1, help='of each process')
  parser.add_argument(
    '--patience', type=float, default=10.0,
    help='seconds for the others to end by themselves',
  )  # fmt: skip
  parser.add_argument('program', nargs='+', help='after --, with its flags')
  arguments = parser.parse_args()
  for name in ('num_processes', 'devices'):
    if getattr(arguments, name) < 1:
      parser.error(f'--{name} must be at least 1')
  processes = start(
    arguments.program, arguments.num_processes, arguments.devices
  )

  def pass_on(number: int, frame: object) -> None:
    del frame
    for process in processes:
      process.send_signal(number)

  signal.signal(signal.SIGTERM, pass_on)
  sys.exit(watch(processes, arguments.patience))


if __name__ == '__main__':
  main()
