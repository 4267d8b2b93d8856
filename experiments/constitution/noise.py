"""Noise and a taste for a position: what they do to labels, and to what learns.

Answers of the base policy, judged by how often they violate any principle. A
linear reward (a coefficient of the violations of each principle) is fitted to
the labels by the loss of soft preferences; the policy is the best one that KL
holds at the base, π ∝ π₀ exp(r / β), worked out on samples of each request. A
training without a network: a setting takes a fraction of a second.
"""

from collections.abc import Sequence
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.constitution.stages import ASKED, LETTERS, rude_answer
from postrain import feedback, losses

NOISES = (0.0, 0.1, 0.2, 0.3, 0.4)
BIASES = (0.0, 0.5, 1.0, 2.0)
ORDERS = ('single', 'both')
PAIRS = ('two answers', 'original first')
NUM_PAIRS, NUM_SAMPLES, NUM_SETS = 512, 64, 64
SCALE, BETA = 1.0, 0.5
PRIOR = 1e-2  # on squared coefficients, lest a perfect judge make them infinite


def study(
  principles: Sequence[feedback.Principle], seeds: range
) -> list[dict[str, Any]]:
  """A row for each setting: accuracy of the labels, violations learnt."""
  settings = [('two answers', 'both', 0.0, noise) for noise in NOISES]
  settings += [
    (*setting, 0.0) for setting in itertools.product(PAIRS, ORDERS, BIASES)
  ]
  rows = []
  for pairs, orders, bias, noise in dict.fromkeys(settings):
    found = [_run(principles, pairs, orders, bias, noise, s) for s in seeds]
    accuracy, violating, base = map(list, zip(*found, strict=True))
    rows.append(dict(
      pairs=pairs, orders=orders, bias=bias, noise=noise, accuracy=accuracy,
      violating=violating, base=base,
    ))  # fmt: skip
  return rows


def _run(
  principles: Sequence[feedback.Principle], pairs: str, orders: str,
  bias: float, noise: float, seed: int,
) -> tuple[float, float, float]:  # fmt: skip
  """Accuracy of the labels; violating answers after training and before."""
  draw = np.random.default_rng([seed, 3])
  firsts = _answers(draw, NUM_PAIRS)
  if pairs == 'two answers':
    seconds = _answers(draw, NUM_PAIRS)
  else:
    seconds = [
      feedback.revised(principles, text, draw, num_rounds=1).text
      for text in firsts
    ]
  one, two = _counts(principles, firsts), _counts(principles, seconds)

  def kept(prompts: Any, texts: Sequence[str]) -> np.ndarray:
    del prompts
    return -_counts(principles, texts).sum(1)

  judge = feedback.rule(kept, scale=SCALE, position_bias=bias)
  if orders == 'both':
    judge = feedback.both_orders(judge)
  labels = judge([''] * NUM_PAIRS, firsts, seconds)
  flipped = draw.random(NUM_PAIRS) < noise
  labels = np.where(flipped, 1 - labels, labels)
  truth = (two - one).sum(1)  # > 0 where the first is better
  known = truth != 0
  # In float64 a half that is averaged of two may miss ½ by its last bit.
  sides = np.sign((labels - 0.5).round(12))
  right = (1 + sides * np.sign(truth))[known] / 2
  samples = _counts(principles, _answers(draw, NUM_SETS * NUM_SAMPLES))
  reward = samples @ _fitted(one - two, labels)
  violating = (samples.sum(1) > 0).reshape(NUM_SETS, -1)
  weights = jax.nn.softmax(reward.reshape(NUM_SETS, -1) / BETA, axis=1)
  learnt = float(jnp.where(violating, weights, 0).sum(1).mean())
  return float(right.mean()), learnt, float(violating.mean())


@jax.jit
def _newton(theta: Any, distances: Any, labels: Any) -> Any:
  def loss(theta: Any) -> Any:
    scores = distances @ theta
    values, _ = losses.soft_preference(scores, jnp.zeros_like(scores), labels)
    return values.mean() + PRIOR * (theta**2).sum()

  return theta - jnp.linalg.solve(
    jax.hessian(loss)(theta), jax.grad(loss)(theta)
  )


def _fitted(distances: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """The coefficients of a linear reward that explain the labels best."""
  theta = jnp.zeros(distances.shape[1], jnp.float32)
  for _ in range(10):
    theta = _newton(theta, jnp.float32(distances), jnp.float32(labels))
  return np.asarray(theta)


def _answers(draw: np.random.Generator, number: int) -> list[str]:
  letters = np.array(list(LETTERS))
  return [
    rude_answer(''.join(draw.permutation(letters)[:ASKED]), draw)
    for _ in range(number)
  ]


def _counts(
  principles: Sequence[feedback.Principle], texts: Sequence[str]
) -> np.ndarray:
  """Violations of each principle in each text."""
  return np.array(
    [[feedback.violations(p, text) for p in principles] for text in texts],
    np.float32,
  )
