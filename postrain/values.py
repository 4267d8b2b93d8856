"""Values of a critic for given tokens, and what they know of the returns."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain.scoring import hidden_states, map_logits
from postrain.types import Model, Packing, SharedPrompts

__all__ = ['explained_variance', 'token_values']


def token_values(
  model: Model,
  params: Any,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  packing: Packing | SharedPrompts | None = None,
  *,
  chunk_size: int = 128,
  states: Float[Array, 'B T D'] | None = None,
) -> Float[Array, 'B T']:
  """Values of a critic: of the state before each token under the mask.

  ``out[:, t]`` has read ``tokens[:, :t]`` and so stands beside the log-prob and
  the advantage of ``tokens[:, t]``.

  Args:
    model: whose unembed gives one value.
    params, tokens, valid, mask, packing, chunk_size: as for
      `postrain.scoring.score`.
    states: those of `postrain.scoring.hidden_states` of a trunk that it shares;
      None has it read the tokens itself.

  Returns:
    Values, 0 off the mask.
  """
  if states is None:
    states = hidden_states(model, params, tokens, valid, mask, packing)
  values = map_logits(
    lambda v: v[..., 0], model, params, states, chunk_size=chunk_size,
    packing=packing,
  )  # fmt: skip
  return jnp.where(mask, values, 0)


def explained_variance(
  values: Float[Array, 'B T'],
  returns: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, '']:
  """What the values knew of the returns: 1 − Var(R − V) / Var(R).

  1 of perfect values, 0 of a constant, below 0 of values worse than one. Of
  returns that are all equal it is 0 where the values differ from them by a
  constant.
  """
  left, whole = (jnp.var(x, where=mask) for x in (returns - values, returns))
  return jnp.where(left == whole, 0, 1 - left / jnp.maximum(whole, 1e-8))
