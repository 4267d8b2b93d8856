"""Analytic properties of advantages, weights and shaped rewards."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import advantages, aggregation, importance, losses, masks, shaping

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


def binomial(size: int, p: float):
  return np.array(
    [math.comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(size + 1)]
  )


def test_m03_sequences_that_end_early_are_a_distribution():
  """The tokens after a stop token (0) are masked."""
  tokens, logp = tabular.SEQUENCES, tabular.logprobs(tabular.random_policy(0))
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


def test_m05_leaving_one_out_varies_less_than_raw_rewards():
  probs, rewards = np.array([0.5, 0.2, 0.3]), np.array([2.0, 1.0, 3.0])
  raw = bandit_variance(lambda r: r, probs, rewards, 3)
  assert bandit_variance(advantages.leave_one_out, probs, rewards, 3) < raw


def test_m05_optimal_scalar_baseline():
  """b* = E[‖∇log π‖² r] / E[‖∇log π‖²] has the least variance."""
  probs, rewards = np.array([0.5, 0.2, 0.3]), np.array([2.0, 1.0, 3.0])
  norms = np.sum((np.eye(3) - probs) ** 2, axis=1)
  best = probs @ (norms * rewards) / (probs @ norms)
  variance = {
    b: bandit_variance(lambda r, b=b: r - b, probs, rewards, 1)
    for b in (best, best - 0.1, best + 0.1, probs @ rewards)
  }
  assert min(variance, key=variance.get) == best


def test_m05_length_weighted_baseline_is_the_mean_for_equal_lengths():
  rewards = jnp.asarray([[0.3, 1.0, -2.0]])
  lengths = jnp.asarray([[5, 5, 5]])
  found = advantages.optimal_baseline(rewards, lengths)
  np.testing.assert_allclose(found, advantages.group_centered(rewards))
  long = advantages.optimal_baseline(rewards, jnp.asarray([[1, 0, 3]]))
  np.testing.assert_allclose(long, rewards + 1.425)


def test_m06_returns_belong_to_advantages_before_whitening():
  rng = np.random.default_rng(0)
  rewards, values = jnp.asarray(rng.standard_normal((2, 3, 5)))
  mask = jnp.asarray(rng.random((3, 5)) < 0.7)
  a = advantages.gae(rewards, values, mask)
  returns = advantages.lambda_returns(rewards, values, mask)
  np.testing.assert_allclose(returns, jnp.where(mask, a + values, 0))


def lengths_mask(*lengths, width=8):
  return jnp.arange(width)[None, :] < jnp.asarray(lengths)[:, None]


def test_m09_worked_example_gradients():
  """Ratio 1, advantage 2, lengths 4 and 7: gradients of single tokens."""
  mask = lengths_mask(4, 7)
  logp = jnp.full(mask.shape, -1, float)
  a = jnp.full(mask.shape, 2, float)

  def gradient(weights):
    def total(x):
      values = losses.ppo_clip(x, logp, a, mask)[0]
      return -jnp.sum(weights * values)

    return jax.grad(total)(logp)

  # Of each row by itself, as printed: without the mean over rows.
  mean = gradient(2 * aggregation.sequence_mean(mask)) / 2
  constant = gradient(2 * aggregation.constant_length(mask, length=7)) / 2
  np.testing.assert_allclose(mean[:, 0], [0.25, 1 / 7], rtol=1e-12)
  np.testing.assert_allclose(constant[:, 0], [1 / 7, 1 / 7], rtol=1e-12)
  for found, lengths in ((mean, (4, 7)), (constant, (4, 7))):
    np.testing.assert_array_equal((found != 0).sum(axis=1), lengths)


@pytest.mark.parametrize(
  ('fn', 'options'),
  [
    (aggregation.token_mean, {}),
    (aggregation.sequence_mean, {}),
    (aggregation.sequence_sum, {}),
    (aggregation.constant_length, {'length': 9}),
  ],
)
def test_m09_the_cut_into_slices_does_not_matter(fn, options):
  mask = lengths_mask(4, 7, 0, 2)
  values = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)))
  weights = fn(mask, **options)
  whole = jnp.sum(weights * values)
  for cut in (1, 2):
    slices = [slice(i, i + cut) for i in range(0, 4, cut)]
    parts = sum(jnp.sum(weights[s] * values[s]) for s in slices)
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_m09_conventions_of_the_peers_are_choices():
  """Empty rows counted or not; rejected tokens in the denominator or not."""
  counted = lengths_mask(4, 0, 2)
  trained = counted.at[2].set(False)
  kept = jnp.where(trained, aggregation.token_mean(counted), 0)
  np.testing.assert_allclose(kept[0, 0], 1 / 6)
  np.testing.assert_allclose(aggregation.token_mean(trained)[0, 0], 1 / 4)
  for fn in (aggregation.sequence_mean, aggregation.sequence_sum):
    with_empty = fn(counted, count_empty=True)
    np.testing.assert_allclose(3 * with_empty, 2 * fn(counted))


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
  np.testing.assert_allclose(total(*arrays), total(*moved), rtol=1e-12)


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


def std_weight(p: float, group: int, *, normalize=True) -> float:
  """E[ĝ] / ∇J of a Bernoulli bandit: how much a prompt of rate p weighs."""
  rewards = jnp.asarray(binary_groups(group))
  fn = advantages.leave_one_out
  if normalize:
    fn = lambda r: advantages.group_normalized(r, eps=0.0)  # noqa: E731
  estimate = jnp.mean(fn(rewards) * (rewards - p), axis=1)
  return float(binomial(group, p) @ np.asarray(estimate)) / (p * (1 - p))


@pytest.mark.parametrize(
  ('p', 'printed'),
  [(0.02, 2.57), (0.05, 2.47), (0.1, 2.33), (0.3, 1.96), (0.5, 1.86)],
)
def test_m33_weight_of_a_prompt_by_its_rate(p, printed):
  np.testing.assert_allclose(std_weight(p, 8), printed, atol=6e-3)
  np.testing.assert_allclose(std_weight(p, 8, normalize=False), 1, rtol=1e-12)


def test_m33_weight_is_bounded_and_tends_to_its_limit():
  ratio = {g: std_weight(0.02, g) / std_weight(0.5, g) for g in (8, 64, 512)}
  np.testing.assert_allclose(ratio[8], 1.38, atol=1e-2)
  limit = 0.5 / math.sqrt(0.02 * 0.98)
  np.testing.assert_allclose(limit, 3.57, atol=5e-3)
  assert ratio[8] < ratio[64] < ratio[512] < 1.1 * limit
  np.testing.assert_allclose(ratio[512], limit, rtol=0.1)


def test_m33_hopeless_and_solved_groups_weigh_nothing():
  found = advantages.group_normalized(jnp.asarray(binary_groups(8)))
  np.testing.assert_array_equal(found[0], 0)
  np.testing.assert_array_equal(found[-1], 0)


WEIGHTS = {
  'sequence mean': aggregation.sequence_mean,
  'token mean': aggregation.token_mean,
  'sequence sum': aggregation.sequence_sum,
  'constant': lambda m: aggregation.constant_length(m, length=4.0),
}


def length_drift(weigh, advantage, *, group=3):
  """E[∇] of the logits of a long answer, when it is wrong and when right.

  The answer is right or wrong first (probability 0.3), then the policy chooses
  a length of 1 or 4 with a logit for either case; the length decides nothing.
  """
  p, q = 0.3, 0.5
  kinds = list(itertools.product((0, 1), (0, 1)))  # right, long
  chance = {(r, n): (p if r else 1 - p) * q for r, n in kinds}
  drift = np.zeros(2)
  for group_kinds in itertools.product(kinds, repeat=group):
    right, long = np.array(group_kinds).T
    mask = lengths_mask(*np.where(long, 4, 1), width=4)
    a = advantage(jnp.asarray(right[None].astype(float)))[0]
    pull = np.asarray(weigh(mask))[:, 0] * np.asarray(a) * (long - q)
    weight = math.prod(chance[k] for k in group_kinds)
    drift += weight * np.array([pull[right == r].sum() for r in (0, 1)])
  return drift


def test_m34_only_a_constant_normaliser_leaves_the_length_alone():
  found = {
    name: length_drift(fn, advantages.leave_one_out)
    for name, fn in WEIGHTS.items()
  }
  for name in ('sequence sum', 'constant'):
    np.testing.assert_allclose(found[name], 0, atol=1e-12)
  wrong, right = found['sequence mean']
  assert wrong > 1e-2  # wrong answers grow
  assert right < -1e-2  # right answers shrink
  assert 1e-4 < abs(found['token mean'][0]) < wrong


def length_gradient(weigh, advantage, *, group=3):
  """E[∇] of the logit of a long answer that is right more often."""
  q, rate = 0.4, {0: 0.2, 1: 0.7}
  kinds = list(itertools.product((0, 1), (0, 1)))
  chance = {
    (r, n): (q if n else 1 - q) * (rate[n] if r else 1 - rate[n])
    for r, n in kinds
  }
  total = 0.0
  for group_kinds in itertools.product(kinds, repeat=group):
    right, long = np.array(group_kinds).T
    mask = lengths_mask(*np.where(long, 4, 1), width=4)
    a = advantage(jnp.asarray(right[None].astype(float)))[0]
    pull = np.asarray(weigh(mask))[:, 0] * np.asarray(a) * (long - q)
    total += math.prod(chance[k] for k in group_kinds) * pull.sum()
  return total, q * (1 - q) * (rate[1] - rate[0])


def test_m34_unbiased_with_a_constant_and_a_baseline_of_others():
  constant, others = WEIGHTS['constant'], advantages.leave_one_out
  found, truth = length_gradient(constant, others)
  np.testing.assert_allclose(4 * found, truth, rtol=1e-12)
  found, _ = length_gradient(constant, advantages.group_centered)
  np.testing.assert_allclose(4 * found, truth * 2 / 3, rtol=1e-12)
  found, _ = length_gradient(WEIGHTS['sequence mean'], others)
  assert abs(4 * found / truth - 1) > 0.1


def test_m35_dr_grpo_is_a_scale_away_from_grpo_and_from_rloo():
  """Equal lengths L and unit deviation: GRPO = (C/L) Dr. GRPO."""
  rewards = jnp.asarray([[1.0, -1.0, 1.0, -1.0]])
  mask = lengths_mask(5, 5, 5, 5)
  normalized = advantages.group_normalized(rewards, eps=0.0).T
  centered = advantages.group_centered(rewards).T
  grpo = aggregation.sequence_mean(mask) * normalized
  dr_grpo = aggregation.constant_length(mask, length=16) * centered
  np.testing.assert_allclose(grpo, 16 / 5 * dr_grpo, rtol=1e-12)
  others = advantages.leave_one_out(rewards).T
  np.testing.assert_allclose(others, 4 / 3 * centered, rtol=1e-12)


@pytest.mark.parametrize(
  ('p', 'group', 'printed'),
  [(0.5, 8, 0.992), (0.05, 8, 0.337), (0.01, 64, 0.474)],
)
def test_m38_retained_fraction_of_large_groups(p, group, printed):
  kept = masks.informative_groups(jnp.asarray(binary_groups(group)))
  found = binomial(group, p) @ np.asarray(kept)
  np.testing.assert_allclose(found, printed, atol=5e-4)


def test_m39_long_responses_dominate_by_their_length():
  rows = np.asarray(aggregation.token_mean(lengths_mask(2, 6))).sum(axis=1)
  np.testing.assert_allclose(rows, [0.25, 0.75])


def test_m40_window_is_continuous_with_slope_one_over_its_length():
  lengths = jnp.arange(0, 40)
  found = np.asarray(shaping.soft_overlong(lengths, max_length=24, buffer=8))
  np.testing.assert_array_equal(found[:17], 0)
  np.testing.assert_allclose(np.diff(found[16:25]), -1 / 8)
  np.testing.assert_array_equal(found[24:], -1)
  unbounded = np.asarray(
    shaping.soft_overlong(lengths, max_length=24, buffer=8, capped=False)
  )
  np.testing.assert_array_equal(unbounded[:25], found[:25])
  np.testing.assert_allclose(np.diff(unbounded[16:]), -1 / 8)


def test_m41_a_price_on_length_is_a_price_on_tokens():
  mask = lengths_mask(0, 3, 8)
  price = shaping.length_penalty(jnp.sum(mask, axis=1), coef=0.1)
  tokens = advantages.discounted_returns(jnp.where(mask, -0.1, 0), mask)
  np.testing.assert_allclose(price, tokens[:, 0], atol=1e-15)


def test_m41_the_optimum_moves():
  lengths = jnp.arange(1, 30)
  gain = jnp.log(lengths.astype(float))
  best = {
    coef: int(jnp.argmax(gain + shaping.length_penalty(lengths, coef=coef)))
    for coef in (0.0, 0.1, 0.5)
  }
  assert [int(lengths[i]) for i in best.values()] == [29, 10, 2]


def test_m63_differences_telescope_and_their_returns_forget_the_past():
  rng = np.random.default_rng(0)
  scores = jnp.asarray(rng.random((2, 7)))
  ends = jnp.asarray([[0, 1, 0, 0, 1, 1, 0], [0] * 7], bool)
  initial = jnp.asarray([0.3, 0.4])
  found = shaping.difference_rewards(scores, initial, ends)
  expected = [scores[0, 5] - 0.3, 0]
  np.testing.assert_allclose(jnp.sum(found, axis=1), expected, atol=1e-15)
  mask = jnp.ones_like(ends)
  to_go = advantages.discounted_returns(found, mask)
  np.testing.assert_allclose(to_go[0, 2], scores[0, 5] - scores[0, 1])
  np.testing.assert_array_equal(to_go[0, 6], 0)


def test_m63_differences_of_the_value_keep_the_gradient():
  """With scores P(success | prefix), the last of them the outcome."""
  policy, rewards = tabular.random_policy(0), tabular.rewards()
  probs = tabular.probabilities(policy)
  first = tabular.SEQUENCES[:, :1] == tabular.SEQUENCES[None, :, 0]
  first = first.astype(float)
  prefix = first @ (probs * rewards) / (first @ probs)
  scores = jnp.stack([prefix, rewards], axis=1)
  initial = jnp.full(len(rewards), jnp.sum(probs * rewards))
  steps = shaping.difference_rewards(scores, initial, tabular.MASK)
  a = advantages.discounted_returns(steps, tabular.MASK)

  def loss(x):
    return losses.reinforce(x, x, a, tabular.MASK)[0]

  found = tabular.expected_gradient(loss, policy)
  truth = jax.grad(lambda p: -jnp.sum(tabular.probabilities(p) * rewards))
  assert tabular.gap(found, truth(policy)) < 1e-12


def smoothed(rewards, logp, **options):
  coefs = {'positive_coef': 0.1, 'negative_coef': 0.2} | options
  lengths = jnp.full(rewards.shape, 4)
  return advantages.differential_smoothing(rewards, logp, lengths, **coefs)


def test_m75_zero_coefficients_change_nothing():
  rewards = jnp.asarray([[1.0, 0.0, 1.0, 0.0]])
  logp = jnp.asarray([[-1.0, -2.0, -8.0, -9.0]])
  found = smoothed(rewards, logp, positive_coef=0.0, negative_coef=0.0)
  plain = advantages.group_normalized(rewards)
  np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_m75_rare_right_answers_gain_and_rare_wrong_ones_lose():
  rewards = jnp.asarray([[1.0, 0.0, 1.0, 0.0]])
  logp = jnp.asarray([[-1.0, -1.0, -8.0, -8.0]])
  right, wrong, rare_right, rare_wrong = smoothed(rewards, logp)[0]
  assert rare_right > right
  assert rare_wrong < wrong
  solved = smoothed(jnp.ones((1, 4)), logp)
  np.testing.assert_allclose(solved, -0.1 * logp)  # a signal of its own
  recentered = smoothed(rewards, logp, recenter=True)
  np.testing.assert_allclose(jnp.sum(recentered), 0, atol=1e-12)
  normed = smoothed(jnp.ones((1, 4)), logp, length_norm=True)
  np.testing.assert_allclose(normed, solved / 4)


def test_m75_optimum_flattens_the_right_answers():
  """π ∝ π_base^(1−γ/β) e^(1/β) there, with KL to the base model."""
  base, beta, gamma = np.array([0.5, 0.1, 0.25, 0.15]), 0.5, 0.2
  logp = jnp.log(jnp.asarray(base))[None]
  bonus = smoothed(
    jnp.ones((1, 4)), logp, positive_coef=gamma, negative_coef=0.0
  )[0]
  best = base * np.exp((1 + np.asarray(bonus)) / beta)
  expected = base ** (1 - gamma / beta)
  np.testing.assert_allclose(
    best / best.sum(), expected / expected.sum(), rtol=1e-12
  )


def test_m86_shortest_right_half_longest_minus_half_short_wrong_nothing():
  rewards = jnp.asarray([[1.0, 1.0, 0.0, 0.0, 1.0], [1.0] * 5])
  lengths = jnp.asarray([[2, 10, 2, 10, 6], [7] * 5])
  found = shaping.length_reward(rewards, lengths)
  np.testing.assert_allclose(found, [[0.5, -0.5, 0, -0.5, 0], [0] * 5])


def test_m98_a_shortcut_scores_alpha_or_nothing():
  outcome = jnp.asarray([1.0, 1.0, 0.0])
  process = jnp.asarray([1.0, 0.0, 1.0])
  found = shaping.composite(outcome, process, outcome_weight=0.2)
  np.testing.assert_allclose(found, [1, 0.2, 0.8])
  strict = shaping.strict_composite(outcome, process)
  np.testing.assert_array_equal(strict, [1, 0, 0])
  thirds = jnp.asarray([1 / 3 + 1 / 3 + 1 / 3], jnp.float32)
  assert shaping.strict_composite(jnp.ones(1), thirds)[0] == 1


def test_m59_format_alone_earns_its_weight():
  rewards = jnp.asarray([[1.0, 1.0], [0.0, 1.0]])
  found = shaping.weighted_sum(rewards, weights=(1.0, 0.1))
  np.testing.assert_allclose(found, [1.1, 0.1])
  with pytest.raises(Exception, match='weights'):
    shaping.weighted_sum(rewards, weights=(1.0,))


def test_m64_consistency_is_a_share():
  mask = lengths_mask(4, 4, 0, 3, width=4)
  language = lengths_mask(4, 1, 4, 0, width=4)
  found = shaping.language_consistency(language, mask)
  np.testing.assert_allclose(found, [1, 0.25, 0, 0])


def test_repetition_counts_what_is_not_new():
  tokens = jnp.asarray([[1, 1, 1, 1], [1, 2, 3, 4], [1, 2, 1, 2]])
  mask = jnp.ones_like(tokens, bool)
  found = shaping.repetition_penalty(tokens, mask, ngram_size=2)
  np.testing.assert_allclose(found, [-2 / 3, 0, -1 / 3])
  short = shaping.repetition_penalty(tokens, mask, ngram_size=9)
  np.testing.assert_array_equal(short, 0)


def test_m107_a_single_turn_is_the_whole_trajectory():
  mask = lengths_mask(3, 5, width=6)
  last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  a = advantages.group_normalized(jnp.asarray([[2.0, -1.0]])).T
  turns = jnp.zeros(mask.shape, int)
  rewards = jnp.where(last, a, 0)
  for discount in (1.0, 0.5):
    found = advantages.turn_returns(rewards, mask, turns, discount=discount)
    np.testing.assert_allclose(found, jnp.where(mask, a, 0))


def dialogue():
  rng = np.random.default_rng(0)
  mask = jnp.asarray([[0, 1, 1, 0, 0, 1, 0, 1, 1, 1]], bool)
  turns = jnp.asarray([[0, 1, 1, 2, 2, 3, 3, 4, 4, 5]])
  return *map(jnp.asarray, rng.standard_normal((2, 1, 10))), mask, turns


def test_m107_undiscounted_is_the_monte_carlo_return_at_turn_starts():
  rewards, values, mask, turns = dialogue()
  found = advantages.turn_returns(rewards, mask, turns)
  plain = advantages.discounted_returns(rewards, mask)
  starts = np.array([1, 5, 7, 9])
  np.testing.assert_allclose(found[0, starts], plain[0, starts])
  assert found[0, 1] == found[0, 2]
  a = advantages.turn_gae(rewards, values, mask, turns, lambda_=1.0)
  expected = plain[0, starts] - values[0, starts]
  np.testing.assert_allclose(a[0, starts], expected, atol=1e-12)


def test_m107_turns_of_one_token_are_plain_gae():
  rewards, values, mask, _ = dialogue()
  turns = jnp.arange(10)[None]
  options = {'discount': 0.9, 'lambda_': 0.8}
  np.testing.assert_allclose(
    advantages.turn_gae(rewards, values, mask, turns, **options),
    advantages.gae(rewards, values, mask, **options),
  )


def test_m107_tokens_of_the_environment_have_no_gradient():
  rewards, _, mask, turns = dialogue()
  a = advantages.turn_returns(rewards, mask, turns)
  logp = jnp.full(mask.shape, -1.0)
  gradient = jax.grad(lambda x: jnp.sum(losses.reinforce(x, logp, a, mask)[0]))(
    logp
  )
  np.testing.assert_array_equal(gradient[~mask], 0)
  assert np.all(np.asarray(gradient[mask]) != 0)


def test_m107_credit_by_turn_varies_less_than_by_trajectory():
  """Key, then door: two choices, the door opens for who has the key."""
  choices = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=2)))
  probs = jnp.asarray([[0.6, 0.3]])
  chance = jnp.prod(jnp.where(choices > 0, probs, 1 - probs), axis=1)
  rewards = choices.at[:, 1].multiply(choices[:, 0])
  mask = jnp.ones_like(choices, bool)
  by_turn = advantages.turn_returns(rewards, mask, jnp.asarray([[0, 1]] * 4))
  whole = advantages.turn_returns(rewards, mask, jnp.zeros((4, 2), int))
  found = {}
  for name, a in (('turn', by_turn), ('whole', whole)):
    estimate = a * (choices - probs)  # of the two logits
    mean = chance @ estimate
    spread = chance @ jnp.square(estimate - mean[None])
    found[name] = mean, jnp.sum(spread)
  np.testing.assert_allclose(found['turn'][0], found['whole'][0], rtol=1e-12)
  assert found['turn'][1] < found['whole'][1]
