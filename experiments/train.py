"""Run a config in a workdir; the same command again continues it.

  python experiments/train.py --config=configs/quickstart.py \\
    --workdir=runs/quickstart [--config.seed=1 ...]
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))

from absl import app, flags, logging
from ml_collections import config_flags

from postrain import hosts
from postrain.compilation import use_cache
from postrain.trainer import Trainer

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe.', allow_overwrite=False
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run lives.', allow_overwrite=False
)
CACHE = flags.DEFINE_bool(
  'compilation_cache', True, 'Keep what is compiled for the next start.'
)
DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'One of several processes; the environment says which.'
)
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of the first of several processes.'
)
NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many.')
PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which one, from 0.')
HEARTBEAT = flags.DEFINE_integer(
  'heartbeat_seconds', 100, 'Silence after which a process is taken for dead.'
)
CONNECT = flags.DEFINE_integer(
  'connect_seconds', 300, 'How long to wait for the other processes.'
)
TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where errors rise.')
flags.mark_flags_as_required(['config', 'workdir'])


def parse(argv: list[str]) -> list[str]:
  """Parse the flags; a mistake in them is one line."""
  try:
    rest = FLAGS(argv)
    CONFIG.value.keys()  # where a file that could not be loaded says so
    return rest
  except (flags.Error, AttributeError, LookupError, OSError, TypeError,
          ValueError) as error:  # fmt: skip
    sys.exit(one_line(error))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f'error: arguments that are no flags: {" ".join(argv[1:])}')
  if CACHE.value:
    use_cache()
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
  overrides = config_flags.get_override_values(FLAGS['config'])
  try:
    with hosts.joined(
      environment=DISTRIBUTED.value,
      coordinator=COORDINATOR.value,
      num_processes=NUM_PROCESSES.value,
      process_id=PROCESS_ID.value,
      heartbeat_seconds=HEARTBEAT.value,
      connect_seconds=CONNECT.value,
    ):
      Trainer(CONFIG.value, WORKDIR.value, overrides).run()
  except ValueError as error:
    if TRACEBACK.value:
      raise
    sys.exit(one_line(error))


def one_line(error: Exception) -> str:
  """What went wrong, for people: messages of libraries may have many lines."""
  return f'error: {" ".join(str(error).split())}'


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
