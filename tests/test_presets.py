"""Presets give the losses and gradients of the trainers that they name.

The values are those of `experiments/peers/generate.py`.
"""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, presets
from postrain import advantages, aggregation, kl, losses
from postrain.batches import call_by_name
from postrain.binding import bind
from postrain.recipe import make_recipe

FILE = pathlib.Path(__file__).parent / 'reference' / 'presets.json'
REFERENCE = json.loads(FILE.read_text())
NAMES = [f'{a}/{s}' for a, sources in presets.PRESETS.items() for s in sources]


def blocks_of(name: str, length: int) -> dict:
  config = base.get_config()
  config.sampling.max_new_tokens = length
  presets.apply(config, name)
  return config.to_dict()


def total(name: str, x: dict, logprobs: jax.Array) -> jax.Array:
  """The loss of an update, as the trainer makes it of one choice per axis."""
  config = blocks_of(name, x['mask'].shape[1])
  estimator, coefs = bind(kl, config['kl']['estimator']), config['kl']
  rewards = x['rewards']
  if coefs['reward_coef'] is not None:
    old = {'logprobs': x['old_logprobs']}
    penalty = call_by_name(estimator, x | old)
    rewards = rewards - coefs['reward_coef'] * penalty.sum(-1)
  advantage = call_by_name(
    bind(advantages, config['advantage']),
    {
      'rewards': rewards.reshape(2, 4),
      'lengths': x['mask'].sum(-1).reshape(2, 4),
    },
  )
  x = x | {
    'logprobs': logprobs,
    'advantages': jnp.broadcast_to(advantage.reshape(-1, 1), x['mask'].shape),
    'groups': jnp.repeat(jnp.arange(2), 4),
    'sampler_logprobs': x['old_logprobs'],
  }
  weights = call_by_name(bind(aggregation, config['aggregation']), x)
  values, _ = call_by_name(bind(losses, config['loss']), x)
  if coefs['loss_coef'] is not None:
    values = values + coefs['loss_coef'] * call_by_name(estimator, x)
  return jnp.sum(weights * values)


@pytest.fixture(name='x')
def fixture_x():
  with jax.enable_x64(True):
    yield {k: jnp.asarray(v) for k, v in REFERENCE['inputs'].items()}


@pytest.mark.parametrize('name', NAMES)
def test_preset_is_a_config_with_a_gradient(name, x):
  config = base.get_config()
  presets.apply(config, name)
  config.rl.num_iterations = 1
  config.rewards = dict(any=dict(name='any', weight=1.0))
  config.evaluation.grader = 'any'
  make_recipe(config)
  gradient = jax.grad(lambda p: total(name, x, p))(x['logprobs'])
  assert np.all(np.isfinite(gradient))
  assert np.any(gradient != 0)


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
