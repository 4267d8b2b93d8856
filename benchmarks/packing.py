"""Packed rows beside padded ones, for sequences that end early.

  python benchmarks/packing.py --shape=small --prompts=4

A random model of `benchmarks/shapes.py`, float32. Demonstrations are geometric
in length with a mean of a quarter of the limit, as are completions, behind
prompts that are full. A supervised step, then the scores and the update of a
rollout: padded, padded with each prompt read once for its group
(`rl.share_prompts`), and packed, the packing on the host included. All sides
give the same parameters before they are timed. One thread, process CPU seconds,
sides in turn, least of the rounds.
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

from benchmarks import timing
from benchmarks.shapes import EOS, PAD, SHAPES, Shape
from configs import base
from postrain.algorithm import make_algorithm
from postrain.models.config import Config
from postrain.models.transformer import transformer
from postrain.packing import make_layout, real_tokens
from postrain.recipe import make_recipe
from postrain.train_step import finish
from postrain.types import Samples, TrainState


def lengths(limit: int, num: int) -> np.ndarray:
  """Geometric with a mean of a quarter of the limit, and cut by it."""
  drawn = np.random.default_rng(0).geometric(4 / limit, num)
  return np.minimum(drawn, limit)


def algorithm(shape: Shape, model: Any, slices: int, shares: bool) -> Any:
  """The functions of a run."""
  config = base.get_config()
  config.environment = config.model = dict(name='none')
  config.rewards = dict(any=dict(name='any', weight=1.0))
  config.evaluation.grader = 'any'
  config.sampling.update(
    num_samples=shape.num_samples, max_new_tokens=shape.completion_length
  )
  config.sft.update(batch_size=shape.num_rows, num_micro_batches=slices)
  config.rl.update(
    num_prompts=shape.num_prompts, num_iterations=1, share_prompts=shares,
    num_micro_batches=slices, num_score_slices=slices,
  )  # fmt: skip
  sgd = dict(name='sgd', learning_rate=0.1)  # Adam would enlarge rounding
  config.sft.optimizer = config.rl.optimizer = sgd
  recipe = make_recipe(config)
  return make_algorithm(recipe, model, pad_id=PAD, stop_ids=(EOS,))


class Sides:
  """Steps of no arguments, from the same state, on the same sequences."""

  def __init__(self, shape: Shape, slices: int, row_length: int | None):
    self.model = transformer(Config(**shape.model()))
    params = {'actor': jax.jit(self.model.init)(jax.random.key(0))}
    self.make = functools.partial(algorithm, shape, self.model, slices)
    optimizer = self.make(False).sft_optimizer
    self.state = TrainState(jnp.int32(0), params, optimizer.init(params))
    length = shape.prompt_length + shape.completion_length
    draw = np.random.default_rng(1)
    size = (shape.num_rows, length)
    self.tokens = draw.integers(2, shape.vocab_size, size, dtype=np.int32)
    slots = np.arange(length)
    self.valid = slots < lengths(length, shape.num_rows)[:, None]
    self.prompts = self.tokens[:: shape.num_samples, : shape.prompt_length]
    limit = shape.completion_length
    mask = np.arange(limit) < lengths(limit, shape.num_rows)[:, None]
    noise = np.zeros((shape.num_rows, limit), np.float32)
    completions = self.tokens[:, -limit:]
    self.samples = Samples(completions, mask, noise, noise, ~mask[:, 0])
    groups = (shape.num_prompts, shape.num_samples)
    self.rewards = np.float32(draw.normal(size=groups))
    self.layout = make_layout(
      shape.num_rows, length, row_length or length, num_slices=slices
    )

  def supervised(self, packs: bool) -> Any:
    """A supervised step."""
    imitate = self.make(False).imitate
    run = jax.jit(self.layout.reading(imitate) if packs else imitate)

    def step() -> Any:
      packing = self.layout.pack(self.valid) if packs else None
      trained = self.valid & (np.arange(self.valid.shape[1]) > 0)
      return run(self.state, self.tokens, self.valid, trained, packing)

    return step

  def reinforced(self, packs: bool, shares: bool = False) -> Any:
    """Scores and one update of a rollout."""
    functions = self.make(shares)

    def whole(state: Any, packing: Any) -> Any:
      mask = jnp.ones(self.prompts.shape, bool)
      batch, scored, _ = functions.prepare(
        state.params, None, self.prompts, mask, self.samples, self.rewards, {},
        packing,
      )  # fmt: skip
      rows, key = jnp.arange(len(self.tokens)), jax.random.key(0)
      state, figures = functions.update(
        state, batch, rows, key, packing=packing
      )
      return state, {**scored, **figures}

    run = jax.jit(self.layout.reading(whole) if packs else whole)

    def step() -> Any:
      mask = np.ones(self.prompts.shape, bool)
      real = real_tokens(mask, self.samples)
      return run(self.state, self.layout.pack(real) if packs else None)

    return step


def agree(sides: dict[str, Any]) -> float:
  """Refuse sides with other parameters; the fill of the packed one."""
  found = {name: run() for name, run in sides.items()}
  wanted, _ = found['padded']
  for name, (state, _) in found.items():
    apart = jax.tree.map(
      lambda x, y: float(jnp.abs(x - y).max()), state.params, wanted.params
    )
    if (largest := max(jax.tree.leaves(apart))) > 2e-5:
      raise ValueError(f'{name}: parameters {largest:.1e} from the padded ones')
  return finish(found['packed'][1])['update/fill']


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', choices=SHAPES, default='tiny')
  parser.add_argument('--prompts', type=int, default=8)
  parser.add_argument('--slices', type=int, default=1)
  parser.add_argument('--row_length', type=int)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  timing.one_thread()
  given = {**vars(SHAPES[args.shape]), 'num_prompts': args.prompts}
  made = Sides(Shape(**given), args.slices, args.row_length)
  steps = {
    'supervised step': {
      'padded': made.supervised(packs=False),
      'packed': made.supervised(packs=True),
    },
    'scores and update': {
      'padded': made.reinforced(packs=False),
      'padded, shared prompts': made.reinforced(packs=False, shares=True),
      'packed': made.reinforced(packs=True),
    },
  }
  print('| step | side | CPU s | times packed | fill |')
  print('| --- | --- | --- | --- | --- |')
  for step, sides in steps.items():
    fill = agree(sides)
    seconds = timing.least(sides, args.rounds)
    for side, taken in seconds.items():
      share = f'{fill:.2f}' if side == 'packed' else ''
      ratio = taken / seconds['packed']
      print(f'| {step} | {side} | {taken:.3f} | {ratio:.2f} | {share} |')


if __name__ == '__main__':
  main()
