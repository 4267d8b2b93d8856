"""Baselines other than the mean of the group."""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.advantages.common import (
  Singleton,
  centered,
  finished,
  membership,
  pooled,
  shown,
)
from postrain.advantages.tokens import discounted_returns
from postrain.dtypes import Scalar, promoted


def remax(
  rewards: Float[Array, 'P G'],
  baselines: Float[Array, ' P'],
  where: Bool[Array, 'P G'] | None = None,
) -> Float[Array, 'P G']:
  """Rewards minus the reward of the greedy completion.

      A_i = r_i − r(greedy)

  The baseline does not depend on the samples, so nothing is biased and a group
  of one is enough; it costs one more completion per prompt.

  Args:
    rewards, where: see the module.
    baselines: reward of the greedy completion of each prompt.

  Returns:
    Advantages.

  References:
    Li et al., 2023, ReMax: A Simple, Effective, and Efficient Reinforcement
    Learning Method for Aligning Large Language Models, arXiv:2310.10505.
  """
  rewards, baselines = promoted(rewards, baselines)
  rewards, where = shown(rewards, where)
  advantages = jnp.where(where, rewards - baselines[:, None], 0)
  return jax.lax.stop_gradient(advantages)


def optimal_baseline(
  rewards: Float[Array, 'P G'],
  lengths: Int[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  singleton: Singleton = 'zero',
) -> Float[Array, 'P G']:
  """Rewards minus their mean, weighted by length: OPO.

      A_i = r_i − Σ_j |y_j| r_j / Σ_j |y_j|

  The baseline of least variance is E[‖∇log π‖² r] / E[‖∇log π‖²]; the square
  norm of a completion's gradient is taken to grow with its length.

  Args:
    rewards, where: see the module.
    lengths: number of tokens of each completion.
    singleton: what a group of one gives: 'zero', or its 'raw' reward.

  Returns:
    Advantages.

  Raises:
    ValueError: unknown singleton.

  References:
    Hao et al., 2025, On-Policy RL with Optimal Reward Baseline,
    arXiv:2505.23585.
  """
  offsets, rewards, where, count = centered(rewards, where, lengths)
  return finished(offsets, rewards, where, count, singleton)


def optimal_token_baseline(
  rewards: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  collisions: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  groups: Int[Array, ' B'],
  *,
  discount: Scalar = 1.0,
  eps: Scalar = 1e-8,
) -> Float[Array, 'B T']:
  """Returns minus the baseline of least variance at each position.

      A_{i,t} = R_{i,t} − Σ_j W_{j,t} R_{j,t} / (Σ_j W_{j,t} + ε)
      W_t = Σ_{s≤t} ‖onehot(y_s) − π_s‖² = Σ_{s≤t} (1 − 2 π(y_s) + Σ_v π(v)²)

  W is the square norm of the gradient that has gathered in the logits, and j
  runs over the samples of the group that have a token at position t. Where
  only one has, its baseline is 0.

  Args:
    rewards: of each token; only those on the mask count.
    old_logprobs: of the policy that generated the tokens.
    collisions: Σ_v π(v)² of the same policy at each token.
    mask, groups: see the module.
    discount: γ in [0, 1].
    eps: ε > 0, added to the sum of weights.

  Returns:
    Advantages, 0 off the mask.

  References:
    Li et al., 2026, The Optimal Token Baseline: Variance Reduction for
    Long-Horizon LLM-RL, arXiv:2602.07078.
  """
  rewards, old_logprobs, collisions = promoted(
    rewards, old_logprobs, collisions
  )
  returns = discounted_returns(rewards, mask, discount=discount)
  probs = jnp.exp(jnp.where(mask, old_logprobs, 0))
  energy = jnp.where(mask, 1 - 2 * probs + collisions, 0)
  weights = jnp.where(mask, jnp.cumsum(energy, axis=1), 0)
  same = membership(groups, rewards.dtype)
  baselines = pooled(same, weights * returns) / (pooled(same, weights) + eps)
  shared = pooled(same, mask.astype(rewards.dtype)) > 1
  advantages = returns - jnp.where(shared, baselines, 0)
  return jax.lax.stop_gradient(jnp.where(mask, advantages, 0))
