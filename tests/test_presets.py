"""Presets give the losses and gradients of papers and trainers.

Of all by the oracles; of trainers also by their own values, those of
`experiments/peers/generate.py`. What new wiring feeds them lets them learn.
"""

from collections.abc import Callable
import functools
import inspect
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tabular
import tiny

from configs import base, presets
from postrain import (
  advantages,
  aggregation,
  device_loop,
  kl,
  losses,
  masks,
  objectives,
)
from postrain.batches import asked, call_by_name, weigh_units
from postrain.binding import bind
from postrain.models.wrap import plain as plain_model
from postrain.recipe import make_recipe
from postrain.train_step import finish, make_train_step
from postrain.trainer import Trainer
from postrain.types import Batch, TrainState

FILE = pathlib.Path(__file__).parent / 'reference' / 'presets.json'
REFERENCE = json.loads(FILE.read_text())
NAMES = [f'{a}/{s}' for a, sources in presets.PRESETS.items() for s in sources]
PAIRS = [f'{a}/{s}' for a, of in presets.PREFERENCES.items() for s in of]
MODULES = {
  'advantage': advantages,
  'loss': losses,
  'aggregation': aggregation,
  'selection': masks,
  'kl': kl,
}
quick_compiler = tiny.quick_compiler


def blocks_of(name: str, length: int) -> dict:
  config = base.get_config()
  config.sampling.max_new_tokens = length
  presets.apply(config, name)
  return config.to_dict()


def bound(axis: str, block: dict | None, plain: bool) -> Callable | None:
  """A function of the library, or of the oracles with the same signature."""
  if block is None:
    return None
  fn = bind(MODULES[axis], block)
  if not plain:
    return functools.partial(call_by_name, fn)
  oracle = getattr(oracles, block['name'])
  options, wanted = dict(fn.keywords), list(asked(fn))

  def called(arrays: dict) -> Any:
    if 'stopped' in inspect.signature(oracle).parameters:
      options['stopped'] = arrays['fixed']
    given = [arrays.get(k) for k in wanted]
    while given[-1] is None:
      given.pop()
    return oracle(*given, **options)

  return called


def advantages_of(config: dict, x: dict, plain: bool) -> Any:
  """Of tokens [B T]; those of sequences stand on each of their tokens."""
  np_ = np if plain else jnp
  mask, rewards, coef = x['mask'], x['rewards'], config['kl']['reward_coef']
  penalty = np_.zeros(mask.shape)
  if coef is not None:
    estimator = bound('kl', config['kl']['estimator'], plain)
    penalty = coef * estimator(x | {'logprobs': x['old_logprobs']})
  advantage = bound('advantage', config['advantage'], plain)
  groups = np_.repeat(np_.arange(2), 4)
  if 'mask' in asked(bind(advantages, config['advantage'])):
    last = np_.cumsum(mask, 1) == np_.sum(mask, 1, keepdims=True)
    tokens = np_.where(mask & last, rewards[:, None], 0) - penalty
    return advantage({'rewards': tokens, 'mask': mask, 'groups': groups})
  rewards = rewards - np_.sum(np_.where(mask, penalty, 0), 1)
  found = advantage(
    {
      'rewards': rewards.reshape(2, 4),
      'lengths': mask.sum(-1).reshape(2, 4),
      'baselines': np_.asarray([0.25, 0.5]),
      'reward_parts': np_.stack([rewards, rewards**2], -1).reshape(2, 4, 2),
    }
  )
  return np_.broadcast_to(found.reshape(-1, 1), mask.shape)


def total(name: str, x: dict, logprobs: Any, plain: bool = False) -> Any:
  """The loss of an update, as the trainer makes it of one choice per axis.

  ``plain`` for the same of the oracles, which read ``x['logprobs']`` where the
  gradient stops.
  """
  config = blocks_of(name, x['mask'].shape[1])
  coef = config['kl']['loss_coef']
  x = x | {
    'fixed': x['logprobs'],
    'advantages': advantages_of(config, x, plain),
    'groups': (np if plain else jnp).arange(8) // 4,
    'sampler_logprobs': x['old_logprobs'],
    'key': jax.random.key(0),
  }
  trained = x['mask']
  if config['selection'] is not None:
    x['selected'] = bound('selection', config['selection'], plain)(x)
    if 'selected' not in asked(bind(losses, config['loss'])):
      trained = x['selected']
  x['logprobs'] = logprobs
  weights = bound('aggregation', config['aggregation'], plain)(x)
  values, _ = bound('loss', config['loss'], plain)(x)
  values = (np if plain else jnp).where(trained, values, 0)
  if coef is not None:
    estimator = bound('kl', config['kl']['estimator'], plain)
    values = values + coef * estimator(x)
  return (weights * values).sum()


