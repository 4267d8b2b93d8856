"""Identities of importance weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import importance


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def policies():
  return (tabular.logprobs(tabular.random_policy(s)) for s in (0, 1))


@pytest.mark.parametrize('level', ['token', 'sequence', 'geometric'])
def test_m65_equal_policies_give_weight_one(level):
  old, _ = policies()
  for found in (
    importance.truncated(old, old, tabular.MASK, level=level),
    importance.masked(old, old, tabular.MASK, level=level),
  ):
    np.testing.assert_array_equal(found, 1)


def test_m65_sequence_weights_are_unbiased_without_a_cap():
  old, sampler = policies()
  f = tabular.rewards()
  weights = importance.truncated(
    old, sampler, tabular.MASK, level='sequence', cap=jnp.inf
  )
  found = jnp.sum(jnp.exp(jnp.sum(sampler, axis=1)) * weights[:, 0] * f)
  expected = jnp.sum(jnp.exp(jnp.sum(old, axis=1)) * f)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_m65_cap_and_band_hold():
  old, sampler = policies()
  ratios = importance.ratio(old, sampler, tabular.MASK)
  capped = importance.truncated(old, sampler, tabular.MASK, cap=1.5)
  np.testing.assert_array_equal(capped, jnp.minimum(ratios, 1.5))
  band = importance.masked(old, sampler, tabular.MASK, low=0.5, high=1.5)
  inside = (ratios >= 0.5) & (ratios <= 1.5)
  np.testing.assert_array_equal(band, jnp.where(inside, ratios, 0))
  assert 0 < np.sum(inside) < inside.size


def test_m65_log_ratios_add():
  old, sampler = policies()
  new = tabular.logprobs(tabular.random_policy(2))
  total = importance.log_ratio(new, sampler)
  parts = importance.log_ratio(new, old) + importance.log_ratio(old, sampler)
  np.testing.assert_allclose(total, parts, atol=1e-12)


def test_m65_metrics_are_divergences():
  """Over all sequences, weighed as the sampler draws them."""
  old, sampler = policies()
  counts = np.round(1000 * np.exp(np.sum(sampler, axis=1))).astype(int)
  rows = np.repeat(np.arange(len(counts)), counts)
  mask = jnp.ones((len(rows), tabular.LENGTH), bool)
  found = importance.mismatch_metrics(old[rows], sampler[rows], mask)
  x = np.asarray(old - sampler)[rows]
  np.testing.assert_allclose(found['kl'], -x.mean(), rtol=1e-12)
  np.testing.assert_allclose(found['k3'], found['kl'], atol=2e-3)
  assert found['chi_squared'] > 0
  assert 0 < found['effective_sample_size'] < 1


def test_m65_effective_sample_size():
  mask = jnp.ones(4, bool)
  one = importance.effective_sample_size(jnp.asarray([3.0, 0, 0, 0]), mask)
  np.testing.assert_allclose(one, 0.25)
  equal = importance.effective_sample_size(jnp.full(4, 7.0), mask)
  np.testing.assert_allclose(equal, 1)


def test_m42_sequence_ratio_ignores_repetition():
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.standard_normal((2, 3, 4)))
  short = importance.sequence_ratio(x, y, jnp.ones((3, 4), bool))
  long = importance.sequence_ratio(
    jnp.tile(x, 3), jnp.tile(y, 3), jnp.ones((3, 12), bool)
  )
  np.testing.assert_allclose(short, long, rtol=1e-12)


def test_m66_token_objective_is_first_order():
  """Gap of values ×¼ and of gradients ×½ when the step halves."""
  base, step = tabular.random_policy(0), tabular.random_policy(1)
  rewards, old = tabular.rewards(), tabular.logprobs(base)
  chance = jnp.exp(jnp.sum(old, axis=1))

  def objective(policy, *, tokens: bool):
    ratios = importance.ratio(tabular.logprobs(policy), old, tabular.MASK)
    if tokens:
      factor = jnp.sum(ratios, axis=1) - (tabular.LENGTH - 1)
    else:
      factor = jnp.prod(ratios, axis=1)
    return jnp.sum(chance * rewards * factor)

  gaps, slopes = [], []
  for size in (0.02, 0.01):
    moved = jax.tree.map(lambda a, b, h=size: a + h * b, base, step)
    values = [objective(moved, tokens=k) for k in (False, True)]
    grads = [jax.grad(objective)(moved, tokens=k) for k in (False, True)]
    gaps.append(abs(values[0] - values[1]))
    slopes.append(tabular.gap(*grads))
  np.testing.assert_allclose(gaps[0] / gaps[1], 4, rtol=0.1)
  np.testing.assert_allclose(slopes[0] / slopes[1], 2, rtol=0.1)
  same = [jax.grad(objective)(base, tokens=k) for k in (False, True)]
  assert tabular.gap(*same) < 1e-12


def test_m67_variance_of_products_grows_with_length():
  """Two-point log-ratios: Var of the product is (E ρ²)ᵀ − 1, exactly."""
  log_ratios = np.array([np.log(1.1), np.log(0.9)])  # mean ratio 1
  found = []
  for length in (2, 6):
    paths = np.array(list(itertools.product([0, 1], repeat=length)))
    old = jnp.asarray(log_ratios[paths])
    mask = jnp.ones(old.shape, bool)
    weights = importance.truncated(
      old, jnp.zeros_like(old), mask, level='sequence', cap=jnp.inf
    )
    found.append(np.var(weights[:, 0]))
    np.testing.assert_allclose(found[-1], 1.01**length - 1, rtol=1e-12)
  assert found[1] > 3 * found[0]


def test_unknown_level_names_the_remedy():
  x = jnp.zeros((1, 2))
  with pytest.raises(Exception, match='level'):
    importance.truncated(x, x, jnp.ones((1, 2), bool), level='word')
