"""Figures of an evaluation: pass@k, votes, selection, intervals, entropy."""

from collections.abc import Hashable, Sequence
import math
import statistics
from typing import NamedTuple

from jaxtyping import Float, Int
import numpy as np

__all__ = [
  'EntropyFit',
  'best_of_n',
  'best_of_n_kl',
  'bootstrap_interval',
  'calibration_error',
  'entropy_fit',
  'majority',
  'mean_interval',
  'pass_at_k',
  'wilson_interval',
]


def pass_at_k(
  num_correct: int | Int[np.ndarray, '*P'],
  num_samples: int | Int[np.ndarray, '*P'],
  k: int,
) -> Float[np.ndarray, '*P']:
  """Unbiased chance that one of ``k`` samples is right.

  pass@k = 1 - C(n-c, k) / C(n, k) = 1 - ∏_{i<k} (n-c-i) / (n-i)

  The product needs no large factorials. The plug-in 1 - (1 - c/n)^k, often seen
  in its place, is biased low.

  Args:
    num_correct: c of each problem, in [0, n].
    num_samples: n, of each problem or of all.
    k: draws without replacement, in [1, n].

  Returns:
    One estimate per problem; a figure of the data set is their mean.

  Raises:
    ValueError: a count is out of its range.

  References:
    Chen et al. 2021, Evaluating Large Language Models Trained on Code,
    arXiv:2107.03374.
  """
  correct, samples = np.broadcast_arrays(num_correct, num_samples)
  if k < 1 or (samples < k).any():
    raise ValueError(
      f'k={k}: it must be in [1, {samples.min(initial=k)}], the number of'
      ' samples; draw more samples or lower k'
    )
  if (correct < 0).any() or (correct > samples).any():
    raise ValueError(
      f'num_correct={num_correct}: it must be in [0, num_samples={num_samples}]'
    )
  drawn = np.arange(k)
  wrong = (samples - correct)[..., None] - drawn
  factors = np.maximum(wrong, 0) / (samples[..., None] - drawn)
  return np.asarray(1 - factors.prod(-1))


def majority(
  answers: Sequence[Hashable | None],
  *,
  weights: Sequence[float] | None = None,
) -> Hashable | None:
  """The answer with most votes (self-consistency); a tie goes to the earlier.

  argmax_a Σ_i w_i 1[a_i = a]

  Args:
    answers: extracted answers; None abstains.
    weights: scores of a verifier, not negative; None counts heads.

  Returns:
    The answer, or None if all abstain.

  Raises:
    ValueError: weights of the wrong number, negative or NaN.

  References:
    Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning in
    Language Models, arXiv:2203.11171.
  """
  if weights is None:
    weights = [1.0] * len(answers)
  if len(weights) != len(answers) or not all(w >= 0 for w in weights):
    raise ValueError(
      f'weights={weights!r:.80}: expected {len(answers)} numbers >= 0'
    )
  votes: dict[Hashable, float] = {}
  for answer, weight in zip(answers, weights, strict=True):
    if answer is not None:
      votes[answer] = votes.get(answer, 0.0) + weight
  return max(votes, key=votes.__getitem__, default=None)


def best_of_n(scores: Float[np.ndarray, 'P n']) -> Int[np.ndarray, ' P']:
  """The sample that a scorer likes best; a tie goes to the earlier.

  argmax_i s_i

  Args:
    scores: of the n samples of each problem; -inf takes one out.

  Returns:
    One index per problem.

  Raises:
    ValueError: no samples, or a score is NaN.

  References:
    Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems,
    arXiv:2110.14168.
  """
  if not scores.shape[1] or np.isnan(scores).any():
    raise ValueError(
      f'scores of shape {scores.shape} with {np.isnan(scores).sum()} NaN:'
      ' every problem needs samples with a score; -inf takes a sample out'
    )
  return scores.argmax(axis=1)


def best_of_n_kl(n: int) -> float:
  """Divergence of best-of-n sampling from the policy it samples.

  KL = log n - (n-1)/n

  Exact where no two completions have the same score and none has much mass, an
  upper bound otherwise. Plot a reward against its root beside that of a
  trained policy.

  Args:
    n: samples, at least 1.

  Returns:
    Nats.

  Raises:
    ValueError: n below 1.

  References:
    Stiennon et al. 2020, Learning to Summarize from Human Feedback,
    arXiv:2009.01325; Beirami et al. 2024, Theoretical Guarantees on the
    Best-of-n Alignment Policy, arXiv:2401.01879.
  """
  if n < 1:
    raise ValueError(f'n={n}: it must be at least 1')
  return math.log(n) - (n - 1) / n


class EntropyFit(NamedTuple):
  """R = -a exp(H) + b, its share of the variance, and R at H = 0."""

  a: float
  b: float
  r_squared: float
  ceiling: float


