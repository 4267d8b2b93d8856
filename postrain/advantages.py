"""From rewards to advantages. All results are constants for the gradient.

For groups, ``rewards`` are those of the G samples of each prompt, and ``where``
says which samples exist (None for all; the others give 0, whatever they hold).
Along tokens, ``mask`` is True on those that the policy chose.
"""

from typing import Literal

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.dtypes import Scalar, promoted

__all__ = [
  'discounted_returns',
  'gae',
  'group_centered',
  'group_normalized',
  'lambda_returns',
  'leave_one_out',
  'max_only',
  'whiten',
]

Singleton = Literal['zero', 'raw']


def group_centered(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  singleton: Singleton = 'zero',
) -> Float[Array, 'P G']:
  """Rewards minus the mean of their group.

      A_i = r_i − mean_G(r)

  The mean holds the sample's own reward, which scales the expected gradient
  by (G−1)/G and changes nothing else; see `leave_one_out`.

  Args:
    rewards, where: see the module.
    singleton: what a group of one gives: 'zero', or its 'raw' reward.

  Returns:
    Advantages that sum to 0 in each group.

  Raises:
    ValueError: unknown singleton.

  References:
    Liu et al., 2025, Understanding R1-Zero-Like Training: A Critical
    Perspective (Dr. GRPO), arXiv:2503.20783.
  """
  centered, rewards, where, count = _centered(rewards, where)
  return _finished(centered, rewards, where, count, singleton)


def group_normalized(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  eps: Scalar = 1e-6,
  ddof: int = 0,
  singleton: Singleton = 'zero',
) -> Float[Array, 'P G']:
  """Rewards standardised within their group: the advantage of GRPO.

      A_i = (r_i − mean_G(r)) / (std_G(r) + ε)

  The division weighs prompts by difficulty. A group whose rewards are equal up
  to rounding gives exactly 0. The paper leaves the deviation open; popular
  trainers use ddof=1 and ε from 1e-8 to 1e-4, which differ by the constant
  √(G/(G−1)).

  Args:
    rewards, where: see the module.
    eps: ε > 0, added to the deviation.
    ddof: 0 divides the squares by G, 1 by G−1.
    singleton: what a group of one gives: 'zero', or its 'raw' reward over
      1 + ε (mean 0 and deviation 1, as one peer has it).

  Returns:
    Advantages that sum to 0 in each group.

  Raises:
    ValueError: unknown singleton.

  References:
    Shao et al., 2024, DeepSeekMath, arXiv:2402.03300.
  """
  centered, rewards, where, count = _centered(rewards, where)
  squares = jnp.sum(jnp.square(centered), axis=1, keepdims=True)
  std = jnp.sqrt(squares / jnp.maximum(count - ddof, 1))
  largest = jnp.max(jnp.abs(rewards), axis=1, keepdims=True)
  noise = 8 * jnp.finfo(rewards.dtype).eps * largest
  scaled = jnp.where(std > noise, centered / (std + eps), 0)
  return _finished(scaled, rewards / (1 + eps), where, count, singleton)


def leave_one_out(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  singleton: Singleton = 'zero',
) -> Float[Array, 'P G']:
  """Rewards minus the mean of the other samples: an unbiased baseline.

      A_i = r_i − Σ_{j≠i} r_j / (G−1) = G / (G−1) · (r_i − mean_G(r))

  Args:
    rewards, where: see the module.
    singleton: what a group of one gives: 'zero', or its 'raw' reward.

  Returns:
    Advantages that sum to 0 in each group.

  Raises:
    ValueError: unknown singleton.

  References:
    Kool et al., 2019, Buy 4 REINFORCE Samples, Get a Baseline for Free!;
    Ahmadian et al., 2024, Back to Basics (RLOO), arXiv:2402.14740.
  """
  centered, rewards, where, count = _centered(rewards, where)
  scaled = centered * (count / jnp.maximum(count - 1, 1))
  return _finished(scaled, rewards, where, count, singleton)


def max_only(
  rewards: Float[Array, 'P G'], where: Bool[Array, 'P G'] | None = None
) -> Float[Array, 'P G']:
  """The reward of the best samples of a group, 0 for the rest.

      A_i = r_i · 1[r_i = max_G(r)]

  Ties are all kept; if the best reward is 0 so are the advantages.

  Args:
    rewards, where: see the module.

  Returns:
    Advantages.

  References:
    Hashimoto and Liang, 2025, CS336: Language Modeling from Scratch,
    lecture 17.
  """
  rewards, where = _shown(rewards, where)
  largest = jnp.max(
    rewards, axis=1, keepdims=True, where=where, initial=-jnp.inf
  )
  best = where & (rewards == largest)
  return jax.lax.stop_gradient(jnp.where(best, rewards, 0))


