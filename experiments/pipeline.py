"""Run the stages of a pipeline; the same command again continues it.

  python experiments/pipeline.py --pipeline=configs/pipeline_sort.py \\
    --workdir=runs/pipeline [--dry_run]

The file has a function get_pipeline() -> {name: config}, in order; see
docs/pipelines.md.
"""

import argparse
import os
import runpy
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))

from postrain import pipeline
from postrain.compilation import use_cache


def stages(path: str) -> list[pipeline.Stage]:
  """The stages that a file describes.

  Raises:
    ValueError: there is no such file, or it has no get_pipeline().
  """
  if not os.path.isfile(path):
    raise ValueError(f'--pipeline={path}: there is no such file')
  make = runpy.run_path(path).get('get_pipeline')
  if make is None:
    raise ValueError(
      f'--pipeline={path}: it has no function get_pipeline() -> name: config'
    )
  return [pipeline.Stage(*item) for item in make().items()]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pipeline', required=True, help='a Python file')
  parser.add_argument('--workdir', required=True)
  parser.add_argument(
    '--dry_run', action='store_true', help='say where stages will stand'
  )
  flags = parser.parse_args()
  use_cache()
  try:
    found = stages(flags.pipeline)
    does = pipeline.plan if flags.dry_run else pipeline.run
    for stage in does(found, flags.workdir):
      print(f'{stage.name:20} {stage.directory}')
  except ValueError as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
  main()
