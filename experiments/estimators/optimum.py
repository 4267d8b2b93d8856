"""Which place of the divergence leads a policy to the optimum of #13.

Gradient ascent on E[R] − β KL(π‖π_ref), all sequences enumerated, with the
gradient that each estimator has in each place in that of the divergence. The
optimum is known, π* ∝ π_ref exp(R / β): how far from it does each end?
"""

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from experiments.estimators.common import Check
from experiments.estimators.divergence import (
  KEYS,
  LENGTH,
  RIGHT_PLACES,
  VOCAB,
  Params,
  placed,
  policies,
)
from postrain.tasks.tabular import enumeration

OPTIMUM = '#13, #14 and #49, ascent to the optimum'
BETA, RATE, NUM_STEPS, EVERY = 2.0, 0.5, 2000, 20
REACHED = 1e-3  # total variation


def probabilities(params: Params) -> Array:
  """Of all sequences."""
  return jnp.exp(enumeration(params, length=LENGTH).logprobs.sum(-1))


def distances(rewards: Array, ref: Params) -> dict[tuple, Array]:
  """Total variation to the optimum along the ascent, by place."""
  optimum = probabilities(ref) * jnp.exp(rewards / BETA)
  optimum /= optimum.sum()

  def ascend(params: Params, key: tuple[str, str, str]) -> Params:
    gain = jax.grad(lambda p: probabilities(p) @ rewards)(params)
    cost = placed(key, params, ref)
    return jax.tree.map(
      lambda p, g, c: p + RATE * (g - BETA * c), params, gain, cost
    )

  def step(policies: dict, _: None) -> tuple[dict, None]:
    return {key: ascend(p, key) for key, p in policies.items()}, None

  def several(policies: dict, _: None) -> tuple[dict, dict]:
    policies, _ = jax.lax.scan(step, policies, length=EVERY)
    return policies, {
      key: 0.5 * jnp.abs(probabilities(p) - optimum).sum()
      for key, p in policies.items()
    }

  start = dict.fromkeys(KEYS, ref)
  run = jax.jit(lambda p: jax.lax.scan(several, p, length=NUM_STEPS // EVERY))
  return run(start)[1]


def study() -> tuple[list[Check], dict]:
  """All checks, and the curves for the plot."""
  _, ref = policies()
  rewards = jnp.asarray(np.random.default_rng(2).standard_normal(VOCAB**LENGTH))
  curves = distances(rewards, ref)
  checks = []
  for key, curve in curves.items():
    right = key in RIGHT_PLACES
    label = f'{", ".join(key)}: total variation'
    expected = (0.0, REACHED) if right else (REACHED, None)
    checks.append(Check(OPTIMUM, label, float(curve[-1]), *expected))
  return checks, {
    'steps': [EVERY * (i + 1) for i in range(NUM_STEPS // EVERY)],
    'curves': {
      ', '.join(key): np.asarray(c).tolist() for key, c in curves.items()
    },
  }
