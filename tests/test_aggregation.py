"""Weights: worked examples and the promise of invariance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import aggregation, masks


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def lengths_mask(*lengths, width=8):
  return jnp.arange(width)[None, :] < jnp.asarray(lengths)[:, None]


def test_m09_worked_example():
  """Lengths 4 and 7, values 2: by row 2 and 2, or 8/7 and 2."""
  mask = lengths_mask(4, 7)
  mean = 2 * aggregation.sequence_mean(mask) * 2
  constant = 2 * aggregation.constant_length(mask, length=7) * 2
  np.testing.assert_allclose(jnp.sum(mean, axis=1), [2, 2])
  np.testing.assert_allclose(jnp.sum(constant, axis=1), [8 / 7, 2])


def test_m09_equal_lengths_agree_up_to_known_factors():
  mask = lengths_mask(5, 5, 5)
  token = aggregation.token_mean(mask)
  groups = jnp.asarray([0, 0, 1])
  np.testing.assert_allclose(aggregation.sequence_mean(mask), token)
  np.testing.assert_allclose(aggregation.sequence_sum(mask), 5 * token)
  constant = aggregation.constant_length(mask, length=16)
  np.testing.assert_allclose(constant, token * 5 / 16)
  one = aggregation.group_token_mean(mask, jnp.zeros(3, int))
  np.testing.assert_allclose(one, token)
  two = aggregation.group_token_mean(mask, groups)
  np.testing.assert_allclose(jnp.sum(two, axis=1), [0.25, 0.25, 0.5])


def test_m39_every_token_weighs_the_same():
  mask = lengths_mask(1, 6)
  weights = np.asarray(aggregation.token_mean(mask))
  np.testing.assert_allclose(weights[np.asarray(mask)], 1 / 7)


def test_m40_filtered_sequences_may_stay_in_the_denominator():
  mask = lengths_mask(4, 4)
  trained = masks.overlong(mask, jnp.asarray([False, True]))
  kept = jnp.where(trained, aggregation.token_mean(mask), 0)
  np.testing.assert_allclose(jnp.sum(kept), 0.5)
  np.testing.assert_allclose(jnp.sum(aggregation.token_mean(trained)), 1)


def test_m09_empty_rows_count_only_when_asked():
  mask = lengths_mask(4, 0)
  for fn in (aggregation.sequence_mean, aggregation.sequence_sum):
    np.testing.assert_allclose(fn(mask), 2 * fn(mask, count_empty=True))
  groups = jnp.asarray([3, 8])
  alone = aggregation.group_token_mean(mask, groups)
  both = aggregation.group_token_mean(mask, groups, count_empty=True)
  np.testing.assert_allclose(alone, 2 * both)
