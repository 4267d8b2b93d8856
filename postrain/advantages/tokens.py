"""From token rewards to advantages of tokens."""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.advantages.common import membership, pooled
from postrain.dtypes import Scalar, promoted


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


def reinforce_plus_plus(
  rewards: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  discount: Scalar = 1.0,
  eps: Scalar = 1e-8,
  ddof: int = 1,
) -> Float[Array, 'B T']:
  """Discounted returns, whitened over all tokens of the batch: REINFORCE++.

      A_t = (R_t − mean) / √(var + ε),   R_t = r_t + γ R_{t+1}

  No groups and no critic; the rewards are meant to hold a penalty per token,
  see `postrain.shaping.kl_shaped`. Peers differ in ddof.

  Args:
    rewards: of each token; only those on the mask count.
    mask: tokens that the policy chose.
    discount: γ in [0, 1].
    eps, ddof: as for `whiten`.

  Returns:
    Advantages, 0 off the mask.

  References:
    Hu et al., 2025, REINFORCE++, arXiv:2501.03262.
  """
  returns = discounted_returns(rewards, mask, discount=discount)
  return whiten(returns, mask, eps=eps, ddof=ddof)


def reinforce_plus_plus_baseline(
  rewards: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  groups: Int[Array, ' B'],
  *,
  eps: Scalar = 1e-8,
  ddof: int = 1,
) -> Float[Array, 'B T']:
  """Total rewards, centred in their group and whitened over all tokens.

      A_{i,t} = whiten(R_i − mean_G(R)),   R_i = Σ_t r_{i,t}

  Long responses weigh more in the whitening. A sequence without tokens has no
  reward here and does not count; where it should, whiten `group_centered`.

  Args:
    rewards: of each token; only those on the mask count.
    mask, groups: see the module.
    eps, ddof: as for `whiten`.

  Returns:
    Advantages, 0 off the mask.

  References:
    Hu et al., 2025, REINFORCE++, arXiv:2501.03262.
  """
  (rewards,) = promoted(rewards)
  totals = jnp.sum(jnp.where(mask, rewards, 0), axis=1)
  present = jnp.any(mask, axis=1).astype(rewards.dtype)
  same = membership(groups, rewards.dtype)
  mean = pooled(same, totals) / jnp.maximum(pooled(same, present), 1)
  centered = jnp.where(mask, (totals - mean)[:, None], 0)
  return whiten(centered, mask, eps=eps, ddof=ddof)
