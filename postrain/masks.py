"""Which tokens, sequences and groups take part."""

from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.dtypes import Scalar, promoted

__all__ = ['informative_groups', 'overlong']


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
