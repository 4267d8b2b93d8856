"""Process reward models: the loss of each step, its labels, one score of all.

``mask`` is True on the last token of each step (or on the entries of a
``[B S]`` array of steps); everything else is ignored.
"""

from typing import Literal

from jax import Array
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.dtypes import promoted
from postrain.losses.reward_models import last_score, outcome_correctness

__all__ = [
  'monte_carlo_labels',
  'step_correctness',
  'step_score',
  'until_first_error',
]

Losses = tuple[Float[Array, 'B T'], dict[str, Float[Array, 'B T']]]
Aggregate = Literal['min', 'product', 'sum', 'mean', 'last']


def step_correctness(
  scores: Float[Array, 'B T'],
  labels: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Losses:
  """Cross-entropy of a process reward model at the end of each step.

      ℓ_t = −c_t log σ(s_t) − (1 − c_t) log σ(−s_t)

  Args:
    scores: logits s; the gradient flows here.
    labels: c in [0, 1], of a rater or of `monte_carlo_labels`; constants.
    mask: last token of each step; see `until_first_error` for what to train.

  Returns:
    Values, and metrics: 'probability' σ(s), 'accuracy' (1 where σ(s) is on the
    side of c), 0 off the mask.

  References:
    Lightman et al., 2023, Let's Verify Step by Step, arXiv:2305.20050; Wang
    et al., 2023, Math-Shepherd, arXiv:2312.08935.
  """
  scores, labels = promoted(scores, labels)
  shown = (jnp.where(mask, x, 0).reshape(-1) for x in (scores, labels))
  values, metrics = outcome_correctness(*shown)

  def on_mask(x: Array) -> Array:
    return jnp.where(mask, x.reshape(mask.shape), 0)

  return on_mask(values), {k: on_mask(v) for k, v in metrics.items()}


def monte_carlo_labels(
  correct: Float[Array, 'B S M'], *, hard: bool = False
) -> Float[Array, 'B S']:
  """Labels of steps from the completions that were sampled after each.

      soft  c = (1 / M) Σ_m correct_m        hard  c = max_m correct_m

  The soft label tends to P(success | prefix); the hard one says whether the
  answer can still be reached, and with M it tends to 1 wherever it can.

  Args:
    correct: 1 where a completion ended right, else 0.
    hard: whether a single success makes a step right.

  Returns:
    Labels in [0, 1], constants.

  References:
    Wang et al., 2023, Math-Shepherd: Verify and Reinforce LLMs Step-by-step
    without Human Annotations, arXiv:2312.08935.
  """
  (correct,) = promoted(correct)
  reduce = jnp.max if hard else jnp.mean
  return stop_gradient(reduce(correct, axis=-1))


def until_first_error(
  correct: Bool[Array, 'B T'], mask: Bool[Array, 'B T']
) -> Bool[Array, 'B T']:
  """The steps up to and with the first wrong one.

      m′_t = m_t ∧ (c_u for all u < t with m_u)

  What follows an error has no clear label: leave it out of the loss.

  Args:
    correct: c of each step, say labels above one half.
    mask: last token of each step.

  Returns:
    The mask without what follows the first error.

  References:
    Lightman et al., 2023, Let's Verify Step by Step, arXiv:2305.20050.
  """
  wrong = (mask & ~correct).astype(jnp.int32)
  earlier = jnp.cumsum(wrong, axis=1) - wrong
  return mask & (earlier == 0)


def step_score(
  scores: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  aggregate: Aggregate = 'min',
) -> Float[Array, ' B']:
  """One score of a solution from those of its steps.

      min_t p_t,   Π_t p_t,   Σ_t p_t,   mean_t p_t   or   p_last

  A sum of probabilities pays for each further step: a solution gains by
  padding it out. The minimum and the product never gain.

  Args:
    scores: p of each step, probabilities for the product.
    mask: last token of each step.
    aggregate: 'min', 'product', 'sum', 'mean' or 'last'.

  Returns:
    One score for each row; 0 without steps.

  Raises:
    ValueError: unknown aggregate.

  References:
    Lightman et al., 2023, Let's Verify Step by Step (product and minimum),
    arXiv:2305.20050.
  """
  if aggregate == 'last':
    return last_score(scores, mask)
  (scores,) = promoted(scores)
  total = jnp.sum(jnp.where(mask, scores, 0), axis=1)
  if aggregate == 'sum':
    return total
  count = jnp.sum(mask, axis=1)
  if aggregate == 'mean':
    return total / jnp.maximum(count, 1).astype(scores.dtype)
  if aggregate not in ('min', 'product'):
    raise ValueError(
      f"aggregate is {aggregate!r}; choose 'min', 'product', 'sum', 'mean' or"
      " 'last'"
    )
  if aggregate == 'min':
    found = jnp.min(jnp.where(mask, scores, jnp.inf), axis=1, initial=jnp.inf)
  else:
    found = jnp.prod(jnp.where(mask, scores, 1), axis=1)
  return jnp.where(count > 0, found, 0)
