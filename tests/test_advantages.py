"""Closed forms of the advantages."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import advantages, masks


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def expected_estimate(fn, group: int):
  """E over groups of a bandit's (1/G) Σ A_i ∇log π(y_i), and ∇E[r]."""
  z, rewards = jnp.asarray([0.3, -0.5, 0.1]), jnp.asarray([1.0, -2.0, 0.5])
  probs = jax.nn.softmax(z)
  scores = jnp.eye(3) - probs[None, :]
  arms = np.array(list(itertools.product(range(3), repeat=group)))
  a = fn(rewards[arms])
  chance = jnp.prod(probs[arms], axis=1)
  found = jnp.einsum('n,ng,ngv->v', chance, a, scores[arms]) / group
  truth = jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * rewards))(z)
  return found, truth


@pytest.mark.parametrize('group', [2, 4])
def test_m05_mean_baseline_scales_and_leave_one_out_is_unbiased(group):
  centered, truth = expected_estimate(advantages.group_centered, group)
  factor = (group - 1) / group
  np.testing.assert_allclose(centered, factor * truth, atol=1e-12)
  unbiased, truth = expected_estimate(advantages.leave_one_out, group)
  np.testing.assert_allclose(unbiased, truth, atol=1e-12)


def test_m29_binary_rewards():
  for wins in range(1, 8):
    rewards = (jnp.arange(8) < wins).astype(float)[None, :]
    p = wins / 8
    found = np.asarray(advantages.group_normalized(rewards, eps=0.0))[0]
    np.testing.assert_allclose(found[0], np.sqrt((1 - p) / p), rtol=1e-12)
    np.testing.assert_allclose(found[-1], -np.sqrt(p / (1 - p)), rtol=1e-12)


def test_m29_moments_and_affine_invariance():
  rewards = jnp.asarray([[0.1, 3.0, -2.0, 0.4]])
  a = advantages.group_normalized(rewards, eps=0.5)
  std = float(np.std(np.asarray(rewards)))
  np.testing.assert_allclose(jnp.sum(a), 0, atol=1e-12)
  expected = 4 * std**2 / (std + 0.5) ** 2
  np.testing.assert_allclose(jnp.sum(a**2), expected, rtol=1e-12)
  plain = advantages.group_normalized(rewards, eps=0.0)
  moved = advantages.group_normalized(5 * rewards + 3, eps=0.0)
  np.testing.assert_allclose(plain, moved, rtol=1e-12)


@pytest.mark.parametrize('ddof', [0, 1])
@pytest.mark.parametrize('value', [0.1, 1 / 3, 1e6, 0.0])
def test_m29_constant_groups_give_exactly_zero_in_float32(ddof, value):
  rewards = jnp.full((1, 7), value, jnp.float32)
  noisy = rewards.at[0, 3].set(jnp.nextafter(rewards[0, 3], jnp.float32(9e9)))
  for r in (rewards, noisy if value else rewards):
    found = advantages.group_normalized(r, ddof=ddof, eps=1e-12)
    np.testing.assert_array_equal(found, 0)


def test_m29_nearly_constant_groups_do_not_spike():
  rewards = jnp.asarray([[0.1, 0.11, 0.1, 0.1]], jnp.float32)
  for fn in (advantages.group_normalized, advantages.leave_one_out):
    assert float(jnp.max(jnp.abs(fn(rewards)))) < 2.0
  found = advantages.group_normalized(rewards)
  expected = np.array([[-1, 3, -1, -1]]) / np.sqrt(3)
  np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_m04_variance_of_the_two_state_example():
  """Rewards 11, 9 and 0, 2: raw deviation 5.32, centred 1.155 (ddof 1)."""
  rewards = jnp.asarray([[11.0, 9.0], [0.0, 2.0]])
  centered = np.asarray(advantages.group_centered(rewards))
  np.testing.assert_allclose(centered, [[1, -1], [-1, 1]])
  np.testing.assert_allclose(np.std(rewards, ddof=1), 5.32, atol=5e-3)
  np.testing.assert_allclose(np.std(centered, ddof=1), 1.155, atol=5e-4)


