"""Figures against exact rationals and enumeration."""

from fractions import Fraction
import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from postrain import evaluation


@pytest.mark.parametrize('n', [1, 2, 5, 16, 128, 1000])
def test_m76_pass_at_k_is_the_ratio_of_binomials(n):
  correct = np.unique(np.linspace(0, n, 9).astype(int))
  for k in sorted({1, n // 3 or 1, n // 2 or 1, n}):
    exact = [
      1 - Fraction(math.comb(n - int(c), k), math.comb(n, k)) for c in correct
    ]
    np.testing.assert_allclose(
      evaluation.pass_at_k(correct, n, k),
      [float(value) for value in exact],
      rtol=0,
      atol=1e-13,
    )


def test_m76_pass_at_k_counts_subsets():
  for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
    if c <= n and k <= n:
      draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
      share = sum(map(any, draws)) / len(draws)
      assert evaluation.pass_at_k(c, n, k) == pytest.approx(share, abs=1e-14)


@pytest.mark.parametrize('p', [0.0, 0.05, 0.5, 1.0])
def test_m76_pass_at_k_is_unbiased(p):
  n, k = 10, 4
  counts = np.arange(n + 1)
  chances = np.array(
    [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
  )
  mean = float(chances @ evaluation.pass_at_k(counts, n, k))
  assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_takes_ragged_problems_and_refuses_nonsense():
  found = evaluation.pass_at_k(np.array([1, 2]), np.array([4, 8]), 2)
  np.testing.assert_allclose(found, [1 - 3 / 6, 1 - 15 / 28], rtol=1e-14)
  for num_correct, num_samples, k, message in (
    (1, 4, 5, r'k=5.*\[1, 4\]'),
    (1, 4, 0, 'k=0'),
    (5, 4, 2, 'num_correct=5'),
    (-1, 4, 2, 'num_correct=-1'),
  ):
    with pytest.raises(ValueError, match=message):
      evaluation.pass_at_k(num_correct, num_samples, k)


def test_m103_majority():
  assert evaluation.majority(['3', '4', '4']) == '4'
  assert evaluation.majority(['4', '3', '3', '4']) == '4'
  assert evaluation.majority([None, None, '4']) == '4'
  assert evaluation.majority([None, None]) is None
  assert evaluation.majority([]) is None
  weights = [0.9, 0.2, 0.3]
  assert evaluation.majority(['3', '4', '4'], weights=weights) == '3'
  for wrong in ([1.0], [1.0, -1.0, 1.0], [1.0, float('nan'), 1.0]):
    with pytest.raises(ValueError, match='expected 3 numbers'):
      evaluation.majority(['3', '4', '4'], weights=wrong)


def test_wilson_interval_solves_its_quadratic():
  z = 1.959963984540054
  for successes, trials in ((0, 5), (1, 10), (7, 10), (500, 1319), (5, 5)):
    mean = successes / trials
    for p in evaluation.wilson_interval(successes, trials):
      # The ends are where the score test of p is on the edge.
      assert trials * (mean - p) ** 2 == pytest.approx(
        z**2 * p * (1 - p), abs=1e-10
      )
  assert evaluation.wilson_interval(0, 5)[0] == pytest.approx(0, abs=1e-15)
  assert evaluation.wilson_interval(0, 5)[1] > 0.4
  with pytest.raises(ValueError, match='num_successes=3'):
    evaluation.wilson_interval(3, 2)
  with pytest.raises(ValueError, match='at least one trial'):
    evaluation.wilson_interval(0, 0)
  with pytest.raises(ValueError, match='confidence=95'):
    evaluation.wilson_interval(1, 2, confidence=95.0)


def test_mean_interval_by_hand():
  mean, low, high = evaluation.mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
  spread = 1.959963984540054 * math.sqrt(5 / 3) / 2
  np.testing.assert_allclose(
    [mean, low, high], [2.5, 2.5 - spread, 2.5 + spread], rtol=1e-12
  )
  for interval in (evaluation.mean_interval, evaluation.bootstrap_interval):
    with pytest.raises(ValueError, match='1 values'):
      interval(np.array([1.0]))
    with pytest.raises(ValueError, match='confidence=0'):
      interval(np.array([1.0, 2.0]), confidence=0.0)


def test_bootstrap_interval_is_normal_for_many_and_profits_from_pairs():
  draws = np.random.default_rng(0)
  base = draws.normal(size=400)
  better = base + 0.1 + 0.1 * draws.normal(size=400)
  paired = evaluation.bootstrap_interval(better - base, num_resamples=2000)
  np.testing.assert_allclose(
    paired, evaluation.mean_interval(better - base), atol=2e-3
  )
  assert paired[1] > 0
  assert evaluation.bootstrap_interval(better, num_resamples=2000)[1] < 0.1
  again = evaluation.bootstrap_interval(better - base, num_resamples=2000)
  assert again == paired


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.data())
def test_m76_pass_at_k_grows_with_k_and_with_success(n, data):
  c = data.draw(st.integers(0, n))
  curve = [float(evaluation.pass_at_k(c, n, k)) for k in range(1, n + 1)]
  assert curve[0] == pytest.approx(c / n, abs=1e-12)
  assert all(a <= b + 1e-12 for a, b in itertools.pairwise(curve))
  assert curve[-1] == (1.0 if c else 0.0)


def test_calibration_error_is_its_loop_and_what_it_says():
  draw = np.random.default_rng(0)
  chances = np.append(draw.random(500), [0.0, 1.0])
  outcomes = (draw.random(502) < chances**2).astype(float)
  loop = 0.0
  for b in range(15):
    rows = [i for i, p in enumerate(chances) if min(int(p * 15), 14) == b]
    gap = sum(outcomes[i] - chances[i] for i in rows)
    loop += abs(gap) / len(chances)
  found = evaluation.calibration_error(chances, outcomes)
  assert found == pytest.approx(loop, abs=1e-12)
  half = np.full(4, 0.5)
  assert evaluation.calibration_error(half, np.array([1.0, 0, 0, 1])) == 0
  assert evaluation.calibration_error(half, np.ones(4)) == 0.5
  for bad in (half + 1, half * np.nan):
    with pytest.raises(ValueError, match=r'chances=.* must be in \[0, 1\]'):
      evaluation.calibration_error(bad, half)
  with pytest.raises(ValueError, match='num_bins=0'):
    evaluation.calibration_error(half, half, num_bins=0)
