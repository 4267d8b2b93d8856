"""The loop inside one jit beside a loop in PyTorch, and many seeds as one.

  python benchmarks/device_loop.py

`configs/sort_reproduction.py`: 128 prompts of 8 samples, 4 epochs of the whole,
a policy of width 4. First a loop of one seed beside `benchmarks/torch_sort.py`,
the same algorithm and optimiser, eager and, where a C++ compiler works,
compiled; before, both learn from the same samples and must agree in parameters
to 1e-4. Then one call of many seeds beside as many of one seed. Nothing
compiles while it is timed. Times are CPU seconds on one thread, the least of
the turns that the sides take.
"""

import argparse
import functools
import os
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import least, one_thread
from configs import sort_reproduction
from postrain import device_loop
from postrain.algorithm import make_algorithm
from postrain.keys import run_key
from postrain.recipe import make_recipe, plain
from postrain.tasks.sort import inclusion_ordering, toy_policy
from postrain.types import TrainState


def agree(config: Any, loop: Any) -> float:
  """The gap in parameters after an iteration on the same samples."""
  import torch

  recipe = make_recipe(plain(config))
  model = toy_policy(embed_dim=config.model.embed_dim)
  algorithm = make_algorithm(recipe, model, pad_id=0, stop_ids=())
  params = {'actor': model.init(run_key(0, 'init'))}
  prompts = jax.random.randint(jax.random.key(1), (128, 4), 0, 10)
  known = jnp.ones(prompts.shape, bool)

  def iteration(params: Any) -> Any:
    samples = algorithm.sample(params, prompts, known, jax.random.key(2), None)
    repeated = jnp.repeat(prompts, recipe.sampling.num_samples, axis=0)
    rewards = inclusion_ordering(repeated, samples.tokens, samples.mask)
    batch, _, _ = algorithm.prepare(
      params, params['actor'], prompts, known, samples,
      rewards.reshape(len(prompts), -1), {},
    )  # fmt: skip
    state = TrainState(
      jnp.int32(0), params, algorithm.rl_optimizer.init(params), None
    )
    for _ in range(recipe.rl.num_epochs):
      state, _ = algorithm.update(state, batch, None, jax.random.key(0))
    return state.params['actor'], samples.tokens, rewards.mean()

  found, tokens, reward = jax.jit(iteration)(params)
  loop.start(jax.tree.map(np.asarray, params['actor']))
  theirs = loop.learn(*(torch.tensor(np.int64(x)) for x in (prompts, tokens)))
  gaps = [
    float(abs(np.asarray(found[k]) - v.detach().numpy()).max())
    for k, v in loop.params.items()
  ]
  return max(*gaps, abs(float(theirs) - float(reward)))


def torch_sides(config: Any) -> dict[str, Any]:
  """Loops that start anew at each call."""
  try:
    import torch
  except ImportError:
    print('PyTorch is not installed: its sides are left out')
    return {}
  from benchmarks.torch_sort import Loop

  torch.set_num_threads(1)
  params = toy_policy(embed_dim=4).init(run_key(0, 'init'))
  params = jax.tree.map(np.asarray, params)

  def run(loop: Loop) -> list[float]:
    loop.start(params)
    return loop.run(config.rl.num_iterations)

  sides = {}
  for how in ('eager', 'compiled'):
    try:
      loop = Loop(config, how)
      gap = agree(config, loop)
    except (RuntimeError, ImportError) as error:  # no compiler, say
      print(f'torch {how} does not work here: {type(error).__name__}')
      continue
    if not gap <= 1e-4:
      raise ValueError(f'torch {how} ends {gap} from here')
    sides[f'torch {how}'] = functools.partial(run, loop)
  return sides


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--iterations', type=int, default=200)
  parser.add_argument('--seeds', type=int, default=32)
  flags = parser.parse_args()
  one_thread()
  config = sort_reproduction.get_config()
  config.rl.num_iterations = flags.iterations
  runs = device_loop.make(config)
  one = jnp.arange(1)
  sides = {'one jit': lambda: runs(one), **torch_sides(config)}
  times = least(sides, flags.rounds)
  base = times['one jit']
  for name, taken in times.items():
    print(f'{name}: x {taken / base:.2f}', flush=True)
  if flags.seeds > 1:
    seeds = jnp.arange(flags.seeds)
    times = least(
      {
        'together': lambda: runs(seeds),
        'apart': lambda: [runs(seeds[i : i + 1]) for i in range(flags.seeds)],
      },
      max(flags.rounds - 1, 1),
    )
    ratio = times['apart'] / times['together']
    print(f'{flags.seeds} seeds in one call: x {ratio:.2f} of one by one')


if __name__ == '__main__':
  main()
