"""How much a prompt weighs by its success rate, with and without the deviation.

A Bernoulli bandit with one logit: w_G(p) = E[ĝ] / ∇J, by the binomial sum over
the successes of a group and by sampled groups.
"""

import math

import jax.numpy as jnp
import numpy as np

from experiments.estimators.common import Check
from postrain import advantages

STUDY = '#33, weight of a prompt'
GROUPS = (4, 8, 16, 64)
RATES = (0.02, 0.05, 0.1, 0.3, 0.5)
PRINTED = dict(zip(RATES, (2.57, 2.47, 2.33, 1.96, 1.86), strict=True))
NUM_GROUPS = 40_000
DEVIATIONS = 4.5  # of the sampled mean: one false alarm in 1e5


def contributions(rewards: np.ndarray, p: float, normalize: bool) -> np.ndarray:
  """The estimate of each group over ∇J = p (1 − p)."""
  r = jnp.asarray(rewards)
  if normalize:
    a = advantages.group_normalized(r, eps=0.0)
  else:
    a = advantages.group_centered(r)
  return np.asarray(jnp.mean(a * (r - p), axis=1)) / (p * (1 - p))


def by_sum(p: float, group: int, normalize: bool) -> float:
  counts = np.arange(group + 1)
  chances = [
    math.comb(group, k) * p**k * (1 - p) ** (group - k) for k in counts
  ]
  rewards = (np.arange(group) < counts[:, None]).astype(float)
  return float(np.dot(chances, contributions(rewards, p, normalize)))


def by_samples(p: float, group: int, normalize: bool) -> tuple[float, float]:
  """Mean and its standard error."""
  rng = np.random.default_rng([group, round(1000 * p)])
  rewards = (rng.random((NUM_GROUPS, group)) < p).astype(float)
  found = contributions(rewards, p, normalize)
  return float(found.mean()), float(found.std() / math.sqrt(NUM_GROUPS))


def study() -> tuple[list[Check], dict]:
  """All checks, and the curves for the plot."""
  checks, samples = [], []
  for p, printed in PRINTED.items():
    label = f'with deviation, G 8, p {p}: sum'
    checks.append(Check(STUDY, label, by_sum(p, 8, True), printed, 6e-3))
  ends = by_sum(0.02, 8, True) / by_sum(0.5, 8, True)
  checks.append(Check(STUDY, 'G 8: w(0.02) / w(0.5)', ends, 1.38, 1e-2))
  limit = 0.5 / math.sqrt(0.02 * 0.98)
  checks.append(Check(STUDY, 'G to infinity: the same', limit, 3.57, 6e-3))
  for group in GROUPS:
    factor = (group - 1) / group
    for p in RATES:
      label = f'without, G {group}, p {p}: sum'
      found = by_sum(p, group, False)
      checks.append(Check(STUDY, label, found, factor, 1e-10))
      for normalize in (True, False):
        theory = by_sum(p, group, normalize)
        mean, error = by_samples(p, group, normalize)
        samples.append([group, p, normalize, mean, error])
        with_or_not = 'with deviation' if normalize else 'without'
        label = f'{with_or_not}, G {group}, p {p}: sampled'
        checks.append(Check(STUDY, label, mean, theory, DEVIATIONS * error))
  rates = np.linspace(0.02, 0.98, 49)
  curves = {g: [by_sum(p, g, True) for p in rates] for g in GROUPS}
  return checks, {'rates': list(rates), 'curves': curves, 'samples': samples}
