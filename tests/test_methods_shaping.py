"""Analytic properties of shaped rewards and of credit by turn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import advantages, losses, shaping


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def lengths_mask(*lengths, width=8):
  return jnp.arange(width)[None, :] < jnp.asarray(lengths)[:, None]


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


def tabular_slope(rewards, scores):
  """Expected gradient with the differences of step scores [N T] added."""
  policy, mask = tabular.random_policy(0), tabular.MASK
  steps = shaping.difference_rewards(scores, jnp.full(len(rewards), 0.3), mask)
  steps = steps.at[:, -1].add(rewards)
  a = advantages.discounted_returns(steps, mask)

  def loss(x):
    return losses.reinforce(x, x, a, mask)[0]

  return tabular.expected_gradient(loss, policy)


def test_m63_differences_beside_the_outcome_keep_the_optimum_or_do_not():
  """A potential has to end at a constant, or as the outcome itself.

  Scores of prefixes cancel; that of the whole solution is one more reward.
  """
  rewards = tabular.rewards()
  prefix = tabular.rewards(3)[tabular.SEQUENCES[:, 0]]

  def truth(values):
    return jax.grad(lambda p: -jnp.sum(tabular.probabilities(p) * values))(
      tabular.random_policy(0)
    )

  for last, optimised in (
    (jnp.zeros(9), rewards),
    (rewards, 2 * rewards),
    (-2 * rewards, -rewards),
  ):
    scores = jnp.stack([prefix, last], axis=1)
    found = tabular_slope(rewards, scores)
    assert tabular.gap(found, truth(optimised)) < 1e-12


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


@pytest.mark.parametrize('alpha', [0.1, 0.5])
def test_m59_format_alone_wins_only_beyond_the_accuracy_it_costs(alpha):
  """Tags and nonsense earn α; an answer without tags its accuracy."""
  outcomes = jnp.asarray([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
  hack, wrong, right = shaping.weighted_sum(outcomes, weights=(1.0, alpha))
  for accuracy in (0.05, 0.3, 0.7):
    plain = accuracy * right + (1 - accuracy) * wrong
    assert (plain > hack) == (alpha < accuracy)


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
