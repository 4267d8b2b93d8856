"""Analytic properties of advantages."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import (
  advantages,
  aggregation,
  importance,
  logprobs,
  losses,
)

GROUPED = (
  advantages.group_centered,
  advantages.group_normalized,
  advantages.batch_normalized,
  advantages.leave_one_out,
  advantages.gpg,
)


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def binary_groups(size: int):
  """Rewards of a group with 0, 1, ... right samples [G+1 G]."""
  return (np.arange(size)[None] < np.arange(size + 1)[:, None]).astype(float)


def lengths_mask(*lengths, width=8):
  return jnp.arange(width)[None, :] < jnp.asarray(lengths)[:, None]


def test_m03_sequences_that_end_early_are_a_distribution():
  """The tokens after a stop token (0) are masked."""
  tokens = tabular.SEQUENCES
  logits = tabular.logits(tabular.random_policy(0))
  logp = logprobs.token_logprobs(logits, jnp.asarray(tokens))
  ended = np.cumsum(tokens == 0, axis=1)
  mask = ended - (tokens == 0) == 0
  texts = {
    tuple(t[m]): p
    for t, m, p in zip(
      tokens,
      mask,
      jnp.exp(jnp.sum(jnp.where(mask, logp, 0), axis=1)),
      strict=True,
    )
  }
  np.testing.assert_allclose(sum(texts.values()), 1, rtol=1e-12)


def test_m04_raw_rewards_estimate_the_gradient():
  policy, rewards = tabular.random_policy(0), tabular.rewards()
  a = rewards[:, None] * jnp.ones(tabular.MASK.shape)

  def loss(x):
    return losses.reinforce(x, x, a, tabular.MASK)[0]

  found = tabular.expected_gradient(loss, policy)
  truth = jax.grad(lambda p: -jnp.sum(tabular.probabilities(p) * rewards))
  assert tabular.gap(found, truth(policy)) < 1e-12


def test_m04_constant_groups_teach_nothing_unless_raw():
  rewards = jnp.full((2, 4), 0.7, float)
  for fn in GROUPED:
    np.testing.assert_array_equal(fn(rewards), 0)
  np.testing.assert_array_equal(advantages.max_only(rewards), rewards)
  np.testing.assert_array_equal(advantages.max_only(0 * rewards), 0)


def bandit_variance(fn, probs, rewards, group):
  """Total variance of the estimate (1/G) Σ A_i ∇log π(y_i), by enumeration."""
  arms = np.array(list(itertools.product(range(len(probs)), repeat=group)))
  scores = np.eye(len(probs)) - probs
  chance = np.prod(probs[arms], axis=1)
  a = np.asarray(fn(jnp.asarray(rewards[arms])))
  found = np.einsum('ng,ngv->nv', a, scores[arms]) / group
  mean = chance @ found
  return chance @ np.sum((found - mean) ** 2, axis=1)


PROBS, ARM_REWARDS = np.array([0.5, 0.2, 0.3]), np.array([2.0, 1.0, 3.0])


def constant_baseline():
  """b* = E[‖∇log π‖² r] / E[‖∇log π‖²], and the denominator."""
  squares = np.sum((np.eye(3) - PROBS) ** 2, axis=1)
  norms = PROBS @ squares
  return PROBS @ (squares * ARM_REWARDS) / norms, norms


def test_m05_leaving_one_out_varies_less_unless_raw_rewards_are_near_zero():
  """Of rewards r + c: constant for one, V* + (b* + c)² E‖∇log π‖² / G raw."""
  group, (best, norms) = 3, constant_baseline()

  def raw(shift):
    return bandit_variance(lambda r: r, PROBS, ARM_REWARDS + shift, group)

  def others(shift):
    fn = advantages.leave_one_out
    return bandit_variance(fn, PROBS, ARM_REWARDS + shift, group)

  least = raw(-best)
  radius = math.sqrt((others(0.0) - least) * group / norms)
  for distance in (0.9 * radius, 1.1 * radius, 9.0):
    for shift in (distance - best, -distance - best):
      expected = least + distance**2 * norms / group
      np.testing.assert_allclose(raw(shift), expected, rtol=1e-12)
      np.testing.assert_allclose(others(shift), others(0.0), rtol=1e-12)
      assert (others(shift) < raw(shift)) == (distance > radius)
      assert abs(PROBS @ (ARM_REWARDS + shift)) > 0.1


def test_m05_leaving_one_out_can_vary_more_though_the_mean_is_not_zero():
  """A coin that pays 1 with probability 0.7, in groups of four."""
  coin, pays = np.array([0.3, 0.7]), np.array([0.0, 1.0])
  raw = bandit_variance(lambda r: r, coin, pays, 4)
  others = bandit_variance(advantages.leave_one_out, coin, pays, 4)
  np.testing.assert_allclose([raw, others], [0.00945, 0.0315], rtol=1e-12)


def test_m05_optimal_scalar_baseline():
  best, _ = constant_baseline()
  variance = {
    b: bandit_variance(lambda r, b=b: r - b, PROBS, ARM_REWARDS, 1)
    for b in (best, best - 0.1, best + 0.1, PROBS @ ARM_REWARDS)
  }
  assert min(variance, key=variance.get) == best


def test_m05_length_weighted_baseline_is_the_mean_for_equal_lengths():
  rewards = jnp.asarray([[0.3, 1.0, -2.0]])
  lengths = jnp.asarray([[5, 5, 5]])
  found = advantages.optimal_baseline(rewards, lengths)
  np.testing.assert_allclose(found, advantages.group_centered(rewards))
  long = advantages.optimal_baseline(rewards, jnp.asarray([[1, 0, 3]]))
  np.testing.assert_allclose(long, rewards + 1.425)


def test_m06_recursion_is_the_double_sum_and_padding_is_nothing():
  """A_t = Σ_l (γλ)^l δ_{t+l}, also before columns of padding."""
  rng, (discount, lambda_) = np.random.default_rng(0), (0.9, 0.8)
  rewards, values = rng.standard_normal((2, 2, 5))
  following = np.pad(values[:, 1:], ((0, 0), (0, 1)))
  delta = rewards + discount * following - values
  expected = [
    [
      sum((discount * lambda_) ** l * row[t + l] for l in range(5 - t))
      for t in range(5)
    ]
    for row in delta
  ]
  pads = ((0, 0), (0, 3))
  arrays = (np.pad(x, pads, constant_values=np.nan) for x in (rewards, values))
  mask = jnp.arange(8)[None, :] < jnp.asarray([[5], [5]])
  found = advantages.gae(
    *map(jnp.asarray, arrays), mask, discount=discount, lambda_=lambda_
  )
  np.testing.assert_allclose(found[:, :5], expected, atol=1e-12)
  np.testing.assert_array_equal(found[:, 5:], 0)


def test_m06_returns_belong_to_advantages_before_whitening():
  rng = np.random.default_rng(0)
  rewards, values = jnp.asarray(rng.standard_normal((2, 3, 5)))
  mask = jnp.asarray(rng.random((3, 5)) < 0.7)
  a = advantages.gae(rewards, values, mask)
  returns = advantages.lambda_returns(rewards, values, mask)
  np.testing.assert_allclose(returns, jnp.where(mask, a + values, 0))


def test_m17_one_epoch_of_one_minibatch_has_ratio_one():
  rng = np.random.default_rng(0)
  logp, a = jnp.asarray(rng.standard_normal((2, 4, 6)))
  mask = lengths_mask(4, 6, 0, 2, width=6)
  np.testing.assert_array_equal(importance.ratio(logp, logp, mask), 1)
  _, metrics = losses.ppo_clip(logp, logp, a, mask)
  for name, values in metrics.items():
    if 'clip' in name:
      np.testing.assert_array_equal(values, 0)


def test_m17_order_does_not_matter():
  rng = np.random.default_rng(0)
  logp, old, a = jnp.asarray(rng.standard_normal((3, 4, 6)))
  mask = lengths_mask(4, 6, 0, 2, width=6)
  order = np.array([2, 0, 3, 1])

  def total(*arrays):
    values = losses.ppo_clip(*arrays)[0]
    return jnp.sum(aggregation.token_mean(arrays[-1]) * values)

  arrays = (logp, old, a, mask)
  moved = (x[order] for x in arrays)
  both = jax.value_and_grad(total)
  (value, slope), (same, moved_slope) = both(*arrays), both(*moved)
  np.testing.assert_allclose(value, same, rtol=1e-12)
  np.testing.assert_allclose(slope[order], moved_slope, rtol=1e-12)


@pytest.mark.parametrize('scale', [1e-7, 1e-4, 1e-2, 1.0])
def test_m29_no_spike_whatever_the_noise(scale):
  """With its own reward in mean and deviation, none exceeds √(G−1)."""
  noise = np.random.default_rng(0).standard_normal((64, 8))
  rewards = jnp.asarray(0.1 + scale * noise, jnp.float32)
  found = advantages.group_normalized(rewards, eps=0.0)
  assert float(jnp.max(jnp.abs(found))) < math.sqrt(7) + 1e-3


def test_m29_one_hundredth_of_reward_is_no_spike():
  """Leaving the sample out of the deviation would make this 260."""
  rewards = jnp.asarray([[0.1, 0.11, 0.1, 0.1]] * 2, jnp.float32)
  both = jnp.stack([rewards, rewards], axis=-1)
  for found in (
    *(fn(rewards) for fn in GROUPED),
    advantages.gdpo(both),
    advantages.leave_one_out_max(rewards, normalize=True),
  ):
    assert 0 < float(jnp.max(jnp.abs(found))) < 2.5


def test_m29_rewards_that_differ_by_rounding_count_as_equal():
  noisy = jnp.asarray([[0.1 + 0.2, 0.3, 0.3, 0.3], [0.3, 0.3, 0.3, 0.1 + 0.2]])
  for fn in (advantages.group_normalized, advantages.batch_normalized):
    np.testing.assert_array_equal(fn(noisy, eps=0.0), 0)
  both = jnp.stack([noisy, noisy], axis=-1)
  np.testing.assert_array_equal(advantages.gdpo(both, eps=0.0), 0)
  found = advantages.leave_one_out_max(noisy, normalize=True, eps=0.0)
  np.testing.assert_array_equal(found, 0)


def test_m29_batch_scale_is_one_for_all_prompts():
  rewards = jnp.asarray([[1.0, 0.0], [0.6, 0.4], [0.5, 0.5]])
  found = advantages.batch_normalized(rewards, eps=0.0)
  ratio = found / advantages.group_centered(rewards)
  std = np.std(np.asarray(rewards))
  np.testing.assert_allclose(ratio[:2], 1 / std, rtol=1e-12)


def test_gdpo_tells_apart_what_a_normalised_sum_does_not():
  """One reward or both differ: the sum of the rewards is scaled away."""
  rewards = jnp.asarray([[[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]])
  added = advantages.group_normalized(jnp.sum(rewards, axis=-1), eps=0.0)
  np.testing.assert_allclose(added[0], added[1])
  found = advantages.gdpo(rewards, eps=0.0)
  np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-12)
  with pytest.raises(Exception, match='weights'):
    advantages.gdpo(rewards, weights=(1.0,))


def test_gpg_undoes_the_share_of_uninformative_groups():
  rewards = jnp.asarray([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
  centered = advantages.group_centered(rewards)
  np.testing.assert_allclose(advantages.gpg(rewards), 2 * centered)
  found = advantages.gpg(rewards, counted='nonzero')
  np.testing.assert_allclose(found, centered)
  with pytest.raises(Exception, match='counted'):
    advantages.gpg(rewards, counted='all')


def test_pass_at_one_is_the_advantage_of_grpo():
  rewards = jnp.asarray(binary_groups(5))
  found = advantages.group_pass_at_k(rewards, k=1, eps=0.0)
  plain = advantages.group_normalized(rewards, eps=0.0)
  np.testing.assert_allclose(found, plain, atol=1e-12)
  four = np.asarray(advantages.group_pass_at_k(rewards, k=3))
  np.testing.assert_allclose(four.sum(axis=1), 0, atol=1e-9)
  assert abs(four[3, 0]) < abs(four[1, 0])  # common successes count less


def test_leave_one_out_max_is_unbiased_for_the_best_of_a_group():
  z, rewards = jnp.asarray([0.3, -0.5, 0.1]), jnp.asarray([1.0, -2.0, 0.5])
  group = 3
  arms = np.array(list(itertools.product(range(3), repeat=group)))

  def best(z):
    chance = jnp.prod(jax.nn.softmax(z)[arms], axis=1)
    return jnp.sum(chance * jnp.max(rewards[arms], axis=1))

  probs = jax.nn.softmax(z)
  a = advantages.leave_one_out_max(rewards[arms])
  chance = jnp.prod(probs[arms], axis=1)
  scores = jnp.eye(3) - probs[None, :]
  found = jnp.einsum('n,ng,ngv->v', chance, a, scores[arms])
  np.testing.assert_allclose(found, jax.grad(best)(z), atol=1e-12)


def process_arrays():
  rewards = jnp.asarray([[0, 1.0, 0, 2.0, 0], [0, 0, 0.5, 0, 0], [0.0] * 5])
  ends = jnp.asarray([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0] * 5], bool)
  mask = lengths_mask(5, 4, 3, width=5)
  return rewards, ends, mask, jnp.zeros(3, int)


def test_m32_one_step_at_the_end_is_the_outcome_advantage():
  rewards = jnp.asarray([[1.0, 0.0, 0.5, 2.0]])
  mask = lengths_mask(3, 5, 1, 4, width=5)
  ends = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  steps = jnp.where(ends, rewards.T, 0)
  found = advantages.group_process(steps, ends, mask, jnp.zeros(4, int))
  outcome = advantages.group_normalized(rewards).T
  expected = jnp.where(mask, outcome, 0)
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_m32_reversed_sum_of_scattered_steps():
  """A_t = Σ of the normalised rewards of the steps that end at t or later."""
  rng = np.random.default_rng(0)
  rewards, mask = rng.standard_normal((4, 6)), np.ones((4, 6), bool)
  ends = rng.random((4, 6)) < 0.4
  drawn = rewards[ends]
  scattered = np.where(ends, (rewards - drawn.mean()) / drawn.std(), 0)
  expected = np.cumsum(scattered[:, ::-1], axis=1)[:, ::-1]
  found = advantages.group_process(
    *map(jnp.asarray, (rewards, ends, mask)), jnp.zeros(4, int), eps=0.0
  )
  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_m32_piecewise_constant_up_to_the_last_step():
  found = np.asarray(advantages.group_process(*process_arrays(), eps=0.0))
  assert found[0, 0] == found[0, 1] != found[0, 2] == found[0, 3]
  np.testing.assert_array_equal(found[0, 4], 0)
  np.testing.assert_array_equal(found[1, 3:], 0)
  np.testing.assert_array_equal(found[2], 0)  # no steps
  mean, std = 3.5 / 3, np.std([1.0, 2.0, 0.5])
  np.testing.assert_allclose(found[0, 2], (2 - mean) / std)
  np.testing.assert_allclose(found[0, 0], (3 - 2 * mean) / std)


def test_m32_equal_steps_give_exactly_zero():
  _, ends, mask, groups = process_arrays()
  rewards = jnp.full(mask.shape, 0.1, jnp.float32)
  found = advantages.group_process(rewards, ends, mask, groups, eps=1e-12)
  np.testing.assert_array_equal(found, 0)