def gae(
  rewards: Float[Array, 'B T'],
  values: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  bootstrap: Float[Array, ' B'] | None = None,
  *,
  discount: Scalar = 1.0,
  lambda_: Scalar = 0.95,
) -> Float[Array, 'B T']:
  """Generalised advantage estimation along the tokens of the policy.

      δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1}

  t+1 is the next token of the mask: across a gap (the output of a tool)
  nothing is discounted and no value enters, as if the gap were cut out. Some
  peers let a gap inject a δ of its own. Not whitened; see `whiten`.

  Args:
    rewards: of each token; only those on the mask count.
    values: the critic's estimate before each token.
    mask: tokens that the policy chose.
    bootstrap: value after the last token, for truncated sequences; None for 0,
      as it is after a stop token.
    discount: γ in [0, 1]; 1 is the habit for language models.
    lambda_: λ in [0, 1]; 1 is the Monte-Carlo return minus the value.

  Returns:
    Advantages, 0 off the mask.

  References:
    Schulman et al., 2015, High-Dimensional Continuous Control Using
    Generalized Advantage Estimation, arXiv:1506.02438.
  """
  rewards, values = promoted(rewards, values)
  last = jnp.zeros_like(values[:, 0])
  if bootstrap is not None:
    last = bootstrap.astype(values.dtype)

  def step(carry, inputs):
    next_value, next_advantage = carry
    reward, value, chosen = inputs
    delta = reward + discount * next_value - value
    advantage = delta + discount * lambda_ * next_advantage
    carry = (
      jnp.where(chosen, value, next_value),
      jnp.where(chosen, advantage, next_advantage),
    )
    return carry, jnp.where(chosen, advantage, 0)

  inputs = (rewards.T, values.T, mask.T)
  start = (last, jnp.zeros_like(last))
  _, advantages = jax.lax.scan(step, start, inputs, reverse=True)
  return jax.lax.stop_gradient(advantages.T)


def lambda_returns(
  rewards: Float[Array, 'B T'],
  values: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  bootstrap: Float[Array, ' B'] | None = None,
  *,
  discount: Scalar = 1.0,
  lambda_: Scalar = 0.95,
) -> Float[Array, 'B T']:
  """Targets of the critic that belong to `gae`.

      R_t = A_t + V_t

  From the advantages before any whitening.

  Args:
    rewards, values, mask, bootstrap, discount, lambda_: as for `gae`.

  Returns:
    Returns, 0 off the mask.

  References:
    Schulman et al., 2015, High-Dimensional Continuous Control Using
    Generalized Advantage Estimation, arXiv:1506.02438.
  """
  rewards, values = promoted(rewards, values)
  advantages = gae(
    rewards, values, mask, bootstrap, discount=discount, lambda_=lambda_
  )
  return jax.lax.stop_gradient(jnp.where(mask, advantages + values, 0))


def discounted_returns(
  rewards: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  discount: Scalar = 1.0,
) -> Float[Array, 'B T']:
  """Discounted sum of the rewards from each token on.

      R_t = r_t + γ R_{t+1}

  t+1 is the next token of the mask, as for `gae`.

  Args:
    rewards: of each token; only those on the mask count.
    mask: tokens that the policy chose.
    discount: γ in [0, 1].

  Returns:
    Returns, 0 off the mask.

  References:
    Williams, 1992, Simple Statistical Gradient-Following Algorithms for
    Connectionist Reinforcement Learning.
  """
  values = jnp.zeros_like(rewards)
  return gae(rewards, values, mask, discount=discount, lambda_=1.0)


def whiten(
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  keep_mean: bool = False,
  eps: Scalar = 1e-8,
  ddof: int = 1,
) -> Float[Array, 'B T']:
  """Advantages scaled to mean 0 and variance 1 over the tokens of the mask.

      A' = (A − mean) / √(var + ε)   (+ mean)

  A single token gives 0, where the peers that divide by n−1 give NaN.

  Args:
    advantages: of each token, of the whole rollout.
    mask: tokens that count.
    keep_mean: whether the mean is added back.
    eps: ε > 0, added to the variance.
    ddof: 0 divides the squares by n, 1 by n−1.

  Returns:
    Whitened advantages, 0 off the mask.

  References:
    Ziegler et al., 2019, Fine-Tuning Language Models from Human
    Preferences, arXiv:1909.08593.
  """
  (advantages,) = promoted(advantages)
  advantages = jnp.where(mask, advantages, 0)
  count = jnp.sum(mask).astype(advantages.dtype)
  mean = jnp.sum(advantages) / jnp.maximum(count, 1)
  centered = jnp.where(mask, advantages - mean, 0)
  var = jnp.sum(jnp.square(centered)) / jnp.maximum(count - ddof, 1)
  scaled = centered * jax.lax.rsqrt(var + eps)
  shifted = scaled + mean if keep_mean else scaled
  return jax.lax.stop_gradient(jnp.where(mask, shifted, 0))


def _shown(rewards: Array, where: Array | None) -> tuple[Array, Array]:
  (rewards,) = promoted(rewards)
  where = jnp.ones_like(rewards, bool) if where is None else where
  return jnp.where(where, rewards, 0), where


def _centered(
  rewards: Array, where: Array | None
) -> tuple[Array, Array, Array, Array]:
  rewards, where = _shown(rewards, where)
  count = jnp.sum(where, axis=1, keepdims=True).astype(rewards.dtype)
  # Measured from one of them, equal rewards are exactly 0: no noise is left
  # for a small deviation to blow up.
  first = jnp.argmax(where, axis=1, keepdims=True)
  anchor = jnp.take_along_axis(rewards, first, axis=1)
  offset = jnp.where(where, rewards - anchor, 0)
  mean = jnp.sum(offset, axis=1, keepdims=True) / jnp.maximum(count, 1)
  return jnp.where(where, offset - mean, 0), rewards, where, count


def _finished(
  advantages: Array,
  raw: Array,
  where: Array,
  count: Array,
  singleton: Singleton,
) -> Array:
  if singleton == 'raw':
    advantages = jnp.where(where & (count == 1), raw, advantages)
  elif singleton != 'zero':
    raise ValueError(
      f"singleton is {singleton!r}; choose 'zero' or 'raw' for groups of one"
    )
  return jax.lax.stop_gradient(advantages)