def test_m04_max_only_keeps_ties_and_gives_zero_for_no_reward():
  rewards = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
  np.testing.assert_array_equal(advantages.max_only(rewards), rewards)


def test_unknown_singleton_names_the_remedy():
  for fn in (advantages.group_centered, advantages.leave_one_out):
    with pytest.raises(Exception, match='singleton'):
      fn(jnp.ones((1, 2)), singleton='mean')


def token_arrays():
  rng = np.random.default_rng(0)
  mask = np.array([[0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1, 0, 1]], bool)
  return (*map(jnp.asarray, rng.standard_normal((2, 2, 8))), jnp.asarray(mask))


def test_m06_lambda_one_is_reward_to_go_minus_value():
  rewards, values, mask = token_arrays()
  found = advantages.gae(rewards, values, mask, lambda_=1.0)
  shown = jnp.where(mask, rewards, 0)
  to_go = jnp.cumsum(shown[:, ::-1], axis=1)[:, ::-1]
  expected = jnp.where(mask, to_go - values, 0)
  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_m06_lambda_zero_is_the_one_step_error():
  rewards, values, _ = token_arrays()
  mask = jnp.ones_like(rewards, bool)
  found = advantages.gae(rewards, values, mask, discount=0.9, lambda_=0.0)
  following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  expected = rewards + 0.9 * following - values
  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_m06_gaps_are_as_if_cut_out():
  rewards, values, mask = token_arrays()
  options = {'discount': 0.9, 'lambda_': 0.8}
  found = advantages.gae(rewards, values, mask, **options)
  for i in range(2):
    kept = np.flatnonzero(mask[i])
    short = advantages.gae(
      rewards[i : i + 1, kept],
      values[i : i + 1, kept],
      jnp.ones((1, len(kept)), bool),
      **options,
    )
    np.testing.assert_allclose(found[i, kept], short[0], atol=1e-12)


def test_m06_perfect_value_without_reward_has_no_advantage():
  mask = jnp.ones((1, 4), bool)
  values = jnp.full((1, 4), 2.0)
  zero = jnp.zeros((1, 4))
  ended = advantages.gae(zero, values, mask)
  assert ended[0, -1] == -2.0
  cut = advantages.gae(zero, values, mask, jnp.asarray([2.0]))
  np.testing.assert_allclose(cut, 0, atol=1e-12)


def test_m06_whiten_gives_unit_moments_and_survives_one_token():
  rewards, _, mask = token_arrays()
  found = np.asarray(advantages.whiten(rewards, mask))[np.asarray(mask)]
  np.testing.assert_allclose(found.mean(), 0, atol=1e-12)
  np.testing.assert_allclose(found.var(ddof=1), 1, rtol=1e-7)
  lone = jnp.zeros_like(mask).at[0, 3].set(True)
  np.testing.assert_array_equal(advantages.whiten(rewards, lone), 0)


@pytest.mark.parametrize(
  ('p', 'group', 'printed'), [(0.5, 8, 0.992), (0.05, 8, 0.337)]
)
def test_m38_retained_fraction(p, group, printed):
  """Over all outcomes of a group, weighed by their probability."""
  outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=group)))
  kept = np.asarray(masks.informative_groups(jnp.asarray(outcomes)))
  wins = outcomes.sum(axis=1)
  found = np.sum(kept * p**wins * (1 - p) ** (group - wins))
  np.testing.assert_allclose(found, 1 - p**group - (1 - p) ** group, rtol=1e-12)
  np.testing.assert_allclose(found, printed, atol=5e-4)


def test_m38_rounding_noise_is_not_information():
  rewards = jnp.asarray([[0.3, 0.1 + 0.2], [0.3, 0.30001]])
  np.testing.assert_array_equal(
    masks.informative_groups(rewards), [False, True]
  )


def test_m03_tabular_policy_is_a_distribution():
  total = jnp.sum(tabular.probabilities(tabular.random_policy(0)))
  np.testing.assert_allclose(total, 1, rtol=1e-12)
