"""The toy sort configs over many seeds, in one vmapped call.

  python experiments/sort/run.py --name=sort_reproduction --seeds=5

Prints the reward of every seed along the run, and the exact sorts at its end,
among samples and by greedy decoding. What the one call saves is measured by
``benchmarks/device_loop.py``.
"""

import argparse
import importlib
import os
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))

import jax
import jax.numpy as jnp
import numpy as np

from postrain import actors, device_loop, environments
from postrain.binding import bind
from postrain.evaluator import Evaluator
from postrain.recipe import make_recipe


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--name', default='sort_reproduction')
  parser.add_argument('--seeds', type=int, default=5)
  flags = parser.parse_args()
  config = importlib.import_module(f'configs.{flags.name}').get_config()
  runs = device_loop.make(config)
  seeds = jnp.arange(flags.seeds)
  params, figures = jax.block_until_ready(runs(seeds))
  rewards = np.asarray(figures['reward'])
  shown = [*range(0, rewards.shape[1], 20), rewards.shape[1] - 1]
  print(f'{flags.name}: mean sampled reward at iterations {shown}')
  for seed, row in enumerate(rewards):
    print(f'  seed {seed}: ' + ' '.join(f'{row[i]:.3f}' for i in shown))
  exact = np.asarray(figures['reward/exact'])[:, -1]
  print(f'finals: mean {rewards[:, -1].mean():.3f}', end=', ')
  print(f'least {rewards[:, -1].min():.3f}, most {rewards[:, -1].max():.3f}')
  print(f'exact sorts among the last samples: mean {exact.mean():.3f}')
  greedy = greedy_exact(config, params, flags.seeds)
  print(f'exact sorts by greedy decoding: mean {greedy.mean():.3f}', end=', ')
  print(f'least {greedy.min():.3f}')


def greedy_exact(
  config: Any, params: dict[str, Any], num_seeds: int
) -> np.ndarray:
  """Share of held-out prompts that each seed's policy sorts greedily."""
  config = config.copy_and_resolve_references()
  config.evaluation.update(grader='exact', num_prompts=1024, batch_size=1024)
  recipe = make_recipe(config)
  environment = bind(environments, recipe.environment)(
    recipe.seed, recipe.rewards
  )
  model = bind(actors, recipe.model)(environment).model
  evaluate = Evaluator(recipe, model, environment)
  figures = [
    evaluate(jax.tree.map(lambda x, i=i: x[i], params))
    for i in range(num_seeds)
  ]
  return np.array([each['eval/greedy'] for each in figures])


if __name__ == '__main__':
  main()
