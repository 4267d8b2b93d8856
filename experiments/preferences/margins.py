"""Margins of DPO and IPO where raters never err: one diverges, one converges.

All of a few pairs at every step, by gold alone; the margin is that of
log-ratios, whose target is 1 / 2β in IPO.
"""

import json
import math
import pathlib
from typing import Any

import numpy as np

from experiments.preferences.common import run_config, spread
from postrain.trainer import Trainer

METHODS, BETA = ('dpo', 'ipo'), 0.1
NUM_STEPS, NUM_PAIRS = 800, 24
AT = (50, 100, 200, 400, 800)


def config_of(method: str, seed: int) -> Any:
  config = run_config(seed)
  config.environment.rater = dict(scale=math.inf, tie_width=0.0)
  config.preference.update(
    num_steps=NUM_STEPS, batch_size=NUM_PAIRS, num_examples=NUM_PAIRS
  )
  config.preference.loss = dict(name=method, beta=BETA)
  config.checkpoint.update(every=NUM_STEPS, export=False)
  return config


def study(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for method in METHODS:
    found[method] = []
    for seed in seeds:
      directory = path / f'margins-{method}-{seed}'
      Trainer(config_of(method, seed), str(directory)).run()
      rows = (directory / 'metrics.jsonl').read_text().splitlines()[:NUM_STEPS]
      told = [json.loads(row)['preference/margin'] / BETA for row in rows]
      found[method].append(told)
      print(method, seed, f'margin {told[-1]:.3f}', flush=True)
  return found


def table(found: dict[str, Any]) -> str:
  lines = ['| margin after | ' + ' | '.join(map(str, AT)) + ' steps |']
  lines.append('|' + ' --- |' * (len(AT) + 1))
  for method, runs in found.items():
    after = np.array(runs)[:, [step - 1 for step in AT]].T
    cells = ' | '.join(spread(row.tolist()) for row in after)
    lines.append(f'| `{method}` | {cells} |')
  return '\n'.join(lines)


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((5.6, 3.2), layout='constrained')
  axes = figure.subplots()
  axes.set(xlabel='step', ylabel='margin of log-ratios', xscale='log')
  axes.set(yscale='symlog')
  axes.axhline(1 / (2 * BETA), color='k', lw=0.7, ls=':', label='1 / 2β')
  axes.grid(alpha=0.3)
  for number, (method, runs) in enumerate(found.items()):
    for i, run in enumerate(runs):
      steps = np.arange(1, len(run) + 1)
      label = None if i else method
      axes.plot(steps, run, f'C{number}', lw=0.9, label=label)
  axes.legend(fontsize='x-small')
  figure.savefig(path, dpi=80)