def entropy_fit(
  entropies: Float[np.ndarray, ' N'], rewards: Float[np.ndarray, ' N']
) -> EntropyFit:
  """Fit what reward a policy buys with its entropy.

  R = -a exp(H) + b, by least squares; at H = 0 nothing is left: b - a

  A regularity of runs that do not intervene in the entropy, no law: fit the
  first part of a run, and see whether the rest keeps to it.

  Args:
    entropies: mean entropy per token at each evaluation, in nats.
    rewards: mean reward or accuracy at the same.

  Returns:
    The fit; r_squared is 1 where all rewards are equal.

  Raises:
    ValueError: fewer than two different entropies.

  References:
    Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning for
    Reasoning Language Models, arXiv:2505.22617.
  """
  if len(np.unique(entropies)) < 2:
    raise ValueError(
      f'{len(np.unique(entropies))} different entropies determine no line: fit'
      ' at least 2 evaluations of a run'
    )
  x = np.exp(entropies) - np.exp(entropies).mean()
  y = rewards - rewards.mean()
  slope = float(x @ y / (x @ x))
  b = float(rewards.mean() - slope * np.exp(entropies).mean())
  total, residual = float(y @ y), float(np.square(y - slope * x).sum())
  r_squared = 1 - residual / total if total > 0 else 1.0
  return EntropyFit(-slope, b, r_squared, b + slope)


def wilson_interval(
  num_successes: int, num_trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
  """Interval of a proportion that stays in [0, 1] and is no point at 0 or 1.

  (p̂ + z²/2n ± z √(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n)

  Args:
    num_successes: in [0, num_trials].
    num_trials: independent trials, at least 1. The samples of one prompt are
      not independent: use `mean_interval` over the means of the prompts.
    confidence: in (0, 1).

  Raises:
    ValueError: a count or the confidence is out of its range.

  References:
    Wilson 1927, Probable Inference, the Law of Succession, and Statistical
    Inference.
  """
  if not 0 <= num_successes <= num_trials or not num_trials:
    raise ValueError(
      f'num_successes={num_successes}: it must be in [0, num_trials='
      f'{num_trials}], of at least one trial'
    )
  z, n = _normal_quantile(confidence), num_trials
  p = num_successes / n
  center = p + z**2 / (2 * n)
  spread = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
  low, high = (center - spread, center + spread)
  scale = 1 + z**2 / n
  return max(0.0, low / scale), min(1.0, high / scale)


def mean_interval(
  values: Float[np.ndarray, ' P'], *, confidence: float = 0.95
) -> tuple[float, float, float]:
  """Mean and its normal interval, x̄ ± z s / √P.

  For two policies on the same prompts pass the differences: pairing removes
  the spread between prompts.

  Args:
    values: one figure per prompt, at least two.
    confidence: in (0, 1).

  Returns:
    Mean, lower and upper end.

  Raises:
    ValueError: fewer than two values, or the confidence is out of its range.
  """
  z = _normal_quantile(confidence)
  _check_count(values)
  mean = float(values.mean())
  spread = z * float(values.std(ddof=1)) / len(values) ** 0.5
  return mean, mean - spread, mean + spread


def bootstrap_interval(
  values: Float[np.ndarray, ' P'],
  *,
  confidence: float = 0.95,
  num_resamples: int = 10_000,
  seed: int = 0,
) -> tuple[float, float, float]:
  """Mean and its percentile bootstrap interval.

  Prompts are drawn with replacement. Pass differences to compare two policies
  on the same prompts (the paired bootstrap).

  Args:
    values: one figure per prompt, at least two.
    confidence: in (0, 1).
    num_resamples: draws of the whole set.
    seed: of the draws.

  Returns:
    Mean, lower and upper end.

  Raises:
    ValueError: fewer than two values, or the confidence is out of its range.

  References:
    Efron 1979, Bootstrap Methods: Another Look at the Jackknife.
  """
  _normal_quantile(confidence)
  _check_count(values)
  draws = np.random.default_rng(seed)
  # One resample at a time: all at once would be num_resamples x P figures.
  means = [
    values[draws.integers(len(values), size=len(values))].mean()
    for _ in range(num_resamples)
  ]
  tail = (1 - confidence) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  return float(values.mean()), float(low), float(high)


def calibration_error(
  chances: Float[np.ndarray, ' N'],
  outcomes: Float[np.ndarray, ' N'],
  *,
  num_bins: int = 15,
) -> float:
  """How far stated chances are from what happens: the ECE.

  Σ_b (n_b / N) |mean outcome of b − mean chance of b|,  b of equal width

  Of preferences take the side that a model is for: chances σ(|m|) of a margin
  m, outcomes 1 where m > 0 and ½ where it is 0. The chosen always comes first:
  with σ(m) and outcomes of 1 it would be the mean error.

  Args:
    chances: in [0, 1].
    outcomes: what happened, in [0, 1].
    num_bins: of [0, 1].

  Raises:
    ValueError: nothing, or a number is out of its range.

  References:
    Naeini et al. 2015, Obtaining Well Calibrated Probabilities Using Bayesian
    Binning; Guo et al. 2017, On Calibration of Modern Neural Networks,
    arXiv:1706.04599.
  """
  if num_bins < 1 or not len(chances):
    raise ValueError(
      f'num_bins={num_bins} of {len(chances)} chances: there must be at least 1'
    )
  for name, values in (('chances', chances), ('outcomes', outcomes)):
    if not ((values >= 0) & (values <= 1)).all():
      raise ValueError(f'{name}={values!r:.80}: they must be in [0, 1]')
  bins = np.minimum((chances * num_bins).astype(int), num_bins - 1)
  gaps = np.bincount(bins, weights=outcomes - chances, minlength=num_bins)
  return float(np.abs(gaps).sum() / len(chances))


def _check_count(values: np.ndarray) -> None:
  if len(values) < 2:
    raise ValueError(
      f'{len(values)} values have no spread: evaluate on at least 2 prompts'
    )


def _normal_quantile(confidence: float) -> float:
  if not 0 < confidence < 1:
    raise ValueError(f'confidence={confidence}: it must be in (0, 1)')
  return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
