"""Analytic properties of weights, and the biases they cause."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import advantages, aggregation, losses, masks


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
  np.testing.assert_allclose(ratio[8], 1.387, atol=5e-4)
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


def length_gradient(weigh, advantage, *, group=3, q=0.4):
  """E[∇] of the logit of a long answer that is right more often."""
  rate = {0: 0.2, 1: 0.7}
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
  """Other normalisers scale the gradient by what the policy does."""
  chances, others = np.array([0.2, 0.4, 0.8]), advantages.leave_one_out
  factors = {}
  for name, weigh in WEIGHTS.items():
    pairs = [length_gradient(weigh, others, q=q) for q in chances]
    factors[name] = [found / truth for found, truth in pairs]
  np.testing.assert_allclose(factors['constant'], 1 / 4, rtol=1e-12)
  np.testing.assert_allclose(factors['sequence sum'], 1, rtol=1e-12)
  mean = chances / 1 + (1 - chances) / 4  # a length is priced by the other's
  np.testing.assert_allclose(factors['sequence mean'], mean, rtol=1e-12)
  assert np.ptp(factors['token mean']) > 0.1
  centered = advantages.group_centered
  found, truth = length_gradient(WEIGHTS['constant'], centered)
  np.testing.assert_allclose(4 * found, truth * 2 / 3, rtol=1e-12)


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
