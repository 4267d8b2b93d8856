"""SPIN: rounds on demonstrations alone, each against the policy before it.

Addition, whose demonstrations are certain: their KL to the policy is what the
policy pays for them, the negative log-prob.
"""

import json
import pathlib
from typing import Any

import numpy as np

from configs import base
from experiments.preferences.common import spread
from postrain.trainer import Trainer

NUM_ROUNDS, ROUND = 8, 40  # of so many steps
BATCH = 64


def config_of(seed: int) -> Any:
  config = base.get_config()
  config.seed = seed
  config.environment = dict(
    name='task', task=dict(name='arithmetic', num_digits=1)
  )
  config.rewards = dict(exact=dict(name='exact', weight=1.0))
  config.model = dict(
    name='transformer', num_layers=2, model_dim=32, mlp_dim=64, num_heads=2,
    num_kv_heads=2, head_dim=16, max_length=8,
  )  # fmt: skip
  config.sampling.max_new_tokens = 3
  config.sft.update(num_steps=60, batch_size=BATCH)
  config.sft.optimizer.learning_rate = 3e-3
  config.preference.update(
    num_steps=NUM_ROUNDS * ROUND, batch_size=BATCH, source='self_play',
    reference_every=ROUND,
  )  # fmt: skip
  # With β = 1 the least loss is where the policy is the data, whatever the
  # reference; with less a round goes beyond it, and loses what it had.
  config.preference.loss = dict(name='dpo', beta=1.0)
  config.preference.optimizer.learning_rate = 1e-3
  config.evaluation.grader = 'exact'
  config.checkpoint.update(every=NUM_ROUNDS * ROUND, export=False)
  return config


FIGURES = ('preference/chosen_logprob', 'loss', 'preference/margin')


def study(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  found: dict[str, Any] = {'rounds': []}
  for seed in seeds:
    directory, config = path / f'spin-{seed}', config_of(seed)
    Trainer(config, str(directory)).run()
    lines = (directory / 'metrics.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines][config.sft.num_steps :]
    told = [[row[f] for f in FIGURES] for row in rows]
    found['rounds'].append(told)
    print(seed, told[0], told[-1], flush=True)
  return found


def table(found: dict[str, Any]) -> str:
  told = np.array(found['rounds']).reshape(-1, NUM_ROUNDS, ROUND, len(FIGURES))
  lines = [
    '| round | KL from the data | first loss | last loss | last margin |'
  ]
  lines.append('|' + ' --- |' * 5)
  for number in range(NUM_ROUNDS):
    chosen, loss, margin = np.moveaxis(told[:, number], -1, 0)
    cells = (
      spread((-chosen[:, :10].mean(1)).tolist()),
      spread(loss[:, 0].tolist()),
      spread(loss[:, -10:].mean(1).tolist()),
      spread(margin[:, -10:].mean(1).tolist()),
    )
    lines.append(f'| {number + 1} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((8.4, 2.8), layout='constrained')
  names = ('KL from the data, nats', 'loss', 'margin')
  for number, name in enumerate(names):
    axes = figure.add_subplot(1, 3, number + 1)
    axes.set(title=name, xlabel='step')
    axes.grid(alpha=0.3)
    for start in range(0, NUM_ROUNDS * ROUND, ROUND):
      axes.axvline(start, color='k', lw=0.5, ls=':')
    for run in found['rounds']:
      line = np.array(run)[:, number] * (1 if number else -1)
      axes.plot(line, lw=0.8)
  figure.savefig(path, dpi=80)
