"""Does replaying the sampler's experts close the gap to a sampler that errs?

  python experiments/routing/run.py --workdir=runs/routing

Prints both tables of the README, writes results.json and gap.png. One-digit
addition by a mixture of experts (`postrain.tasks.mixture`).
"""

import argparse
import functools
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from postrain import tasks
from postrain.algorithm import Algorithm, make_algorithm
from postrain.batches import minibatch_rows
from postrain.keys import minibatch_key, prompt_keys, run_key
from postrain.recipe import make_recipe
from postrain.tasks.mixture import mixture_policy, with_router_noise
from postrain.train_step import merge, value
from postrain.types import Model, TrainState

REPLAYS = (None, 'old', 'sampler')
NAMES = {None: 'none', 'old': 'R2, old pass', 'sampler': 'R3, sampler'}
SCALES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
NUM_MINIBATCHES = (1, 8)
NUM_PROMPTS, NUM_SAMPLES = 32, 8
HIDDEN = ('noise', 'curve')  # in the files alone
NOISE = 0.1  # of the sampler in training
TASK = tasks.arithmetic(num_digits=1)


class Setting(NamedTuple):
  """The functions of a run, and its model."""

  algorithm: Algorithm
  model: Model
  num_minibatches: int


def make_setting(replay: str | None, num_minibatches: int = 1) -> Setting:
  """Bind a recipe with this replay and so many updates a rollout."""
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='arithmetic', num_digits=1)
  )
  config.model = dict(name='mixture')
  config.rewards = dict(exact=dict(name='exact', weight=1.0))
  config.routing = dict(
    record=True, replay=replay, balance_coef=0.01, balance_over='minibatch'
  )
  config.sampling.num_samples = NUM_SAMPLES
  config.sampling.max_new_tokens = TASK.completion_length
  config.rl.num_iterations = 1
  config.rl.num_prompts = NUM_PROMPTS
  config.rl.num_minibatches = num_minibatches
  config.rl.optimizer = base.adamw(learning_rate=1e-3)
  config.sft.optimizer = base.adamw(learning_rate=4e-3)
  config.evaluation.grader = 'exact'
  recipe = make_recipe(config)
  model = mixture_policy(
    vocab_size=TASK.vocab_size,
    max_length=TASK.prompt_length + TASK.completion_length,
  )
  algorithm = make_algorithm(
    recipe, model, pad_id=TASK.pad_id, stop_ids=TASK.stop_ids
  )
  return Setting(algorithm, model, num_minibatches)


def draw_prompts(key: Any, number: int) -> tuple[Any, Any]:
  return jax.vmap(TASK.prompt)(prompt_keys(key, jnp.arange(number)))


def warm_up(setting: Setting, seed: Any, num_steps: int) -> Any:
  """Parameters after supervised steps."""
  algorithm = setting.algorithm
  params = {'actor': setting.model.init(run_key(seed, 'init'))}
  state = TrainState(jnp.int32(0), params, algorithm.sft_optimizer.init(params))

  def step(state: TrainState, number: Any) -> tuple[TrainState, None]:
    key = run_key(seed, 'demonstrations', number)
    prompts, mask = draw_prompts(key, 64)
    tokens, ends = TASK.solution(prompts) if TASK.solution else (prompts, mask)
    state, _ = algorithm.imitate(
      state,
      jnp.concatenate([prompts, tokens], axis=1),
      jnp.concatenate([mask, ends], axis=1),
      jnp.pad(ends, ((0, 0), (prompts.shape[1], 0))),
    )
    return state, None

  return jax.lax.scan(step, state, jnp.arange(num_steps))[0].params


