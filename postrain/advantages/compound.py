"""Several signals in one advantage."""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.advantages.common import centered, deviation, scaled, shown
from postrain.advantages.groups import group_normalized
from postrain.dtypes import Scalar, promoted


def gdpo(
  reward_parts: Float[Array, 'P G K'],
  where: Bool[Array, 'P G K'] | None = None,
  *,
  weights: tuple[Scalar, ...] | None = None,
  eps: Scalar = 1e-6,
  ddof: int = 0,
) -> Float[Array, 'P G']:
  """Several rewards, each standardised in its group before they are added.

      S_i = Σ_k w_k (r_{i,k} − mean_G(r_k)) / (std_G(r_k) + ε)
      A_i = (S_i − mean_batch(S)) / (std_batch(S) + ε)

  Adding first and standardising then would let different combinations of
  rewards collapse to one advantage. The last step is over samples; one peer
  whitens over tokens instead, so that long answers weigh more.

  Args:
    reward_parts: K rewards of each sample, of the whole rollout.
    where: which rewards exist; a sample without any gives 0. None for all.
    weights: w_k, 1 if None.
    eps: ε > 0, added to both deviations.
    ddof: 0 divides the squares by their number n, 1 by n−1.

  Returns:
    Advantages of mean 0 and deviation 1 over the batch.

  Raises:
    ValueError: the number of weights is not K.

  References:
    Liu et al., 2026, GDPO: Group reward-Decoupled Normalization Policy
    Optimization for Multi-reward RL Optimization, arXiv:2601.05242.
  """
  rewards, where = shown(reward_parts, where)
  num = rewards.shape[-1]
  if weights is not None and len(weights) != num:
    raise ValueError(f'{len(weights)} weights for {num} rewards: give {num}')

  def normalized(r: Array, there: Array) -> Array:
    return group_normalized(r, there, eps=eps, ddof=ddof)

  parts = jax.vmap(normalized, in_axes=-1, out_axes=-1)(rewards, where)
  scale = jnp.asarray(weights or (1,) * num, rewards.dtype)
  total = jnp.matmul(parts, scale, precision='highest')
  there = jnp.any(where, axis=-1)
  offsets, flat, _, count = centered(total.reshape(1, -1), there.reshape(1, -1))
  std = deviation(offsets, flat, count, ddof)
  advantages = scaled(offsets, std, eps).reshape(there.shape)
  return jax.lax.stop_gradient(advantages)


def differential_smoothing(
  rewards: Float[Array, 'P G'],
  sequence_logprobs: Float[Array, 'P G'],
  lengths: Int[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  positive_coef: Scalar,
  negative_coef: Scalar,
  threshold: Scalar = 0.5,
  length_norm: bool = False,
  recenter: bool = False,
  eps: Scalar = 1e-6,
  ddof: int = 0,
) -> Float[Array, 'P G']:
  """The advantage of GRPO plus a bonus for rare right answers: DS-GRPO.

      A'_i = A_i − γ_p log π_old(y_i)  if y_i is right
      A'_i = A_i + γ_n log π_old(y_i)  otherwise

  Entropy is raised among the right answers and lowered among the wrong ones; a
  bonus for all entropy would trade one for the other. Groups of equal rewards
  have a signal here, and the advantages of a group do not sum to 0. The paper
  publishes no coefficients; log π grows with the length.

  Args:
    rewards, where: see the module.
    sequence_logprobs: log π_old(y) of whole completions, a constant.
    lengths: number of tokens of each completion.
    positive_coef: γ_p ≥ 0.
    negative_coef: γ_n ≥ 0.
    threshold: rewards above are right.
    length_norm: whether log π is divided by the length (our option).
    recenter: whether the sum is centred in the group again (our option).
    eps, ddof: of the GRPO advantage, see `group_normalized`.

  Returns:
    Advantages.

  References:
    Gai et al., 2025, Differential Smoothing Mitigates Sharpening and Improves
    LLM Reasoning, arXiv:2511.19942.
  """
  rewards, sequence_logprobs = promoted(rewards, sequence_logprobs)
  rewards, where = shown(rewards, where)
  logprobs = jnp.where(where, sequence_logprobs, 0)
  if length_norm:
    logprobs = logprobs / jnp.maximum(lengths, 1).astype(logprobs.dtype)
  right = rewards > threshold
  bonus = jnp.where(right, -positive_coef, negative_coef) * logprobs
  advantages = group_normalized(rewards, where, eps=eps, ddof=ddof) + bonus
  if recenter:
    advantages = centered(advantages, where)[0]
  return jax.lax.stop_gradient(advantages)
