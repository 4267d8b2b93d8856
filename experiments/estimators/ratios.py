"""Token ratios as an approximation, and the spread of their products."""

import math

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from experiments.estimators.common import Check
from postrain import importance
from postrain.tasks.tabular import enumeration

ORDER = '#66, order of the token objective'
SPREAD = '#67, spread of ratios'
VOCAB = 3
STEPS = (0.04, 0.02, 0.01, 0.005)
SIZE = 0.05  # deviation of one token's log-ratio
LENGTHS = (10, 30, 100, 300, 1000)
NUM_SEQUENCES = 20_000


def slope(x: tuple[float, ...], y: list[float]) -> float:
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def approximation(length: int) -> dict[str, list[float]]:
  """Gaps of the two objectives and of their gradients at each step."""
  rng = np.random.default_rng(length)
  nodes = sum(VOCAB**t for t in range(length))
  base, step = jnp.asarray(rng.standard_normal((2, nodes, VOCAB)))
  rewards = jnp.asarray(rng.standard_normal(VOCAB**length))
  old = enumeration({'logits': base}, length=length)
  chance = jnp.exp(jnp.sum(old.logprobs, axis=1))

  def objective(logits: Array, tokens: bool) -> Array:
    now = enumeration({'logits': logits}, length=length)
    args = (now.logprobs, old.logprobs, old.mask)
    if tokens:
      factor = jnp.sum(importance.ratio(*args), axis=1) - (length - 1)
    else:
      factor = importance.product_ratio(*args)
    return jnp.sum(chance * rewards * factor)

  def gaps(size: float) -> tuple[float, float]:
    both = [
      jax.value_and_grad(objective)(base + size * step, tokens)
      for tokens in (False, True)
    ]
    (whole, gradient), (parts, other) = both
    off = jnp.linalg.norm(gradient - other) / jnp.linalg.norm(gradient)
    return float(jnp.abs(whole - parts)), float(off)

  values, gradients = zip(*(gaps(size) for size in STEPS), strict=True)
  at_start = gaps(0.0)
  return {
    'objective': list(values),
    'gradient': list(gradients),
    'start': list(at_start),
  }


def quadrature(length: int) -> tuple[float, float]:
  """Variance of the product and effective share, by Gauss and Hermite.

  The sum of the log-ratios is normal with variance T s², so that a sequence
  stands for each node.
  """
  nodes, weights = np.polynomial.hermite_e.hermegauss(80)
  weights = jnp.asarray(weights / weights.sum())
  spread = length * SIZE**2
  total = math.sqrt(spread) * nodes - spread / 2
  logs = jnp.asarray(np.repeat(total[:, None] / length, length, axis=1))
  mask = jnp.ones(logs.shape, bool)
  found = importance.product_ratio(logs, jnp.zeros_like(logs), mask)
  mean = jnp.sum(weights * found)
  second = jnp.sum(weights * jnp.square(found))
  return float(second - mean**2), float(mean**2 / second)


def sampled(length: int) -> dict[str, float]:
  """The same and GSPO's mean, from drawn token ratios."""
  rng = np.random.default_rng(length)
  logs = rng.standard_normal((NUM_SEQUENCES, length)) * SIZE - SIZE**2 / 2
  logs = jnp.asarray(logs)
  mask = jnp.ones(logs.shape, bool)
  args = (logs, jnp.zeros_like(logs), mask)
  products = importance.product_ratio(*args)
  means = importance.sequence_ratio(*args)
  every = jnp.ones(len(logs), bool)
  return {
    'product': float(jnp.var(products)),
    'mean': float(jnp.var(means)),
    'share': float(importance.effective_sample_size(products, every)),
    'mean_share': float(importance.effective_sample_size(means, every)),
  }


def study() -> tuple[list[Check], dict]:
  """All checks, and the figures for the plots."""
  checks, order, spread = [], {}, {}
  for length in (2, 3, 4):
    found = approximation(length)
    order[length] = found
    for name, expected in (('objective', 2.0), ('gradient', 1.0)):
      label = f'slope of the {name}, T {length}'
      checks.append(
        Check(ORDER, label, slope(STEPS, found[name]), expected, 0.1)
      )
    label = f'gap of gradients at the start, T {length}'
    checks.append(Check(ORDER, label, found['start'][1], 0.0, 1e-12))
  for length in LENGTHS:
    theory = math.expm1(length * SIZE**2)
    variance, share = quadrature(length)
    drawn = sampled(length)
    spread[length] = {'theory': theory, 'variance': variance, **drawn}
    label = f'T {length}: '
    tiny = 1e-6 * theory
    checks.append(
      Check(SPREAD, label + 'variance of the product', variance, theory, tiny)
    )
    expected = 1 / (1 + theory)
    checks.append(
      Check(SPREAD, label + 'effective share', share, expected, 1e-6)
    )
    mean = SIZE**2 / length
    checks.append(
      Check(
        SPREAD, label + "GSPO's mean, drawn", drawn['mean'], mean, mean / 20
      )
    )
    if length <= 100:  # beyond, the draws miss the tail that makes it
      checks.append(
        Check(
          SPREAD,
          label + 'product, drawn',
          drawn['product'],
          theory,
          theory / 10,
        )
      )
  for length, printed, tolerance in ((100, 0.284, 5e-4), (1000, 11.2, 0.05)):
    found = spread[length]['variance']
    label = f'T {length}: as printed'
    checks.append(Check(SPREAD, label, found, printed, tolerance))
  return checks, {'steps': STEPS, 'order': order, 'spread': spread}
