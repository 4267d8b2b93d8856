"""Losses whose trust region has no edge, or lies within a mean.

A gate that closes smoothly with the ratio of a token (`sapo`) or of a sequence
(`vespo`), and the geometric mean of clipped ratios (`geometric_mean`).
Arguments, values and the metrics of all are those of `postrain.losses.policy`.
"""

import jax
from jax import Array
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain import importance
from postrain.dtypes import Scalar, promoted
from postrain.losses.surrogate import (
  Losses,
  bounded,
  drift,
  indicators,
  weighted_logprobs,
)

__all__ = ['geometric_mean', 'sapo', 'vespo']


def sapo(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  temperature_positive: Scalar = 1.0,
  temperature_negative: Scalar = 1.05,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """A soft gate in place of the clip.

      ℓ_t = −(4 / τ) σ(τ (ρ_t − 1)) A_t

  The gradient is ρ A at ρ = 1 times a weight that falls off smoothly on both
  sides. Negative advantages, which raise all other tokens, get the narrower
  gate. The value on policy is 2 A / τ, not A. The paper has it with
  `sequence_mean`.

  Args:
    logprobs, old_logprobs, advantages, mask: see `postrain.losses.policy`.
    temperature_positive: τ > 0 where A > 0; larger is narrower.
    temperature_negative: τ > 0 elsewhere.
    max_log_ratio: limit of |log ρ|, without gradient beyond; None for none.

  Returns:
    Values, and metrics with 'gate', the weight 4 σ (1 − σ) in [0, 1].

  References:
    Gao et al., 2025, Soft Adaptive Policy Optimization, arXiv:2511.20347.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  ratios = importance.ratio(
    logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio
  )
  advantages = jnp.where(mask, stop_gradient(advantages), 0)
  temperature = jnp.where(
    advantages > 0, temperature_positive, temperature_negative
  ).astype(ratios.dtype)
  share = jax.nn.sigmoid(temperature * (ratios - 1))
  values = -4 * share / temperature * advantages
  gate = jnp.where(mask, stop_gradient(4 * share * (1 - share)), 0)
  metrics = drift(logprobs, old_logprobs, mask, max_log_ratio)
  return values, metrics | {'gate': gate}


def vespo(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  power_positive: Scalar = 2.0,
  rate_positive: Scalar = 3.0,
  power_negative: Scalar = 3.0,
  rate_negative: Scalar = 2.0,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Policy gradient with a smooth, constant weight of the whole sequence.

      w = exp(Σ_t log ρ_t),   φ(w) = w^k exp(λ (1 − w))
      ℓ_t = −sg(φ(w)) A_t log π(y_t)

  φ(1) = 1, and φ falls to 0 on both sides: far responses fade, near ones count
  by more than their ratio. No length enters, unlike `gspo`.

  Args:
    logprobs, old_logprobs, advantages, mask: see `postrain.losses.policy`.
    power_positive, rate_positive: k and λ where A ≥ 0.
    power_negative, rate_negative: k and λ where A < 0.
    max_log_ratio: limit of |log w|; None for none.

  Returns:
    Values, and metrics with 'weight', φ.

  References:
    Shen et al., 2026, VESPO: Variational Sequence-Level Soft Policy
    Optimization for Stable Off-Policy LLM Training, arXiv:2602.10693.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  ratios = importance.product_ratio(
    stop_gradient(logprobs), old_logprobs, mask, max_log_ratio=max_log_ratio
  )[:, None]
  advantages = jnp.where(mask, advantages, 0)
  power = jnp.where(advantages < 0, power_negative, power_positive)
  rate = jnp.where(advantages < 0, rate_negative, rate_positive)
  power, rate = power.astype(ratios.dtype), rate.astype(ratios.dtype)
  weights = jnp.exp(power * jnp.log(ratios) + rate * (1 - ratios))
  values = weighted_logprobs(weights * advantages, logprobs, mask)
  metrics = drift(logprobs, old_logprobs, mask, max_log_ratio)
  return values, metrics | {'weight': jnp.where(mask, weights, 0)}


def geometric_mean(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_low: Scalar = 0.4,
  clip_high: Scalar = 0.4,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Geometric mean of a sequence's ratios, each clipped before (GMPO).

      d_t = log ρ_t, stopped at ε_high where A_t > 0 and at −ε_low where A_t < 0
      ℓ_t = −A_t exp((1 / |y|) Σ_t d_t)

  One extreme token moves a geometric mean little, and clipping by token leaves
  the others their gradient, where `gspo` drops the response. Bounds are of the
  log-ratio, hence wide. It belongs with `sequence_mean`.

  Args:
    logprobs, old_logprobs, advantages, mask: see `postrain.losses.policy`.
    clip_low: ε_low > 0, of log ρ: the ratio is above exp(−ε_low).
    clip_high: ε_high > 0, of log ρ.
    max_log_ratio: limit of the mean of |d|, without gradient beyond; None for
      none.

  Returns:
    Values, and metrics with 'sequence_ratio', 'clip_low' and 'clip_high'.

  References:
    Zhao et al., 2025, Geometric-Mean Policy Optimization, arXiv:2507.20673.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  delta = importance.log_ratio(logprobs, old_logprobs, mask, max_log_ratio=None)
  advantages = jnp.where(mask, stop_gradient(advantages), 0)
  held, flags = bounded(delta, advantages, -clip_low, clip_high)
  ratios = importance.sequence_ratio(
    held, jnp.zeros_like(held), mask, max_log_ratio=max_log_ratio
  )[:, None]
  values = -ratios * advantages
  metrics = indicators(flags, mask, values)
  metrics['sequence_ratio'] = jnp.where(mask, stop_gradient(ratios), 0)
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)
