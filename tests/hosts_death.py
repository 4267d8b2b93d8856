"""One of two processes that talk until one dies, started by test_hosts.py.

python tests/hosts_death.py PORT PROCESS_ID HEARTBEAT_SECONDS WHO_DIES
"""

import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax

from postrain import hosts


def main() -> None:
  port, index, heartbeat, dying = sys.argv[1:]
  with hosts.joined(
    coordinator=f'localhost:{port}', num_processes=2, process_id=int(index),
    heartbeat_seconds=int(heartbeat),
  ):  # fmt: skip
    for number in range(1_000_000):
      hosts.exchanged(number)
      if number == 3 and jax.process_index() == int(dying):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == '__main__':
  main()
