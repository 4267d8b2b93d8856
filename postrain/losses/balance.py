"""Balance of a mixture of experts, per token."""

from jax import Array
from jax.lax import stop_gradient
from jax.nn import one_hot, softmax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.dtypes import promoted

__all__ = ['expert_shares', 'load_balance']


def expert_shares(
  experts: Int[Array, 'B T K'], mask: Bool[Array, 'B T'], *, num_experts: int
) -> Float[Array, 'E']:
  """Measure which share of all selections each expert has.

      f_e = Σ_{t,k} [e_{t,k} = e] / (K Σ_t 1), over real tokens

  Over a whole minibatch these are what `load_balance` needs to be additive
  over its parts. Of no token the shares are 0.

  Args:
    experts: selected indices of one layer.
    mask: tokens that count; padding is False.
    num_experts: E.

  Returns:
    Shares, which sum to 1.

  References:
    Fedus et al., 2021, Switch Transformers, arXiv:2101.03961.
  """
  return _shares(experts, mask, num_experts, axes=(0, 1))


def load_balance(
  router_logits: Float[Array, 'B T E'],
  experts: Int[Array, 'B T K'],
  mask: Bool[Array, 'B T'],
  shares: Float[Array, 'E'] | None = None,
) -> tuple[Float[Array, 'B T'], dict[str, Float[Array, 'B T']]]:
  """Probability given to the experts that have more than their share.

      ℓ_t = E Σ_e f_e p_e(t), p the softmax of the router's logits

  A weighted mean over tokens is E Σ_e f_e P_e of the papers, 1 where the load
  is even; the sum over the selected of transformers' auxiliary loss is K times
  it. One layer of experts: map it over layers and take the mean.

  Args:
    router_logits: of one layer; the gradient flows here.
    experts: selected indices, replayed ones too.
    mask: tokens that count, those of prompts too; padding is False.
    shares: f, constants, by `expert_shares` over the minibatch: the loss of the
      whole minibatch, and additive over its units. None takes those of each
      sequence: additive without a pass before, and stricter.

  Returns:
    Values and the metric 'peak_load' E max f, 0 off the mask.

  References:
    Fedus et al., 2021, Switch Transformers, arXiv:2101.03961; DeepSeek-AI,
    2024, DeepSeek-V3 (per sequence), arXiv:2412.19437.
  """
  if shares is None:
    shares = _shares(experts, mask, router_logits.shape[-1], axes=(1,))
  wide, shares = promoted(router_logits, shares)
  logits = jnp.where(mask[..., None], wide, 0)
  scaled = stop_gradient(shares) * shares.shape[-1]
  scaled = jnp.broadcast_to(jnp.expand_dims(scaled, -2), logits.shape)
  values = jnp.sum(softmax(logits, axis=-1) * scaled, axis=-1)
  peak = jnp.where(mask, jnp.max(scaled, axis=-1), 0)
  return jnp.where(mask, values, 0), {'peak_load': peak}


def _shares(
  experts: Array, mask: Array, num_experts: int, axes: tuple[int, ...]
) -> Array:
  """Shares over some of the axes of the tokens."""
  dtype = jnp.result_type(float)
  chosen = one_hot(experts, num_experts, dtype=dtype).mean(axis=2)
  total = jnp.sum(jnp.where(mask[..., None], chosen, 0), axis=axes)
  count = jnp.maximum(jnp.sum(mask, axis=axes, dtype=dtype), 1)
  return total / jnp.expand_dims(count, -1)
