"""What is added to rewards: divergence, length, repetition, process.

Everything here is made of arrays; rewards read from text are in
`postrain.rewards`. Penalties are at most 0 and are added, so that a term is
always ``rewards + coef * term``. All results are constants for the gradient.

Arguments throughout: ``mask`` is True on the tokens that the policy chose, and
``where`` on the samples that exist (None for all); elsewhere the result is 0,
whatever the arrays hold. ``lengths`` count the tokens of a completion, not its
characters.
"""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.dtypes import Scalar, promoted

__all__ = [
  'composite',
  'difference_rewards',
  'kl_penalized',
  'kl_shaped',
  'language_consistency',
  'length_penalty',
  'length_reward',
  'repetition_penalty',
  'soft_overlong',
  'strict_composite',
  'weighted_sum',
]


def kl_shaped(
  rewards: Float[Array, ' B'],
  penalties: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  truncated: Bool[Array, ' B'] | None = None,
  *,
  coef: Scalar = 0.05,
  missing_eos_penalty: Scalar | None = None,
) -> Float[Array, 'B T']:
  """Rewards of tokens: a penalty on each, the outcome on the last.

      r_t = −β k_t + 1[t is the last token] · R

  With k1 of the policy that sampled and undiscounted returns, the expected
  gradient is that of E[R] − β KL(π‖π_ref) over whole sequences. A sequence
  without tokens has no place for its reward, which is dropped.

  Args:
    rewards: R of each sequence.
    penalties: an estimate k_t of `postrain.kl` from the log-probs of the
      rollout, computed once for it.
    mask: see the module; the last token is the last of the mask.
    truncated: sequences without a stop token.
    coef: β ≥ 0.
    missing_eos_penalty: subtracted from R of truncated sequences; None for
      nothing.

  Returns:
    Rewards of tokens; a row sums to R − β Σ_t k_t.

  Raises:
    ValueError: a penalty for truncated sequences, but not which those are.

  References:
    Ziegler et al., 2019, Fine-Tuning Language Models from Human
    Preferences, arXiv:1909.08593; Ouyang et al., 2022, InstructGPT,
    arXiv:2203.02155.
  """
  rewards, penalties = promoted(rewards, penalties)
  if missing_eos_penalty is not None:
    if truncated is None:
      raise ValueError(
        'missing_eos_penalty needs to know which sequences are truncated'
      )
    rewards = rewards - jnp.where(truncated, missing_eos_penalty, 0)
  position = jnp.arange(mask.shape[1])[None, :]
  last = jnp.max(jnp.where(mask, position, -1), axis=1, keepdims=True)
  outcome = jnp.where(position == last, rewards[:, None], 0)
  shaped = jnp.where(mask, outcome - coef * penalties, 0)
  return jax.lax.stop_gradient(shaped)


def kl_penalized(
  rewards: Float[Array, ' B'],
  penalties: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  coef: Scalar = 0.05,
) -> Float[Array, ' B']:
  """Rewards of sequences, less the penalties of all their tokens.

      R' = R − β Σ_t k_t

  For advantages over groups: fold it in before they are centred. Dividing by
  the deviation after that gives every prompt a coefficient of its own.

  Args:
    rewards, penalties, mask, coef: as for `kl_shaped`.

  Returns:
    Rewards of sequences; those without tokens keep theirs.

  References:
    Ahmadian et al., 2024, Back to Basics (RLOO), arXiv:2402.14740.
  """
  rewards, penalties = promoted(rewards, penalties)
  total = jnp.sum(jnp.where(mask, penalties, 0), axis=1)
  return jax.lax.stop_gradient(rewards - coef * total)


