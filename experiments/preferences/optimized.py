"""PPO against a reward model of biased raters: gold beside proxy.

Raters like a word that the hidden reward dislikes. What they say makes a reward
model, and PPO maximises it, without KL and with a KL held at a target.
"""

import json
import pathlib
from typing import Any

import numpy as np

from configs import base
from experiments.preferences import scores
from experiments.preferences.common import (
  LENGTH,
  RULE,
  SCALE,
  run_config,
  spread,
)
from postrain.trainer import Trainer

BIAS = 13.0
TARGET = 1.0  # nats
# The coefficient falls by a quarter before the KL, which begins at 0, is there.
START = 0.8
SETTLED = 20  # iterations until the coefficient has found it
NUM_STEPS, NUM_ITERATIONS = 600, 120
FIGURES = ('reward/gold', 'reward/judge', 'reference/kl_sequence')


def proxy(path: pathlib.Path, seed: int) -> str:
  """The directory of a reward model of biased raters."""
  config = scores.config_of('bradley_terry', seed)
  config.preference.num_steps = NUM_STEPS
  config.preference.optimizer.update(
    schedule='linear', b2=0.99, total_steps=NUM_STEPS
  )
  config.environment.rater = dict(scale=SCALE, feature='disliked', bias=BIAS)
  directory = path / f'proxy-{seed}'
  Trainer(config, str(directory)).run()
  return str(directory / 'export')


def config_of(directory: str, seed: int, held: bool) -> Any:
  """PPO with a critic; ``held`` by an adaptive coefficient at the target."""
  config = run_config(seed)
  config.rewards = dict(
    judge=dict(name='reward_model', directory=directory, weight=1.0),
    gold=dict(name='gold', weight=0.0),
  )
  config.advantage = dict(name='gae', discount=1.0, lambda_=0.95)
  config.whitening = dict(name='whiten')
  config.critic.network = dict(name='copied')
  config.critic.optimizer = base.adamw(learning_rate=1e-3)
  config.kl.estimator = dict(name='k1')
  config.kl.reward_coef = START if held else 0.0
  if held:
    config.kl.controller = dict(
      name='adaptive_coef', target=TARGET, horizon=2000.0
    )
  config.sampling.num_samples = 1
  config.sampling.max_new_tokens = LENGTH
  config.rl.num_iterations = NUM_ITERATIONS
  config.rl.num_prompts = 256
  config.rl.num_epochs = 2
  config.rl.num_minibatches = 2
  config.rl.share_prompts = False
  config.rl.optimizer = base.adamw(learning_rate=1e-3)
  config.checkpoint.update(every=NUM_ITERATIONS, export=False)
  return config


def study(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  found: dict[str, Any] = {'free': [], 'held': []}
  for seed in seeds:
    directory = proxy(path, seed)
    for name, curves in found.items():
      run = path / f'{name}-{seed}'
      Trainer(config_of(directory, seed, name == 'held'), str(run)).run()
      rows = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
      curves.append([[row[f] for f in FIGURES] for row in rows])
  return found


def table(found: dict[str, Any]) -> str:
  lines = ['| PPO | best gold | last gold | last proxy less first |', RULE]
  for name, runs in found.items():
    gold, proxy, _ = np.moveaxis(np.array(runs), -1, 0)  # seed, iteration
    figures = gold.max(1), gold[:, -10:].mean(1), proxy[:, -1] - proxy[:, 0]
    cells = ' | '.join(spread(x.tolist()) for x in figures)
    lines.append(f'| {name} | {cells} |')
  held = np.array(found['held'])[:, SETTLED:, 2]
  means = spread(held.mean(1).tolist())
  near = np.abs(held / TARGET - 1) < 0.2
  lines += [
    '',
    f'KL of the held runs, a target of {TARGET}: {means};'
    f' within a fifth of it in {near.mean():.0%} of iterations',
  ]
  return '\n'.join(lines)


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((8.4, 3), layout='constrained')
  for number, name in enumerate(('hidden reward', 'proxy', 'KL, nats')):
    axes = figure.add_subplot(1, 3, number + 1)
    axes.set(title=name, xlabel='iteration')
    axes.grid(alpha=0.3)
    for color, (label, runs) in enumerate(found.items()):
      for i, run in enumerate(runs):
        line = np.array(run)[:, number]
        axes.plot(line, f'C{color}', lw=0.9, label=None if i else label)
    axes.legend(fontsize='x-small')
  figure.savefig(path, dpi=80)
