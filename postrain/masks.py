"""Which tokens, sequences and groups take part.

A mask says which tokens are trained, or under a penalty, or kept; it is never a
weight and has no gradient. What it selects from (``mask``) stays the mask of
the aggregation, unless a smaller denominator is wanted. Masks over statistics
of many tokens (`covariance`, `top_covariance`, `top_entropy`) are those of the
whole minibatch: cut it after the mask, not before.
"""

from typing import Literal

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from postrain import importance, kl
from postrain.dtypes import Scalar, promoted

__all__ = [
  'covariance',
  'informative_groups',
  'matched',
  'off_policy_sequences',
  'overlong',
  'top_covariance',
  'top_entropy',
  'unsolved',
]


def overlong(
  mask: Bool[Array, 'B T'], truncated: Bool[Array, ' B']
) -> Bool[Array, 'B T']:
  """Drop sequences that were cut off by the length limit.

      m'_{i,t} = m_{i,t} ∧ ¬truncated_i

  Overlong filtering: such a sequence is not wrong, its reward is unknown. Use
  the result as the trained mask; its reward stays in the group statistics, and
  the denominator is that of the mask you give to the aggregation.

  Args:
    mask: tokens that the policy chose.
    truncated: sequences without a stop token.

  Returns:
    The mask without the truncated sequences.

  References:
    Yu et al., 2025, DAPO, arXiv:2503.14476.
  """
  return mask & ~truncated[:, None]


def informative_groups(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  low: Scalar | None = None,
  high: Scalar | None = None,
) -> Bool[Array, ' P']:
  """Groups whose rewards differ: the others have no advantage.

      max_G r − min_G r > noise  ∧  low < mean_G r < high

  Dynamic sampling: keep these, sample again for the rest. It tilts the prompts
  towards ∝ 1 − pᴳ − (1−p)ᴳ, so report the reward before the filter. Rewards
  that differ by rounding alone are equal; one peer kept such groups.

  Args:
    rewards: of the G samples of each prompt.
    where: which samples exist; a group without any is not informative.
    low: exclusive lower bound of the group's mean; None for none.
    high: exclusive upper bound; None for none.

  Returns:
    True for each group to keep.

  References:
    Yu et al., 2025, DAPO, arXiv:2503.14476.
  """
  (rewards,) = promoted(rewards)
  where = jnp.ones_like(rewards, bool) if where is None else where
  rewards = jnp.where(where, rewards, 0)
  largest = jnp.max(rewards, axis=1, where=where, initial=-jnp.inf)
  smallest = jnp.min(rewards, axis=1, where=where, initial=jnp.inf)
  noise = 8 * jnp.finfo(rewards.dtype).eps * jnp.max(jnp.abs(rewards), axis=1)
  keep = largest - smallest > noise
  count = jnp.maximum(jnp.sum(where, axis=1), 1).astype(rewards.dtype)
  mean = jnp.sum(rewards, axis=1) / count
  if low is not None:
    keep &= mean > low
  if high is not None:
    keep &= mean < high
  return keep