def difference_rewards(
  scores: Float[Array, 'B T'],
  initial: Float[Array, ' B'],
  where: Bool[Array, 'B T'],
) -> Float[Array, 'B T']:
  """What each step adds to the score of a process reward model.

      r_j = s_j − s_{j−1},   s_0 = initial

  They telescope: a row sums to its last score less the initial one, whatever
  the number of steps, and the reward-to-go (`advantages.discounted_returns`)
  is the last score less the present one. Where the last score is the outcome
  itself, the optimal policy stays as it is.

  Args:
    scores: of the solution so far, at the last token of each step.
    initial: score of the prompt alone.
    where: True at the last token of each step.

  Returns:
    Rewards at the last tokens of steps, 0 elsewhere.

  References:
    Ng, Harada and Russell, 1999, Policy Invariance Under Reward
    Transformations.
  """
  scores, initial = promoted(scores, initial)
  position = jnp.arange(where.shape[1])[None, :]
  seen = jax.lax.cummax(jnp.where(where, position, -1), axis=1)
  before = jnp.pad(seen[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  previous = jnp.take_along_axis(scores, jnp.maximum(before, 0), axis=1)
  previous = jnp.where(before < 0, initial[:, None], previous)
  return jax.lax.stop_gradient(jnp.where(where, scores - previous, 0))


def soft_overlong(
  lengths: Int[Array, '*n'],
  *,
  max_length: Scalar,
  buffer: Scalar,
  capped: bool = True,
) -> Float[Array, '*n']:
  """A penalty that grows over the last tokens before the limit.

      −clip((|y| − (L − C)) / C, 0, 1)

  A window, not a price on length: below L − C nothing is paid. The paper has
  L − C = 16384 and C = 4096. One peer does not cap it at −1 beyond L.

  Args:
    lengths: see the module.
    max_length: L, the limit of the completion length.
    buffer: C > 0, length of the window before it.
    capped: whether the penalty stays at −1 beyond L.

  Returns:
    Penalties.

  References:
    Yu et al., 2025, DAPO, arXiv:2503.14476.
  """
  excess = (lengths.astype(float) - (max_length - buffer)) / buffer
  return -jnp.clip(excess, 0, 1 if capped else None)


def length_penalty(
  lengths: Int[Array, '*n'], *, coef: Scalar
) -> Float[Array, '*n']:
  """A price on every token.

      −λ |y|

  The same as a reward of −λ for each token.

  Args:
    lengths: see the module.
    coef: λ ≥ 0.

  Returns:
    Penalties, at most 0.
  """
  return -coef * lengths.astype(float)


def length_reward(
  rewards: Float[Array, 'P G'],
  lengths: Int[Array, 'P G'],
  where: Bool[Array, 'P G'] | None = None,
  *,
  threshold: Scalar = 0.5,
) -> Float[Array, 'P G']:
  """Prefer the shorter answers of a group; wrong ones never gain by it.

      λ_i = 1/2 − (|y_i| − min_G |y|) / (max_G |y| − min_G |y|)
      λ_i if y_i is right, min(0, λ_i) otherwise

  Equal lengths give 0. To be added with a weight, after a warm-up without.

  Args:
    rewards: say which answers are right.
    lengths, where: see the module.
    threshold: rewards above are right.

  Returns:
    Rewards in [−1/2, 1/2].

  References:
    Kimi Team, 2025, Kimi k1.5, arXiv:2501.12599.
  """
  (rewards,) = promoted(rewards)
  where = jnp.ones_like(rewards, bool) if where is None else where
  lengths = lengths.astype(rewards.dtype)
  longest, shortest = (
    reduce(jnp.where(where, lengths, other), axis=1, keepdims=True)
    for reduce, other in ((jnp.max, -jnp.inf), (jnp.min, jnp.inf))
  )
  spread = where & (longest > shortest)
  share = (lengths - shortest) / jnp.where(spread, longest - shortest, 1)
  gain = jnp.where(spread, 0.5 - share, 0)
  right = rewards > threshold
  return jnp.where(right, gain, jnp.minimum(gain, 0))


def repetition_penalty(
  tokens: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  ngram_size: int = 3,
  max_penalty: Scalar = -1.0,
) -> Float[Array, ' B']:
  """A penalty for the share of n-grams that are not the first of their kind.

      p · (1 − #distinct n-grams / #n-grams)

  N-grams do not reach across gaps of the mask.

  Args:
    tokens: ids.
    mask: see the module.
    ngram_size: n ≥ 1.
    max_penalty: p ≤ 0.

  Returns:
    Penalties in [p, 0]; 0 for sequences without an n-gram.

  References:
    Yeo et al., 2025, Demystifying Long Chain-of-Thought Reasoning in LLMs,
    arXiv:2502.03373.
  """
  length = tokens.shape[1]
  tokens, mask = (
    jnp.pad(x, ((0, 0), (0, ngram_size - 1))) for x in (tokens, mask)
  )
  spans = [slice(i, i + length) for i in range(ngram_size)]
  whole = jnp.all(jnp.stack([mask[:, s] for s in spans]), axis=0)
  # Sorted, equal n-grams are neighbours, and whole ones come first.
  keys = (*(tokens[:, s] for s in spans), (~whole).astype(tokens.dtype))
  order = jnp.lexsort(keys, axis=-1)
  *ngrams, outside = (jnp.take_along_axis(k, order, axis=1) for k in keys)
  changed = [jnp.diff(x, axis=1, prepend=x[:, :1] - 1) != 0 for x in ngrams]
  first = jnp.any(jnp.stack(changed), axis=0) & (outside == 0)
  distinct, total = (jnp.sum(x, axis=1).astype(float) for x in (first, whole))
  return max_penalty * (total - distinct) / jnp.maximum(total, 1)


def language_consistency(
  in_language: Bool[Array, 'B T'], mask: Bool[Array, 'B T']
) -> Float[Array, ' B']:
  """Share of the tokens that are in the wanted language.

      Σ_t m_t 1[y_t in the language] / |y|

  Args:
    in_language: of each token.
    mask: the tokens of the reasoning.

  Returns:
    Shares in [0, 1]; 0 for sequences without tokens.

  References:
    DeepSeek-AI, 2025, DeepSeek-R1, arXiv:2501.12948.
  """
  matching, total = (
    jnp.sum(x, axis=1).astype(float) for x in (mask & in_language, mask)
  )
  return matching / jnp.maximum(total, 1)


def weighted_sum(
  rewards: Float[Array, '*n K'], *, weights: tuple[Scalar, ...]
) -> Float[Array, '*n']:
  """Several rewards added up: accuracy and a bit for the format, say.

      R = Σ_k w_k r_k

  A policy that only has the format right must earn less than one gains by
  accuracy. Rewards of different scale may be standardised first, see
  `advantages.gdpo`.

  Args:
    rewards: K rewards of each sample.
    weights: w_k.

  Returns:
    Sums.

  Raises:
    ValueError: the number of weights is not K.

  References:
    DeepSeek-AI, 2025, DeepSeek-R1, arXiv:2501.12948.
  """
  (rewards,) = promoted(rewards)
  num = rewards.shape[-1]
  if len(weights) != num:
    raise ValueError(f'{len(weights)} weights for {num} rewards: give {num}')
  scale = jnp.asarray(weights, rewards.dtype)
  total = jnp.matmul(rewards, scale, precision='highest')
  return jax.lax.stop_gradient(total)


def composite(
  outcomes: Float[Array, '*n'],
  process: Float[Array, '*n'],
  *,
  outcome_weight: Scalar,
) -> Float[Array, '*n']:
  """A mixture of the outcome and of the share of right steps.

      R = α R_out + (1 − α) R_process

  A lucky answer with wrong steps still earns α; see `strict_composite`.

  Args:
    outcomes: rewards of final answers.
    process: share of the steps that are right, in [0, 1].
    outcome_weight: α in [0, 1].

  Returns:
    Rewards.

  References:
    Zhang et al., 2025, On the Interplay of Pre-Training, Mid-Training, and RL
    on Reasoning Language Models, arXiv:2512.07783.
  """
  outcomes, process = promoted(outcomes, process)
  mixed = outcome_weight * outcomes + (1 - outcome_weight) * process
  return jax.lax.stop_gradient(mixed)


def strict_composite(
  outcomes: Float[Array, '*n'], process: Float[Array, '*n']
) -> Float[Array, '*n']:
  """The outcome, paid only where every step is right.

      R = R_out · 1[R_process = 1]

  Args:
    outcomes: rewards of final answers.
    process: share of the steps that are right; 1 up to rounding is all.

  Returns:
    Rewards.

  References:
    Zhang et al., 2025, On the Interplay of Pre-Training, Mid-Training, and RL
    on Reasoning Language Models, arXiv:2512.07783.
  """
  outcomes, process = promoted(outcomes, process)
  complete = process > 1 - 8 * jnp.finfo(process.dtype).eps
  return jax.lax.stop_gradient(jnp.where(complete, outcomes, 0))
