"""Entropy, pass@k, and what more samples buy at test time."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import evaluation, logprobs


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def entropy(z):
  return float(logprobs.token_entropy(z))


def test_m71_uniform_entropy_and_its_unbiased_estimate():
  np.testing.assert_allclose(entropy(jnp.zeros(7)), np.log(7), rtol=1e-15)
  z = jnp.asarray(np.random.default_rng(0).standard_normal(7))
  logp = logprobs.token_logprobs(jnp.tile(z, (7, 1)), jnp.arange(7))
  np.testing.assert_allclose(-jnp.sum(jnp.exp(logp) * logp), entropy(z))


def test_m71_fit_recovers_its_coefficients():
  rates = np.array([1.4, 1.1, 0.9, 0.6, 0.3])
  rewards = -0.25 * np.exp(rates) + 0.9
  fit = evaluation.entropy_fit(rates, rewards)
  np.testing.assert_allclose(fit, [0.25, 0.9, 1.0, 0.65], rtol=1e-12)
  # From the first of a run to its end.
  early = evaluation.entropy_fit(rates[:2], rewards[:2])
  np.testing.assert_allclose(early.ceiling, 0.65, rtol=1e-12)
  noise = np.random.default_rng(0).normal(size=5)
  noisy = evaluation.entropy_fit(rates, rewards + noise)
  assert 0 <= noisy.r_squared < 1
  assert evaluation.entropy_fit(rates, np.ones(5)) == (0, 1, 1, 1)
  with pytest.raises(ValueError, match='1 different entropies'):
    evaluation.entropy_fit(np.ones(3), rewards[:3])


def test_m72_entropy_falls_by_a_covariance():
  """To first order in the step; policy gradient and natural gradient."""
  z = jnp.asarray([0.4, -0.9, 1.3, 0.0, 0.5])
  logp = jax.nn.log_softmax(z)
  p = jnp.exp(logp)
  q = jnp.asarray([1.0, 0.0, 2.0, -1.0, 0.3])
  advantage = q - jnp.sum(p * q)

  def covariance(x, y):
    return float(jnp.sum(p * x * y) - jnp.sum(p * x) * jnp.sum(p * y))

  value = jax.grad(lambda z: jnp.sum(jax.nn.softmax(z) * q))(z)
  np.testing.assert_allclose(value, p * advantage, rtol=1e-12)
  for direction in (p * advantage, advantage):
    slope = -covariance(logp, direction)
    errors = [
      abs((entropy(z + eta * direction) - entropy(z)) / eta - slope)
      for eta in (1e-3, 1e-4)
    ]
    assert errors[1] < 1e-3 * abs(slope)
    np.testing.assert_allclose(errors[0] / errors[1], 10, rtol=0.05)


def test_m76_ends_of_pass_at_k():
  counts = np.arange(9)
  np.testing.assert_allclose(evaluation.pass_at_k(counts, 8, 1), counts / 8)
  np.testing.assert_array_equal(evaluation.pass_at_k(counts, 8, 8), counts > 0)


def test_m76_curves_of_a_sharp_and_a_broad_policy_cross():
  """Half of the problems surely, or all of them seldom."""
  sharp, broad = np.array([32, 32, 0, 0]), np.full(4, 6)
  gaps = [
    np.mean(evaluation.pass_at_k(sharp, 32, k))
    - np.mean(evaluation.pass_at_k(broad, 32, k))
    for k in (1, 2, 4, 8, 16, 32)
  ]
  assert gaps[0] > 0 > gaps[-1]
  assert all(a >= b for a, b in itertools.pairwise(gaps))


def test_m102_best_of_n_with_a_perfect_verifier_is_pass_at_n():
  for n, p in itertools.product((1, 3, 5), (0.1, 0.7)):
    right = np.array(list(itertools.product([0.0, 1.0], repeat=n)))
    chance = np.prod(np.where(right > 0, p, 1 - p), axis=1)
    picked = right[np.arange(len(right)), evaluation.best_of_n(right)]
    np.testing.assert_allclose(chance @ picked, 1 - (1 - p) ** n, rtol=1e-12)
    found = evaluation.pass_at_k(right.sum(1).astype(int), n, n)
    np.testing.assert_array_equal(picked, found)


def test_m102_best_of_n_takes_the_earlier_and_refuses_nan():
  scores = np.array([[1.0, 3.0, 3.0], [-np.inf, -5.0, -9.0]])
  np.testing.assert_array_equal(evaluation.best_of_n(scores), [1, 1])
  with pytest.raises(ValueError, match='1 NaN'):
    evaluation.best_of_n(np.array([[1.0, np.nan]]))
  with pytest.raises(ValueError, match='every problem needs samples'):
    evaluation.best_of_n(np.zeros((2, 0)))


@pytest.mark.parametrize('n', [1, 2, 4, 16])
def test_m102_divergence_of_best_of_n(n):
  """A bound for few outcomes, and the limit for many without ties."""
  bound = evaluation.best_of_n_kl(n)
  gaps = []
  for outcomes in (2, 10, 10_000):
    below = np.arange(outcomes + 1) / outcomes
    best = np.diff(below**n)
    divergence = np.sum(best * np.log(best * outcomes))
    assert divergence <= bound + 1e-12
    gaps.append(bound - divergence)
  assert gaps[-1] < 1e-3
  assert gaps == sorted(gaps, reverse=True) or n == 1


def test_m102_divergence_wants_a_sample():
  assert evaluation.best_of_n_kl(1) == 0
  with pytest.raises(ValueError, match='n=0'):
    evaluation.best_of_n_kl(0)


def chance_of_majority(answer, probabilities, n, weights=None):
  """That the vote of n samples is ``answer``, by enumeration."""
  total = 0.0
  for votes in itertools.product(probabilities, repeat=n):
    scores = None if weights is None else [weights[v] for v in votes]
    if evaluation.majority(votes, weights=scores) == answer:
      total += math.prod(probabilities[v] for v in votes)
  return total


def test_m103_a_vote_tends_to_the_mode_right_or_wrong():
  likely = {'right': 0.5, 'wrong': 0.3, 'other': 0.2}
  unlikely = {'right': 0.3, 'wrong': 0.5, 'other': 0.2}
  rising = [chance_of_majority('right', likely, n) for n in (1, 3, 5, 7, 9)]
  falling = [chance_of_majority('right', unlikely, n) for n in (1, 3, 5, 7, 9)]
  assert all(a < b for a, b in itertools.pairwise(rising))
  assert all(a > b for a, b in itertools.pairwise(falling))
  np.testing.assert_allclose([rising[0], falling[0]], [0.5, 0.3])


def test_m103_a_scorer_can_turn_a_wrong_mode():
  unlikely = {'right': 0.3, 'wrong': 0.5, 'other': 0.2}
  scores = {'right': 0.9, 'wrong': 0.2, 'other': 0.2}
  for n in (3, 5, 7):
    weighted = chance_of_majority('right', unlikely, n, scores)
    assert weighted > 0.6
    assert chance_of_majority('right', unlikely, n) < 0.3


def test_m103_ties_and_abstentions():
  assert evaluation.majority(['b', 'a', 'a', 'b']) == 'b'
  assert evaluation.majority([None, None, 'a']) == 'a'
  scores = [0.1, 0.9]
  assert evaluation.majority(['b', 'a'], weights=scores) == 'a'
