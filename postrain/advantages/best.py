"""What counts is the best of the group, as it does for pass@k."""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.advantages.common import (
  Singleton,
  centered,
  deviation,
  finished,
  scaled,
  shown,
)
from postrain.dtypes import Scalar


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
  rewards, where = shown(rewards, where)
  largest = jnp.max(
    rewards, axis=1, keepdims=True, where=where, initial=-jnp.inf
  )
  best = where & (rewards == largest)
  return jax.lax.stop_gradient(jnp.where(best, rewards, 0))


def leave_one_out_max(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  normalize: bool = False,
  eps: Scalar = 1e-6,
  ddof: int = 0,
  singleton: Singleton = 'zero',
) -> Float[Array, 'P G']:
  """What a sample adds to the best of its group.

      A_i = max_G(r) − max_{j≠i} r_j

  An unbiased estimate for the objective max over G samples. The best sample
  has its margin over the second, all others 0; a tie gives 0 to everyone.

  Args:
    rewards, where: see the module.
    normalize: whether to divide by std_G(r) + ε, as one peer does.
    eps: ε > 0, added to the deviation.
    ddof: 0 divides the squares by G, 1 by G−1.
    singleton: what a group of one gives: 'zero', or its 'raw' reward.

  Returns:
    Advantages, at least 0.

  Raises:
    ValueError: unknown singleton.

  References:
    Tang et al., 2025, Optimizing Language Models for Inference Time
    Objectives using Reinforcement Learning, arXiv:2503.19595.
  """
  offsets, rewards, where, count = centered(rewards, where)
  ranked = jnp.sort(jnp.where(where, offsets, -jnp.inf), axis=1)
  ranked = jnp.pad(ranked, ((0, 0), (1, 0)), constant_values=-jnp.inf)
  best = where & (offsets == ranked[:, -1:]) & (count > 1)
  advantages = jnp.where(best, offsets - ranked[:, -2:-1], 0)
  if normalize:
    std = deviation(offsets, rewards, count, ddof)
    advantages = scaled(advantages, std, eps)
  return finished(advantages, rewards, where, count, singleton)


def group_pass_at_k(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  k: int,
  threshold: Scalar = 0.5,
  eps: Scalar = 1e-6,
) -> Float[Array, 'P G']:
  """Advantage of a sample in the subsets of k that it may stand in.

      R̄ = 1 − C(w, k) / C(G, k),   σ = √(R̄ (1−R̄))
      A_right = (1 − R̄) / (σ + ε)
      A_wrong = (1 − R̄ − C(w−1, k−1) / C(G−1, k−1)) / (σ + ε)

  A subset scores 1 if any of its samples is right; its standardised score is
  averaged over all subsets that hold the sample (w of G are wrong). Common
  prompts weigh less than with `group_normalized`, which is the case k = 1.

  Args:
    rewards, where: see the module.
    k: size of a subset; the size of the group where that is smaller.
    threshold: rewards above are right.
    eps: ε > 0, added to the deviation.

  Returns:
    Advantages that sum to 0 in each group.

  References:
    Chen et al., 2025, Pass@k Training for Adaptively Balancing Exploration
    and Exploitation of Large Reasoning Models, arXiv:2508.10751.
  """
  rewards, where = shown(rewards, where)
  wrong = where & (rewards <= threshold)
  size = jnp.sum(where, axis=1, keepdims=True)
  num_wrong = jnp.sum(wrong, axis=1, keepdims=True)
  missed = _share_without(num_wrong, size, k, rewards.dtype)
  others = _share_without(num_wrong - 1, size - 1, k - 1, rewards.dtype)
  std = jnp.sqrt(missed * (1 - missed))
  advantages = scaled(missed - jnp.where(wrong, others, 0), std, eps)
  return jax.lax.stop_gradient(jnp.where(where, advantages, 0))


def _share_without(
  num_wrong: Array, size: Array, k: int, dtype: jnp.dtype
) -> Array:
  """C(w, k) / C(G, k) as a product: the subsets without a right sample."""
  j = jnp.arange(k)[None, None, :]
  wrong, left = (x[..., None] - j for x in (num_wrong, size))
  factors = jnp.maximum(wrong, 0).astype(dtype)
  factors = factors / jnp.maximum(left, 1).astype(dtype)
  return jnp.prod(jnp.where(left > 0, factors, 1), axis=-1)
