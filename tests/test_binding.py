"""From config blocks to functions: what fits, and what is said when not."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import (
  advantages,
  aggregation,
  importance,
  kl,
  losses,
  masks,
  optimizers,
  shaping,
)
from postrain.binding import bind, check_arguments

MODULES = (advantages, aggregation, importance, kl, losses, masks, shaping)
# What has no default must be said; these are values that fit.
NEEDED = {
  'buffer': 4,
  'coef': 0.1,
  'k': 2,
  'kl_coef': 0.1,
  'learning_rate': 1e-3,
  'length': 8,
  'max_length': 16,
  'negative_coef': 0.1,
  'num_experts': 4,
  'num_sequences': 8,
  'outcome_weight': 0.5,
  'positive_coef': 0.1,
  'threshold': 0.5,
  'weights': (1.0, 0.1),
}
PUBLIC = [(m, n) for m in (*MODULES, optimizers) for n in m.__all__]


def keywords(fn):
  parameters = inspect.signature(fn).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(
  ('module', 'name'), PUBLIC, ids=[f'{m.__name__}.{n}' for m, n in PUBLIC]
)
def test_everything_public_can_be_bound(module, name):
  """With its defaults, and with the defaults said."""
  defaults = keywords(getattr(module, name))
  needed = {k: NEEDED[k] for k, v in defaults.items() if v is inspect._empty}
  bound = bind(module, {'name': name, **needed})
  assert isinstance(bound, functools.partial)
  assert bound.func is getattr(module, name)
  assert bound.keywords == needed
  said = bind(module, {'name': name, **defaults, **needed})
  assert said.keywords == defaults | needed
  if needed:
    with pytest.raises(
      ValueError, match=f'needs a value for: {next(iter(needed))}'
    ):
      bind(module, {'name': name})


def test_a_bound_function_is_the_function_with_its_hyperparameters():
  mask = jnp.array([[True, True, False]])
  bound = bind(aggregation, {'name': 'constant_length', 'length': 4})
  np.testing.assert_array_equal(bound(mask), [[0.25, 0.25, 0]])


@pytest.mark.parametrize(
  ('block', 'said'),
  [
    ({'name': 'ppo'}, ["has no 'ppo'", 'ppo_clip', 'gspo']),
    ({'name': 'ppo_clp'}, ["did you mean 'ppo_clip'?", 'cispo']),
    ({'name': None}, ['has no None', 'ppo_clip']),
    ({'name': 'importance'}, ["has no 'importance'"]),  # imported, not public
    ({}, ["expected dict(name='...')", 'ppo_clip']),
    ('ppo_clip', ["expected dict(name='...')", "got 'ppo_clip'"]),
    (None, ["expected dict(name='...')", 'got None']),
    (
      {'name': 'ppo_clip', 'clip_hihg': 0.3},
      ["'clip_hihg'", "did you mean 'clip_high'?", 'clip_low', 'dual_clip'],
    ),
    ({'name': 'ppo_clip', 'mask': 0.3}, ["hyperparameter 'mask'"]),
    ({'name': 'squared_error', 'clip': 1}, ["'clip'", 'it has: none']),
    (
      {'name': 'ppo_clip', 'clip_low': '0.2'},
      ["clip_low='0.2'", 'not of type'],
    ),
    ({'name': 'ppo_clip', 'clip_low': None}, ['clip_low=None']),
    ({'name': 'ppo_clip', 'clip_low': True}, ['clip_low=True']),
    ({'name': 'ppo_clip', 'clip_low': [0.2]}, ['clip_low=[0.2]']),
    ({'name': 'ppo_clip', 'clip_low': float('nan')}, ['clip_low=nan']),
    ({'name': 'ppo_clip', 'clip_low': np.float64('nan')}, ['clip_low', 'nan']),
    ({'name': 'ppo_clip', 'clip_low': jnp.float32('nan')}, ['clip_low', 'nan']),
    ({'name': 'ppo_clip', 'clip_low': np.array(['a'])}, ['clip_low']),
    ({'name': 'ppo_clip', 'clip_low': np.bool_(True)}, ['clip_low']),
  ],
  ids=str,
)
def test_errors_name_the_value_and_list_what_exists(block, said):
  with pytest.raises(ValueError, match=re.escape(said[0])) as error:
    bind(losses, block)
  for words in ['postrain.losses', *said]:
    assert words in str(error.value)


@pytest.mark.parametrize(
  ('module', 'block', 'said'),
  [
    (
      advantages,
      {'name': 'group_centered', 'singleton': 'nil'},
      ["singleton='nil'", 'zero'],
    ),
    (advantages, {'name': 'group_normalized', 'ddof': 0.5}, ['ddof=0.5']),
    (advantages, {'name': 'group_normalized', 'ddof': True}, ['ddof=True']),
    (importance, {'name': 'truncated', 'level': 'word'}, ["level='word'"]),
    (aggregation, {'name': 'constant_length'}, ['needs a value for: length']),
    (
      aggregation,
      {'name': 'sequence_mean', 'count_empty': 1},
      ['count_empty=1', 'bool'],
    ),
    (optimizers, {'name': 'adamw'}, ['needs a value for: learning_rate']),
    (optimizers, {'name': 'adamx', 'learning_rate': 1}, ["'adamx'", 'sgd']),
  ],
)  # fmt: skip
def test_errors_of_other_types(module, block, said):
  with pytest.raises(ValueError, match=re.escape(said[0])) as error:
    bind(module, block)
  for words in said:
    assert words in str(error.value)


@pytest.mark.parametrize(
  'number', [0.3, 1, float('inf'), np.float32(0.3), jnp.float32(0.3)]
)
def test_numbers_of_all_kinds_pass(number):
  bound = bind(losses, {'name': 'ppo_clip', 'clip_high': number})
  assert bound.keywords == {'clip_high': number}


def test_traced_values_pass():
  """So that hyperparameters may be vmapped."""
  logprobs = jnp.zeros((1, 3))
  mask = jnp.ones((1, 3), bool)

  def clipped(clip_high):
    loss = bind(losses, {'name': 'ppo_clip', 'clip_high': clip_high})
    values, _ = loss(logprobs, logprobs - 1, jnp.ones((1, 3)), mask)
    return values

  found = jax.jit(jax.vmap(clipped))(jnp.array([0.2, 0.5]))
  expected = jnp.stack([jnp.full((1, 3), -1.2), jnp.full((1, 3), -1.5)])
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_schemas_without_defaults_name_what_is_missing():
  def schema(*, one: int, two: float | None, three: tuple = ()): ...

  check_arguments(schema, {'one': 1, 'two': None}, 'config')
  with pytest.raises(ValueError, match='config needs a value for: one, two'):
    check_arguments(schema, {}, 'config')
  with pytest.raises(ValueError, match='three=3 is not of type tuple'):
    check_arguments(schema, {'one': 1, 'two': 2, 'three': 3}, 'config')


def test_a_function_from_elsewhere_is_named_with_its_module():
  bound = bind(losses, {'name': 'postrain.losses:gspo', 'clip_low': 0.1})
  assert bound.func is losses.gspo
  for name in ('postrain.losses:gsop', 'no.such.module:gspo'):
    with pytest.raises(ValueError, match='cannot be imported'):
      bind(losses, {'name': name})
