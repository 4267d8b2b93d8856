"""Pairs that the policy writes, beside given ones that are far from it.

The same raters and the same number of steps; PPO maximises the
hidden reward itself.
"""

import pathlib
from typing import Any

from experiments.preferences import direct, optimized
from experiments.preferences.common import (
  SCALE,
  make_measure,
  policies,
  run_config,
)

METHODS = ('given', 'online', 'iterative', 'ppo')
# Of six words, padding and stop: the given pairs are of those who write nearly
# nothing but the word that all dislike.
FAR = (4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
ROUND = 50  # steps
NUM_ITERATIONS, EVERY = 50, 5

draw, table = direct.draw, direct.table


def config_of(method: str, seed: int) -> Any:
  config = direct.config_of('dpo', seed)
  if method == 'given':
    config.environment.writer_logits = FAR
    return config
  config.preference.update(source='raters', num_examples=None)
  if method == 'iterative':
    config.preference.reference_every = ROUND
  return config


def ppo(seed: int) -> Any:
  """PPO with its KL held, on what the raters mean by what they say."""
  config = optimized.config_of('', seed, held=True)
  config.rewards = dict(gold=dict(name='gold', weight=SCALE))
  config.rl.num_iterations = NUM_ITERATIONS
  config.checkpoint.update(every=EVERY, keep=NUM_ITERATIONS)
  return config


def study(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  measure, found = make_measure(run_config(0)), {}
  for method in METHODS:
    curves = []
    for seed in seeds:
      config = ppo(seed) if method == 'ppo' else config_of(method, seed)
      trained = policies(config, path / f'{method}-{seed}')
      curves.append([measure(p, trained[0]) for p in trained.values()])
      gold, divergence = curves[-1][-1]
      print(method, seed, f'gold {gold:.3f} KL {divergence:.2f}', flush=True)
    found[method] = curves
  return found
