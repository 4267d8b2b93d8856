"""Credit for the steps of a solution and for the turns of a dialogue."""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.advantages.common import membership, pooled, scaled
from postrain.advantages.tokens import discounted_returns, gae
from postrain.dtypes import Scalar, promoted


def group_process(
  rewards: Float[Array, 'B T'],
  where: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  groups: Int[Array, ' B'],
  *,
  eps: Scalar = 1e-6,
  ddof: int = 0,
) -> Float[Array, 'B T']:
  """Step rewards standardised over the group, summed from each token on.

      A_{i,t} = Σ_{j: end_i(j) ≥ t} (r_{i,j} − mean_G(r)) / (std_G(r) + ε)

  Mean and deviation are over all steps of all samples of the group. Tokens
  after the last step give 0, and so does a sample without steps. Many steps of
  positive advantage add up: watch the number of steps per response.

  Args:
    rewards: of each step, at its last token.
    where: True at the last token of each step.
    mask, groups: see the module; steps that end off the mask do not count.
    eps: ε > 0, added to the deviation.
    ddof: 0 divides the squares by the number of steps n, 1 by n−1.

  Returns:
    Advantages, constant between steps, 0 off the mask.

  References:
    Shao et al., 2024, DeepSeekMath (process supervision), arXiv:2402.03300.
  """
  (rewards,) = promoted(rewards)
  where = where & mask
  same = membership(groups, rewards.dtype)
  largest = _group_max(same, jnp.where(where, rewards, -jnp.inf))
  peak = _group_max(same, jnp.where(where, jnp.abs(rewards), 0))
  # Measured from the largest, equal rewards are exactly 0.
  offsets = jnp.where(where, rewards - largest[:, None], 0)
  count = pooled(same, jnp.sum(where, axis=1).astype(rewards.dtype))
  mean = pooled(same, jnp.sum(offsets, axis=1)) / jnp.maximum(count, 1)
  offsets = jnp.where(where, offsets - mean[:, None], 0)
  squares = pooled(same, jnp.sum(jnp.square(offsets), axis=1))
  std = jnp.sqrt(squares / jnp.maximum(count - ddof, 1))
  std = jnp.where(std > 8 * jnp.finfo(rewards.dtype).eps * peak, std, 0)
  return discounted_returns(scaled(offsets, std[:, None], eps), mask)


def turn_gae(
  rewards: Float[Array, 'B T'],
  values: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  turn_ids: Int[Array, 'B T'],
  bootstrap: Float[Array, ' B'] | None = None,
  *,
  discount: Scalar = 1.0,
  lambda_: Scalar = 0.95,
) -> Float[Array, 'B T']:
  """Generalised advantage estimation where a whole turn is one action.

      δ_k = R_k + γ V_{k+1} − V_k,   A_k = δ_k + γ λ A_{k+1}

  R_k is the sum of the rewards of turn k and V_k the value before its first
  token. All tokens of a turn share its advantage; the words of the user or of
  a tool between turns cost no discount.

  Args:
    rewards: of each token; only those on the mask count.
    values: the critic's estimate before each token; read at turn starts only.
    mask: tokens that the policy chose.
    turn_ids: number of each token's turn; a turn is a run of equal numbers
      along the mask.
    bootstrap: value after the last turn, for dialogues that were cut off; None
      for 0.
    discount: γ in [0, 1], per turn.
    lambda_: λ in [0, 1].

  Returns:
    Advantages, 0 off the mask.

  References:
    Schulman et al., 2015, High-Dimensional Continuous Control Using
    Generalized Advantage Estimation, arXiv:1506.02438; Zhou et al., 2024,
    ArCHer: Training Language Model Agents via Hierarchical Multi-Turn RL,
    arXiv:2402.19446.
  """
  (rewards,) = promoted(rewards)
  first, start = _turns(mask, turn_ids)
  rows = jnp.arange(len(rewards))[:, None]
  shown = jnp.where(mask, rewards, 0)
  totals = jnp.zeros_like(rewards).at[rows, start].add(shown)
  advantages = gae(
    totals, values, first, bootstrap, discount=discount, lambda_=lambda_
  )
  return jnp.where(mask, jnp.take_along_axis(advantages, start, axis=1), 0)


def turn_returns(
  rewards: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  turn_ids: Int[Array, 'B T'],
  *,
  discount: Scalar = 1.0,
) -> Float[Array, 'B T']:
  """Discounted sum of the rewards of a turn and of those after it.

      G_k = R_k + γ G_{k+1}

  What a turn could not change, the rewards before it, is no part of its
  credit; within a turn nothing is discounted.

  Args:
    rewards, mask, turn_ids, discount: as for `turn_gae`.

  Returns:
    Returns, the same for all tokens of a turn, 0 off the mask.

  References:
    Williams, 1992, Simple Statistical Gradient-Following Algorithms for
    Connectionist Reinforcement Learning.
  """
  values = jnp.zeros_like(rewards)
  return turn_gae(
    rewards, values, mask, turn_ids, discount=discount, lambda_=1.0
  )


def _group_max(same: Array, x: Array) -> Array:
  highest = jnp.max(x, axis=1)
  return jnp.max(jnp.where(same > 0, highest[None, :], -jnp.inf), axis=1)


def _turns(mask: Array, turn_ids: Array) -> tuple[Array, Array]:
  """First tokens of turns, and for each token where its turn starts."""
  position = jnp.arange(mask.shape[1])[None, :]
  seen = jax.lax.cummax(jnp.where(mask, position, -1), axis=1)
  before = jnp.pad(seen[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  last = jnp.take_along_axis(turn_ids, jnp.maximum(before, 0), axis=1)
  first = mask & ((before < 0) | (turn_ids != last))
  start = jax.lax.cummax(jnp.where(first, position, 0), axis=1)
  return first, start