@pytest.fixture(name='x')
def fixture_x():
  with jax.enable_x64(True):
    yield {k: jnp.asarray(v) for k, v in REFERENCE['inputs'].items()}


@pytest.mark.parametrize('name', NAMES)
def test_preset_is_a_config_with_the_gradient_of_the_oracles(name, x):
  config = base.get_config()
  presets.apply(config, name)
  config.rl.num_iterations = 1
  config.rewards = dict(any=dict(name='any', weight=1.0))
  config.evaluation.grader = 'any'
  make_recipe(config)
  loss, gradient = jax.value_and_grad(lambda p: total(name, x, p))(
    x['logprobs']
  )
  assert np.any(gradient != 0)
  arrays = {k: np.asarray(v) for k, v in x.items()}
  expected = functools.partial(total, name, arrays, plain=True)
  np.testing.assert_allclose(loss, expected(arrays['logprobs']), rtol=1e-10)
  for place in [(0, 0), (0, 2), (1, 1), (3, 0), (4, 3), (6, 5), (7, 1)]:
    step = np.zeros(gradient.shape)
    step[place] = 1e-6
    ends = [expected(arrays['logprobs'] + d) for d in (step, -step)]
    slope = (ends[0] - ends[1]) / 2e-6
    np.testing.assert_allclose(gradient[place], slope, atol=2e-8)


@pytest.mark.parametrize('name', REFERENCE['cases'])
def test_preset_has_the_numbers_of_its_trainer(name, x):
  loss, gradient = jax.value_and_grad(lambda p: total(name, x, p))(
    x['logprobs']
  )
  expected = REFERENCE['cases'][name]
  # verl adds 1e-8 to lengths; Tunix computes in float32.
  rtol = 1e-5 if name.endswith('tunix') else 1e-7
  np.testing.assert_allclose(loss, expected['loss'], rtol=rtol, atol=rtol)
  np.testing.assert_allclose(
    gradient, expected['gradient'], rtol=rtol, atol=rtol
  )


# Preferences: a bigram policy, three pairs or six single completions.

BIGRAM = plain_model(
  lambda key: {'table': jax.random.normal(key, (5, 5))},
  lambda params, tokens, positions, segment_ids: params['table'][tokens],
  lambda params, hidden: hidden,
  5,
)


def preferences(unit_size: int) -> Batch:
  draw = np.random.default_rng(2)
  ends = np.array([6, 4, 3, 6, 5, 5])[:, None]
  valid = np.arange(6) < ends
  mask = jnp.asarray(valid & (np.arange(6) >= 2))
  arrays = {
    'ref_logprobs': jnp.where(mask, draw.standard_normal(mask.shape) - 2, 0),
    'desirable': jnp.arange(6) % 2 == 0,
    'reference_point': jnp.full(6, 0.3),
  }
  tokens = jnp.asarray(draw.integers(5, size=mask.shape), jnp.int32)
  return Batch(
    tokens, jnp.asarray(valid), mask, {}, arrays, unit_size=unit_size
  )


def preference_of(name: str) -> tuple[Any, Batch]:
  """The objective of a preset, and what it trains on."""
  block = presets.preset(name)
  loss, sft = bind(losses, block['loss']), block['sft']
  if 'chosen' not in asked(loss):
    batch = weigh_units(preferences(1))
    return objectives.unpaired(BIGRAM, loss=loss), batch
  aggregate = sft and bind(aggregation, sft['aggregation'])
  return objectives.preference(
    BIGRAM, loss=loss, sft_coef=sft and sft['coef']
  ), weigh_units(preferences(2), sft_aggregation=aggregate)


def plain_preference(name: str, batch: Batch, table: np.ndarray) -> float:
  """The same by NumPy and the oracles: means over pairs, and over tokens."""
  block, mask = presets.preset(name), np.asarray(batch.mask)
  loss = bind(losses, block['loss'])
  logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
  tokens = np.asarray(batch.tokens)
  logprobs = np.zeros(mask.shape)
  logprobs[:, 1:] = np.where(
    mask[:, 1:], logp[tokens[:, :-1], tokens[:, 1:]], 0
  )
  given = {k: np.asarray(v) for k, v in batch.arrays.items()}
  sums, refs = logprobs.sum(-1), given['ref_logprobs'].sum(-1)
  arrays = {'chosen': sums[::2], 'rejected': sums[1::2]}
  arrays |= {'ref_chosen': refs[::2], 'ref_rejected': refs[1::2]}
  lengths = mask.sum(-1)
  arrays |= {'chosen_lengths': lengths[::2], 'rejected_lengths': lengths[1::2]}
  arrays |= {'logprobs': sums, 'ref_logprobs': refs, 'reference_point': 0.3}
  arrays['desirable'] = given['desirable']
  oracle = getattr(oracles, block['loss']['name'])
  values, _ = oracle(*(arrays[k] for k in asked(loss)), **loss.keywords)
  found = values.mean()
  if block['sft'] is not None:
    found -= block['sft']['coef'] * sums[::2].sum() / lengths[::2].sum()
  return found


