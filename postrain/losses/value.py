"""Losses of the critic, per token."""

from jax import Array
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.dtypes import Scalar, promoted

__all__ = ['clipped_squared_error', 'squared_error']

Losses = tuple[Float[Array, 'B T'], dict[str, Float[Array, 'B T']]]


def squared_error(
  values: Float[Array, 'B T'],
  returns: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Losses:
  """Half the squared distance of values to returns.

      ℓ_t = ½ (V_t − R_t)²

  Args:
    values: of the current critic; the gradient flows here.
    returns: targets, constants.
    mask: tokens that the policy chose.

  Returns:
    Values and the metric 'error' V − R, 0 off the mask.

  References:
    Sutton and Barto, 2018, Reinforcement Learning: An Introduction.
  """
  values, returns = promoted(values, returns)
  error = jnp.where(mask, values - stop_gradient(returns), 0)
  return jnp.square(error) / 2, {'error': stop_gradient(error)}


def clipped_squared_error(
  values: Float[Array, 'B T'],
  old_values: Float[Array, 'B T'],
  returns: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip: Scalar = 0.2,
) -> Losses:
  """Squared error that gains nothing by moving far from the old values.

      ℓ_t = ½ max((V_t − R_t)², (V_old + clip(V_t − V_old, ±ε) − R_t)²)

  The gradient is 0 where the clipped branch is the larger.

  Args:
    values: of the current critic; the gradient flows here.
    old_values: of the critic at the rollout, constants.
    returns: targets, constants.
    mask: tokens that the policy chose.
    clip: ε > 0 in units of value; 0.2 and 0.5 are common.

  Returns:
    Values and the metrics 'error' V − R and 'clipped', 0 off the mask.

  References:
    Schulman et al., 2017, Proximal Policy Optimization Algorithms (its
    implementation), arXiv:1707.06347.
  """
  values, old_values, returns = promoted(values, old_values, returns)
  old_values, returns = stop_gradient((old_values, returns))
  error = jnp.where(mask, values - returns, 0)
  moved = jnp.where(mask, values - old_values, 0)
  bounded = jnp.clip(stop_gradient(moved), -clip, clip)
  clipped_error = jnp.where(mask, old_values - returns, 0) + bounded
  clipped = jnp.square(clipped_error) > jnp.square(error)
  clipped &= jnp.abs(moved) > clip
  worst = jnp.where(clipped, clipped_error, error)
  metrics = {
    'error': stop_gradient(error),
    'clipped': clipped.astype(error.dtype),
  }
  return jnp.square(worst) / 2, metrics
