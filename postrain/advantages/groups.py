"""The reward of a sample against the rewards of its group."""

from typing import Literal

from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.advantages.common import (
  Singleton,
  centered,
  deviation,
  finished,
  scaled,
)
from postrain.dtypes import Scalar


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
  offsets, rewards, where, count = centered(rewards, where)
  return finished(offsets, rewards, where, count, singleton)


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
  to rounding gives exactly 0, and none exceeds √(G−1) (ddof 0): mean and
  deviation hold the sample itself. The paper leaves the deviation open; popular
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
  offsets, rewards, where, count = centered(rewards, where)
  std = deviation(offsets, rewards, count, ddof)
  advantages = scaled(offsets, std, eps)
  return finished(advantages, rewards / (1 + eps), where, count, singleton)


def batch_normalized(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  eps: Scalar = 1e-6,
  ddof: int = 0,
  singleton: Singleton = 'zero',
) -> Float[Array, 'P G']:
  """Rewards centred in their group, scaled by the deviation of the batch.

      A_i = (r_i − mean_G(r)) / (std_batch(r) + ε)

  One scale for all prompts, so that none is weighed by its difficulty.

  Args:
    rewards, where: see the module; of the whole rollout.
    eps: ε > 0, added to the deviation.
    ddof: 0 divides the squares by the number of samples N, 1 by N−1.
    singleton: what a group of one gives: 'zero', or its 'raw' reward over
      the same scale.

  Returns:
    Advantages that sum to 0 in each group.

  Raises:
    ValueError: unknown singleton.

  References:
    Liu et al., 2025, Part I: Tricks or Traps? A Deep Dive into RL for LLM
    Reasoning, arXiv:2508.08221.
  """
  offsets, rewards, where, count = centered(rewards, where)
  batch, whole, _, total = centered(
    rewards.reshape(1, -1), where.reshape(1, -1)
  )
  std = deviation(batch, whole, total, ddof)
  raw = scaled(rewards, std, eps)
  return finished(scaled(offsets, std, eps), raw, where, count, singleton)


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
  offsets, rewards, where, count = centered(rewards, where)
  advantages = offsets * (count / jnp.maximum(count - 1, 1))
  return finished(advantages, rewards, where, count, singleton)


def gpg(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  counted: Literal['informative', 'nonzero'] = 'informative',
  singleton: Singleton = 'zero',
) -> Float[Array, 'P G']:
  """Centred rewards, scaled up for the samples that have no gradient.

      A_i = N / n · (r_i − mean_G(r))

  N samples are in the batch and n of them count: in the paper those of groups
  whose rewards differ; in one peer those whose reward is not 0, which with
  rewards of ±1 is everyone.

  Args:
    rewards, where: see the module; of the whole rollout.
    counted: n counts samples of 'informative' groups, or 'nonzero' rewards.
    singleton: what a group of one gives: 'zero', or its 'raw' reward, scaled.

  Returns:
    Advantages that sum to 0 in each group.

  Raises:
    ValueError: unknown counted or singleton.

  References:
    Chu et al., 2025, GPG: A Simple and Strong Reinforcement Learning Baseline
    for Model Reasoning, arXiv:2504.02546.
  """
  offsets, rewards, where, count = centered(rewards, where)
  if counted == 'informative':
    found = where & jnp.any(offsets != 0, axis=1, keepdims=True)
  elif counted == 'nonzero':
    found = rewards != 0
  else:
    raise ValueError(
      f"counted is {counted!r}; choose 'informative' or 'nonzero'"
    )
  num = jnp.maximum(jnp.sum(found), 1).astype(rewards.dtype)
  scale = jnp.sum(count) / num
  return finished(scale * offsets, scale * rewards, where, count, singleton)