def roll_out(
  setting: Setting, params: Any, seed: Any, iteration: Any, noise: Any,
  rounded: bool = False,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
  """A batch of the noisy sampler, and how the learner differs from it."""
  prompts, mask = draw_prompts(run_key(seed, 'prompts', iteration), NUM_PROMPTS)
  key = run_key(seed, 'sample', iteration)
  noisy = with_router_noise(params['actor'], key, scale=noise)
  if rounded:  # to the bits of bfloat16
    noisy = jax.tree.map(lambda x: jax.lax.reduce_precision(x, 8, 7), noisy)
  samples = setting.algorithm.sample(
    {'actor': noisy}, prompts, mask, key, jnp.arange(NUM_PROMPTS)
  )
  repeated = jnp.repeat(prompts, NUM_SAMPLES, axis=0)
  rewards = TASK.rewards['exact'](repeated, samples.tokens, samples.mask)
  batch, metrics, _ = setting.algorithm.prepare(
    params, None, prompts, mask, samples,
    rewards.reshape(NUM_PROMPTS, NUM_SAMPLES), {},
  )  # fmt: skip
  ratio = batch.arrays['sampler_logprobs'] - batch.arrays['old_logprobs']
  figures = {k: value(v) for k, v in metrics.items()}
  return batch, {
    'reward': rewards.mean(),
    'rerouted': figures['sampler/rerouted'],
    'gap': figures['sampler/logprob_gap'],
    'kl': jnp.where(batch.mask, ratio, 0).sum() / batch.mask.sum(),
  }


def train(
  setting: Setting, params: Any, seed: Any, num_iterations: int
) -> dict[str, Any]:
  """Figures of each iteration of GRPO against the noisy sampler."""
  algorithm = setting.algorithm
  state = TrainState(jnp.int32(0), params, algorithm.rl_optimizer.init(params))

  def iterate(state: TrainState, iteration: Any) -> tuple[TrainState, Any]:
    batch, figures = roll_out(setting, state.params, seed, iteration, NOISE)
    rows = minibatch_rows(
      minibatch_key(seed, iteration, 0), len(batch.mask),
      setting.num_minibatches, unit_size=1,
    )  # fmt: skip
    state, updates = jax.lax.scan(
      lambda state, some: algorithm.update(
        state, batch, some, run_key(seed, 'selection', state.step)
      ),
      state,
      rows,
    )
    updates = {k: value(v) for k, v in merge(updates).items()}
    figures['norm'] = updates['gradient_norm']
    figures['peak_load'] = updates['balance/peak_load']
    return state, figures

  return jax.lax.scan(iterate, state, jnp.arange(num_iterations))[1]


def measure_gaps(params: Any, seeds: Any) -> list[dict[str, Any]]:
  """The same policy beside samplers of more and more noise, without updates."""
  rows = []
  for replay in (None, 'sampler'):
    setting = make_setting(replay)

    @functools.partial(jax.jit, static_argnums=1)
    def look(noise: Any, rounded: bool, setting: Any = setting) -> Any:
      one = functools.partial(roll_out, setting, iteration=0, rounded=rounded)
      return jax.vmap(lambda p, s: one(p, s, noise=noise)[1])(params, seeds)

    for noise, rounded in (*((n, False) for n in SCALES), (0.0, True)):
      found = jax.device_get(look(noise, rounded))
      means = {k: float(v.mean()) for k, v in found.items()}
      sampler = 'weights in bfloat16' if rounded else f'noise {noise}'
      rows.append(
        {'sampler': sampler, 'noise': noise, 'replay': NAMES[replay], **means}
      )
  return rows


def compare_training(
  params: Any, seeds: Any, num_iterations: int
) -> list[dict[str, Any]]:
  """Each replay with several numbers of updates a rollout."""
  rows = []
  for number in NUM_MINIBATCHES:
    for replay in REPLAYS:
      setting = make_setting(replay, number)
      runs = jax.jit(
        jax.vmap(
          functools.partial(train, setting, num_iterations=num_iterations)
        )
      )
      found = jax.device_get(runs(params, seeds))
      last = {k: v[:, -10:].mean(-1) for k, v in found.items()}
      rows.append(
        {
          'minibatches': number,
          'replay': NAMES[replay],
          'curve': found['reward'].mean(0).tolist(),
          **{k: float(v.mean()) for k, v in last.items()},
          'least': float(last['reward'].min()),
          'most': float(last['reward'].max()),
        }
      )
      if len(rows) == 1:
        print_head(rows[0])
      print_row(rows[-1])
  return rows


def print_row(row: dict[str, Any]) -> None:
  cells = [
    f'{v:.3g}' if isinstance(v, float) else v
    for k, v in row.items()
    if k not in HIDDEN
  ]
  sys.stdout.write('| ' + ' | '.join(map(str, cells)) + ' |\n')
  sys.stdout.flush()


def print_head(row: dict[str, Any]) -> None:
  names = [k for k in row if k not in HIDDEN]
  sys.stdout.write('\n| ' + ' | '.join(names) + ' |\n')
  sys.stdout.write('|' + ' --- |' * len(names) + '\n')


def plot(path: pathlib.Path, gaps: list[dict], runs: list[dict]) -> None:
  """The gap over the noise, and the reward over iterations."""
  from matplotlib.figure import Figure

  figure = Figure((7, 2.8), layout='constrained')
  left, right = figure.subplots(1, 2)
  for name in (NAMES[None], NAMES['sampler']):
    rows = [r for r in gaps if r['replay'] == name and r['noise']]
    left.loglog(
      [r['noise'] for r in rows], [r['gap'] for r in rows], 'o-', label=name
    )
  left.set(xlabel='noise of the routers', ylabel='mean |gap|, nats a token')
  for row in runs:
    if row['minibatches'] == NUM_MINIBATCHES[-1]:
      curve = np.convolve(row['curve'], np.ones(5) / 5, 'valid')
      right.plot(curve, label=row['replay'])
  right.set(xlabel='iteration', ylabel=f'reward, {NUM_MINIBATCHES[-1]} updates')
  for panel in (left, right):
    panel.legend(fontsize='small')
    panel.grid(alpha=0.3)
  figure.savefig(path, dpi=80)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--warm_up', type=int, default=150)
  parser.add_argument('--iterations', type=int, default=60)
  flags = parser.parse_args()
  flags.workdir.mkdir(parents=True, exist_ok=True)
  seeds = jnp.arange(flags.seeds)
  start = functools.partial(
    warm_up, make_setting(None), num_steps=flags.warm_up
  )
  params = jax.jit(jax.vmap(start))(seeds)
  gaps = measure_gaps(params, seeds)
  print_head(gaps[0])
  for row in gaps:
    print_row(row)
  runs = compare_training(params, seeds, flags.iterations)
  results = json.dumps({'gaps': gaps, 'training': runs}, indent=1)
  (flags.workdir / 'results.json').write_text(results)
  plot(flags.workdir / 'gap.png', gaps, runs)


if __name__ == '__main__':
  main()
