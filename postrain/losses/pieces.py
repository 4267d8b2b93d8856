"""Pieces that several losses share."""

import math

from jax import Array
from jax.lax import stop_gradient
from jax.nn import log_sigmoid
import jax.numpy as jnp

from postrain.dtypes import Scalar, promoted


def implicit_rewards(
  chosen: Array,
  rejected: Array,
  ref_chosen: Array,
  ref_rejected: Array,
  beta: Scalar,
) -> tuple[Array, Array]:
  """β times the log-ratios of a pair; the reference is constant."""
  chosen, rejected, ref_chosen, ref_rejected = promoted(
    chosen, rejected, ref_chosen, ref_rejected
  )
  won = beta * (chosen - stop_gradient(ref_chosen))
  lost = beta * (rejected - stop_gradient(ref_rejected))
  return won, lost


def smoothed(margin: Array, label_smoothing: Scalar) -> Array:
  """−(1 − ε) log σ(h) − ε log σ(−h), which is ε h − log σ(h)."""
  return label_smoothing * margin - log_sigmoid(margin)


def reward_figures(won: Array, lost: Array) -> dict[str, Array]:
  """Rewards of a pair, their margin, and whether it has the right sign."""
  margin = won - lost
  figures = {
    'chosen_reward': won,
    'rejected_reward': lost,
    'margin': margin,
    'accuracy': (margin > 0).astype(margin.dtype),
  }
  return {k: stop_gradient(v) for k, v in figures.items()}


def pair_figures(won: Array, lost: Array, chosen: Array) -> dict[str, Array]:
  """And the log-prob of the chosen, which many of these losses lower."""
  (chosen,) = promoted(chosen)
  return reward_figures(won, lost) | {'chosen_logprob': stop_gradient(chosen)}


def per_token(
  chosen: Array, rejected: Array, chosen_lengths: Array, rejected_lengths: Array
) -> tuple[Array, Array]:
  """Mean log-probs of the tokens of a pair; an empty completion has 0."""
  chosen, rejected = promoted(chosen, rejected)
  long = jnp.maximum(chosen_lengths, 1).astype(chosen.dtype)
  short = jnp.maximum(rejected_lengths, 1).astype(chosen.dtype)
  return chosen / long, rejected / short


def log1mexp(x: Array) -> Array:
  """log(1 − eˣ) for x < 0, without cancellation at either end."""
  # Below −log 2 the sum 1 − eˣ keeps its digits; above, expm1 does.
  return jnp.where(
    x > -math.log(2),
    jnp.log(-jnp.expm1(x)),
    jnp.log1p(-jnp.exp(x)),
  )