@pytest.mark.parametrize('name', PAIRS)
def test_preferences_have_the_gradient_of_the_oracles(name):
  with jax.enable_x64(True):
    objective, batch = preference_of(name)
    table = np.random.default_rng(0).standard_normal((5, 5))
    params = {'actor': {'table': jnp.asarray(table)}}
    (loss, _), gradient = jax.value_and_grad(objective, has_aux=True)(
      params, {}, batch
    )
  plainly = functools.partial(plain_preference, name, batch)
  np.testing.assert_allclose(loss, plainly(table), rtol=1e-6)
  expected = np.zeros(table.shape)
  for place in np.ndindex(table.shape):
    step = np.zeros(table.shape)
    step[place] = 1e-6
    expected[place] = (plainly(table + step) - plainly(table - step)) / 2e-6
  np.testing.assert_allclose(gradient['actor']['table'], expected, atol=1e-6)
  assert np.any(expected != 0)


@pytest.mark.parametrize('name', ['dpo/paper', 'cpo/trl', 'kto/paper'])
def test_preferences_are_learned(name):
  objective, batch = preference_of(name)
  optimizer = optax.adam(0.3)
  params = {'actor': BIGRAM.init(jax.random.key(0))}
  step = jax.jit(make_train_step(objective, optimizer))
  state = TrainState(jnp.int32(0), params, optimizer.init(params))
  found = []
  for _ in range(20):
    state, metrics = step(state, {}, batch)
    found.append(finish(metrics))
  assert found[-1]['loss'] < 0.8 * found[0]['loss']
  assert found[-1]['preference/margin'] > found[0]['preference/margin']


# New wiring learns: what a minibatch selects, and signals of the advantage.


def small(name: str, num_iterations: int) -> Any:
  config = tiny.sort()
  presets.apply(config, name)
  config.rl.num_iterations = num_iterations
  config.rl.num_minibatches = 2
  return config


@pytest.mark.parametrize(
  'name',
  [
    'gdpo/paper',
    'kl_cov/paper',
    pytest.param('remax/paper', marks=pytest.mark.slow),
    pytest.param('reinforce_plus_plus/paper', marks=pytest.mark.slow),
    pytest.param('clip_cov/paper', marks=pytest.mark.slow),
  ],
)
def test_preset_learns(name):
  config = small(name, 40)
  config.rl.optimizer.learning_rate = 0.1
  config.sampling.num_samples = 8
  _, figures = device_loop.run(config, seeds=jnp.arange(2))
  reward = figures['reward'].mean(0)
  assert reward[-5:].mean() > reward[:5].mean() + 0.3


def test_trainer_and_device_loop_agree_on_baselines_and_draws(tmp_path):
  config = small('remax/paper', 2)
  config.selection = dict(name='covariance', fraction=0.3, low=-9.0, high=9.0)
  state = Trainer(config, str(tmp_path)).run()
  params, _ = device_loop.run(
    config,
    seeds=jnp.array([0, 0]),
    hyperparameters={'selection.fraction': jnp.array([0.3, 0.0])},
  )
  drawn, every = (jax.tree.map(lambda x, i=i: x[i], params) for i in (0, 1))
  assert tabular.gap(state.params, drawn) < 1e-6
  assert tabular.gap(every, drawn) > 1e-3


def test_parts_of_rewards_hold_no_penalty():
  config = small('gdpo/paper', 1)
  config.kl.reward_coef = 0.1
  with pytest.raises(ValueError, match=r"kl.reward_coef=0.1 with.*'gdpo'"):
    device_loop.run(config, seeds=jnp.arange(1))


def test_presets_of_preferences_are_no_config_of_rollouts():
  with pytest.raises(ValueError, match=r"'dpo/trl' is of preferences"):
    presets.apply(base.get_config(), 'dpo/trl')


def test_unknown_presets_are_errors():
  with pytest.raises(ValueError, match=r"'grpo/ppo' does not.*grpo/paper"):
    presets.preset('grpo/ppo')


def test_a_preset_is_a_copy():
  presets.preset('grpo/trl')['loss']['clip_low'] = 9.0
  assert presets.preset('grpo/trl')['loss']['clip_low'] == 0.2


def test_the_table_is_that_of_the_presets():
  root = FILE.parents[2]
  program = str(root / 'experiments' / 'presets' / 'table.py')
  done = subprocess.run(
    [sys.executable, program], capture_output=True, text=True, check=True
  )
  assert done.stdout == (root / 'docs' / 'presets.md').read_text()
