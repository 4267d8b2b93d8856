"""Promises of the methods that have no other place."""

import jax.numpy as jnp
import numpy as np

from postrain import advantages, rewards, shaping
from postrain.types import Completion


def verified(*texts: str) -> list[float]:
  rows = [Completion(text, [], False) for text in texts]
  return rewards.accuracy(rows, [{'answer': '42'}] * len(rows))


def test_m58_an_answer_on_the_way_is_not_the_final_one():
  texts = ('so it is 42\n#### 41', '#### 42\nno, wait\n#### 41', '42')
  assert verified(*texts) == [0, 0, 0]


def test_m58_verdicts_are_repeatable_and_failures_earn_nothing():
  texts = ('#### 42', '#### 42.0', '#### 43', '#### many', '####', '')
  assert verified(*texts) == verified(*texts) == [1, 1, 0, 0, 0, 0]


def test_m49_centring_keeps_the_coefficient_and_the_deviation_scales_it():
  """Of a divergence that is a part of the reward."""
  rng = np.random.default_rng(0)
  outcome = jnp.asarray(rng.integers(0, 2, (2, 4)), jnp.float32)
  outcome = outcome.at[1].multiply(10)
  outcome = outcome.at[:, :2].set(jnp.asarray([[0.0, 1.0], [0.0, 10.0]]))
  penalty = jnp.asarray(rng.standard_normal((2, 4)), jnp.float32)
  mask = jnp.ones((8, 1), bool)
  beta = 0.01
  whole = shaping.kl_penalized(
    outcome.ravel(), penalty.reshape(8, 1), mask, coef=beta
  ).reshape(2, 4)

  def share(fn):
    """What the penalty changes, over the centred penalty itself."""
    change = fn(whole) - fn(outcome)
    centred = advantages.group_centered(penalty)
    return jnp.sum(change * centred, 1) / jnp.sum(centred**2, 1)

  found = share(advantages.group_centered)
  np.testing.assert_allclose(found, -beta, rtol=1e-3)
  first, second = share(advantages.group_normalized)
  assert abs(first) > 5 * abs(second)