def unsolved(
  rewards: Float[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  level: Literal['response', 'group'] = 'response',
  threshold: Scalar = 0.5,
) -> Bool[Array, 'P G']:
  """Responses that a teacher should guide: where the reward alone has failed.

      r_i < c   or   max_G r < c

  Reward-guided masking: by response, distil where the sample is wrong; by
  group, where no sample of the prompt is right. Use it as the trained and as
  the counted mask of the distillation term.

  Args:
    rewards: of the G samples of each prompt.
    where: which samples exist; the others are False.
    level: 'response' or 'group'.
    threshold: c, the least reward of a right response.

  Returns:
    True for each response to distil on.

  Raises:
    ValueError: unknown level.

  References:
    Xu et al., 2025, KDRL: Post-Training Reasoning LLMs via Unified Knowledge
    Distillation and Reinforcement Learning, arXiv:2506.02208.
  """
  where = jnp.ones_like(rewards, bool) if where is None else where
  solved = where & (rewards >= threshold)
  if level == 'group':
    solved = jnp.any(solved, axis=1, keepdims=True)
  elif level != 'response':
    raise ValueError(f"level is {level!r}; choose 'response' or 'group'")
  return where & ~solved


def off_policy_sequences(
  logprobs: Float[Array, 'B T'],
  sampler_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  threshold: Scalar,
) -> Bool[Array, 'B T']:
  """Drop what was bad and has become improbable.

      m'_t = m_t ∧ ¬(A_t < 0 ∧ (1 / |y|) Σ_s (log μ(y_s) − log π(y_s)) > δ)

  Pushing down sequences that the policy has already left does harm; good ones
  stay at any distance. The policy is held against the sampler, so that
  staleness and mismatch both count. It is one bound, exp(−δ), on the statistic
  of GSPO. Use it as the trained mask of the policy term, not of the KL.

  Args:
    logprobs: of the current policy.
    sampler_logprobs: log μ as reported by the sampler.
    advantages: of each token, in general equal along a sequence.
    mask: tokens that the policy chose.
    threshold: δ in nats per token, not published; inf keeps all.

  Returns:
    The mask without the sequences too far off.

  References:
    DeepSeek-AI, 2025, DeepSeek-V3.2: Pushing the Frontier of Open Large
    Language Models, arXiv:2512.02556 (off-policy sequence masking).
  """
  log_s = importance.sequence_log_ratio(logprobs, sampler_logprobs, mask)
  return mask & ~((advantages < 0) & (log_s < -threshold)[:, None])


def matched(
  old_logprobs: Float[Array, 'B T'],
  sampler_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  estimator: Literal['k1', 'k2', 'k3'] = 'k3',
  level: Literal['token', 'sum', 'mean', 'max'] = 'token',
  low: Scalar | None = None,
  high: Scalar | None = None,
  max_log_ratio: Scalar | None = 20.0,
) -> Bool[Array, 'B T']:
  """Tokens or sequences on which learner and sampler agree.

      low ≤ k(μ‖π_old) ≤ high

  k is an estimate of KL(μ‖π_old) in nats: of a token, or the sum, mean or
  maximum over its sequence. Bounds are of k, so that k1 = −log(π_old / μ) has
  the sign of a divergence; for a band of the ratio itself see
  `postrain.importance.masked`, which one popular implementation takes this for.

  Args:
    old_logprobs: of the learner, for the weights that sampled.
    sampler_logprobs: log μ as reported by the sampler.
    mask: tokens that the policy chose.
    estimator: 'k1', 'k2' or 'k3' of `postrain.kl`.
    level: 'token', or 'sum', 'mean', 'max' over the sequence.
    low: inclusive lower bound, of use for k1; None for none.
    high: inclusive upper bound; None for none.
    max_log_ratio: limit of each token's |log π_old / μ|; None for none.

  Returns:
    The mask without what is out of bounds.

  Raises:
    ValueError: unknown estimator or level.

  References:
    Schulman, 2020, Approximating KL Divergence (blog).
  """
  estimators = {'k1': kl.k1, 'k2': kl.k2, 'k3': kl.k3}
  if estimator not in estimators:
    raise ValueError(f'estimator is {estimator!r}; choose of {[*estimators]}')
  distance = estimators[estimator](
    sampler_logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio
  )
  distance = _over_sequence(distance, mask, level)
  keep = mask
  if low is not None:
    keep &= distance >= low
  if high is not None:
    keep &= distance <= high
  return keep


def covariance(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  key: Key[Array, ''],
  sequence_ids: Int[Array, ' B'] | None = None,
  *,
  fraction: Scalar = 2e-4,
  low: Scalar = 1.0,
  high: Scalar = 5.0,
  clip_low: Scalar = 1.0,
  clip_high: Scalar = 1.0,
) -> Bool[Array, 'B T']:
  """Drop a few random tokens of high covariance (Clip-Cov).

      c_t = (log π(y_t) − mean(log π)) (A_t − mean(A))
      drop max(⌊r N⌋, 1) of {t : low < c_t < high, not clipped by PPO}

  Such tokens are the ones that cost the entropy. N counts the tokens of the
  mask; if fewer are eligible all of them go, if none, none. What a token draws
  depends on its sequence and its number within it, not on padding or order. Use
  the result as the trained mask of `ppo_clip` with the same bounds.

  Args:
    logprobs: of the current policy.
    old_logprobs: of the policy that generated the tokens.
    advantages: of each token.
    mask: tokens that the policy chose, of the whole minibatch.
    key: of the draw; another for each update.
    sequence_ids: a number of each sequence; its row if None.
    fraction: r, a share and no percentage.
    low, high: exclusive bounds of c.
    clip_low, clip_high: offsets of the loss in use, by default those of the
      paper's recipe for this mask.

  Returns:
    The mask without the tokens drawn.

  References:
    Cui et al., 2025, The Entropy Mechanism of Reinforcement Learning for
    Reasoning Language Models, arXiv:2505.22617.
  """
  scores = _covariance(logprobs, advantages, mask)
  ratios = importance.ratio(logprobs, old_logprobs, mask)
  clipped = (advantages > 0) & (ratios > 1 + clip_high)
  clipped |= (advantages < 0) & (ratios < 1 - clip_low)
  eligible = mask & ~clipped & (scores > low) & (scores < high)
  if sequence_ids is None:
    sequence_ids = jnp.arange(len(mask))
  drawn = _uniform(key, sequence_ids, mask)
  return mask & ~_largest(drawn, eligible, _share(fraction, mask))


def top_covariance(
  logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  fraction: Scalar = 2e-3,
) -> Bool[Array, 'B T']:
  """Tokens of the highest covariance, for the penalty of `kl_cov`.

      c_t = (log π(y_t) − mean(log π)) (A_t − mean(A))
      the max(⌊k N⌋, 1) largest of the N tokens of the mask

  Args:
    logprobs: of the current policy.
    advantages: of each token.
    mask: tokens that the policy chose, of the whole minibatch.
    fraction: k, a share; the authors' code takes it in percent. The paper has
      2e-3 for 7B and 2e-4 for 32B parameters. 0 selects nothing.

  Returns:
    True on the tokens selected, all of them on the mask.

  References:
    Cui et al., 2025, The Entropy Mechanism of Reinforcement Learning for
    Reasoning Language Models, arXiv:2505.22617.
  """
  scores = _covariance(logprobs, advantages, mask)
  return _largest(scores, mask, _share(fraction, mask))


def top_entropy(
  entropy: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  fraction: Scalar = 0.2,
) -> Bool[Array, 'B T']:
  """Tokens of the highest entropy: the forks of the road.

      H_t ≥ the (1 − q) quantile of H over the mask

  Ties at the quantile all stay. Use it as the trained mask; the denominator
  stays that of all tokens in popular trainers.

  Args:
    entropy: of each token's distribution, `postrain.logprobs.token_entropy`.
    mask: tokens that the policy chose, of the whole minibatch.
    fraction: q in (0, 1].

  Returns:
    True on the tokens kept, all of them on the mask.

  References:
    Wang et al., 2025, Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive
    Effective Reinforcement Learning for LLM Reasoning, arXiv:2506.01939.
  """
  (entropy,) = promoted(entropy)
  ordered = jnp.sort(jnp.where(mask, entropy, jnp.inf), axis=None)
  # A token at or above an interpolated quantile is one at or above the next.
  place = (1 - fraction) * jnp.maximum(jnp.sum(mask) - 1, 0).astype(float)
  place = jnp.ceil(place * (1 - _slack(place))).astype(int)
  return mask & (entropy >= ordered[place])


def _over_sequence(x: Array, mask: Array, level: str) -> Array:
  if level == 'token':
    return x
  if level == 'max':
    return jnp.max(x, axis=1, keepdims=True, where=mask, initial=-jnp.inf)
  if level not in ('sum', 'mean'):
    raise ValueError(
      f"level is {level!r}; choose 'token', 'sum', 'mean' or 'max'"
    )
  total = jnp.sum(x, axis=1, keepdims=True)
  length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
  return total / length.astype(x.dtype) if level == 'mean' else total


def _covariance(logprobs: Array, advantages: Array, mask: Array) -> Array:
  count = jnp.maximum(jnp.sum(mask), 1)

  def centered(x: Array) -> Array:
    x = jnp.where(mask, x, 0)
    return jnp.where(mask, x - jnp.sum(x) / count.astype(x.dtype), 0)

  logprobs, advantages = promoted(logprobs, advantages)
  return centered(logprobs) * centered(advantages)


def _share(fraction: Scalar, mask: Array) -> Array:
  count = jnp.sum(mask).astype(float)
  share = fraction * count
  share = jnp.floor(share * (1 + _slack(share)))
  return jnp.where(fraction > 0, jnp.maximum(share, 1), 0).astype(int)


def _slack(x: Array) -> float:
  # A product of a fraction and a count that should be whole may just miss it.
  return 8 * float(jnp.finfo(x.dtype).eps)


def _largest(scores: Array, eligible: Array, count: Array) -> Array:
  ranked = jnp.argsort(jnp.where(eligible, -scores, jnp.inf), axis=None)
  rank = jnp.argsort(ranked).reshape(scores.shape)
  return eligible & (rank < count)


def _uniform(key: Array, sequence_ids: Array, mask: Array) -> Array:
  def draw(sequence: Array, number: Array) -> Array:
    place = jax.random.fold_in(jax.random.fold_in(key, sequence), number)
    return jax.random.uniform(place, (), jnp.float32)

  numbers = jnp.cumsum(mask, axis=1)  # 1 for the first token of the mask
  return jax.vmap(jax.vmap(draw, (None, 0)))(sequence_ids, numbers)
