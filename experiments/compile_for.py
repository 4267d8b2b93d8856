"""Compile a config for devices that are not here, and weigh it.

  python experiments/compile_for.py --topology=v5p:4x4x4 \\
    --config=configs/scaling.py:qwen2.5-7b [--config.mesh.tensor=4 ...] \\
    [--programs=update,prepare] [--out=report.json]

A topology is a TPU's (``v5e:4x4``, ``v5p:4x4x8``, ``v6e:8x8``), which needs its
compiler, ``pip install 'postrain[tpu]'``, and no TPU; or ``cpu:8``. Nothing is
run: memory is what the compiler planned, traffic what stands in its programs.
"""

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'

from absl import app, flags
from ml_collections import config_flags

from postrain.topologies import devices_of, report


def main(argv: list[str]) -> None:
  del argv
  given = flags.FLAGS
  try:
    devices = devices_of(given.topology, given.slices)
    found = report(given.config, devices, given.programs)
  except ValueError as error:
    sys.exit(f'error: {" ".join(str(error).split())}')
  found = {'topology': given.topology, 'slices': given.slices, **found}
  if given.out:
    with open(given.out, 'w') as file:
      json.dump(found, file, indent=1)
  if not all(each['fits'] for each in found['programs'].values()):
    sys.exit('does not fit')


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'The recipe.')
  flags.DEFINE_string('topology', None, 'Chips, and how they lie.')
  flags.DEFINE_integer('slices', 1, 'Such topologies, over a network.')
  flags.DEFINE_list('programs', [], 'Those to compile; all if none.')
  flags.DEFINE_string('out', None, 'A JSON file of the figures.')
  flags.mark_flags_as_required(['config', 'topology'])
  app.run(main)
