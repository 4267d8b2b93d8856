"""PPO against a reward model of biased raters: gold beside proxy.

Raters like a word that the hidden reward dislikes. What they say makes a reward
model, and PPO maximises it, without KL and with a KL held at a target.
"""

import json
import pathlib
from typing import Any

from configs import base
from experiments.preferences import scores
from experiments.preferences.common import LENGTH, SCALE, run_config
from postrain.trainer import Trainer

BIAS = 13.0
TARGET = 1.0  # nats
SETTLED = 20  # iterations until the coefficient has found it
NUM_STEPS, NUM_ITERATIONS = 600, 120
FIGURES = ('reward/gold', 'reward/judge', 'reference/kl_sequence')


def proxy(path: pathlib.Path, seed: int) -> str:
  """The directory of a reward model of biased raters."""
  config = scores.config_of('bradley_terry', seed)
  config.preference.num_steps = NUM_STEPS
  config.preference.optimizer.update(
    learning_rate=3e-3, schedule='linear', warmup_steps=0, b2=0.99,
    total_steps=NUM_STEPS,
  )  # fmt: skip
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
  config.kl.reward_coef = 0.5 if held else 0.0
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
