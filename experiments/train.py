"""Run a config in a workdir; the same command again continues it.

  python experiments/train.py --config=configs/quickstart.py \\
    --workdir=runs/quickstart [--config.seed=1 ...]
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))

from absl import app, flags, logging
from ml_collections import config_flags

from postrain.trainer import Trainer

CONFIG = config_flags.DEFINE_config_file('config', None, 'The recipe.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run lives.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    sys.exit(f'error: arguments that are no flags: {" ".join(argv[1:])}')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
  overrides = config_flags.get_override_values(FLAGS['config'])
  try:
    trainer = Trainer(CONFIG.value, WORKDIR.value, overrides)
  except ValueError as error:
    sys.exit(f'error: {error}')
  trainer.run()


FLAGS = flags.FLAGS

if __name__ == '__main__':
  app.run(main)
