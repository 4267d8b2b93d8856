"""What methods of preferences reach where the true reward is known.

  python experiments/preferences/run.py --part=direct --workdir=runs/preferences

Prints a table, and writes PART.json and, but for scores, a plot. A run that
stands in the workdir already is not run again.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.preferences import (
  direct,
  imbalanced,
  margins,
  online,
  optimized,
  rankings,
  scores,
  self_play,
)
from postrain import workdir
from postrain.compilation import use_cache

PARTS = {
  'scores': scores,
  'rankings': rankings,
  'direct': direct,
  'online': online,
  'self_play': self_play,
  'imbalanced': imbalanced,
  'margins': margins,
  'optimized': optimized,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--part', choices=PARTS, required=True)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--seeds', type=int, default=3)
  flags = parser.parse_args()
  use_cache()
  part: Any = PARTS[flags.part]
  found = part.study(flags.workdir, range(flags.seeds))
  record = {'commit': workdir.commit(), 'seeds': flags.seeds, **found}
  path = flags.workdir / f'{flags.part}.json'
  path.write_text(json.dumps(record))
  if hasattr(part, 'draw'):
    part.draw(found, path.with_suffix('.png'))
  print(part.table(found))


if __name__ == '__main__':
  main()
