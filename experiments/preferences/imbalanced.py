"""KTO with one desirable completion in ten, with and without weights.

The paper asks for desirable_weight·n_desirable / (undesirable_weight·
n_undesirable) in [1, 4/3]; the names of the rows are this ratio.
"""

import pathlib
from typing import Any

from experiments.preferences import direct
from experiments.preferences.common import make_measure, policies, run_config

SHARE = 0.1
WEIGHTS = {'1/9': 1.0, '4/3': 12.0}

draw, table = direct.draw, direct.table


def config_of(weight: float, seed: int) -> Any:
  config = direct.config_of('kto', seed)
  config.environment.rater['share'] = SHARE
  config.preference.loss['desirable_weight'] = weight
  return config


def study(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  measure, found = make_measure(run_config(0)), {}
  for name, weight in WEIGHTS.items():
    found[name] = []
    for seed in seeds:
      directory = path / f'kto-weight{weight:g}-{seed}'
      trained = policies(config_of(weight, seed), directory)
      curve = [measure(p, trained[0]) for p in trained.values()]
      found[name].append(curve)
      print(name, seed, f'gold {curve[-1][0]:.3f}', flush=True)
  return found
