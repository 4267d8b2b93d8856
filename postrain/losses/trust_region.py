"""Losses that keep the policy near the old one by other means than PPO's clip.

A mask decoupled from the weight (`minirl`), a mask by the divergence of each
token (`dppo`), a penalty on chosen tokens (`kl_cov`), a squared log-ratio of
tokens (`dro`) or of sequences (`mirror_descent`). Arguments, values and the
metrics of all are those of `postrain.losses.policy`.
"""

from typing import Literal

from jax import Array
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain import importance, kl
from postrain.dtypes import Scalar, promoted
from postrain.losses.surrogate import (
  Losses,
  bounded,
  drift,
  indicators,
  weighted_logprobs,
)

__all__ = ['dppo', 'dro', 'kl_cov', 'minirl', 'mirror_descent']


def minirl(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  sampler_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_low: Scalar = 0.2,
  clip_high: Scalar = 0.27,
  cap: Scalar = 5.0,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Policy gradient weighed against the sampler, masked against the old policy.

      ℓ_t = −M_t sg(min(π / μ, c)) A_t log π(y_t)
      M_t = 0 where A_t > 0 ∧ ρ_t > 1 + ε_high or A_t < 0 ∧ ρ_t < 1 − ε_low

  The weight corrects mismatch and staleness together, with μ of the sampler;
  the mask bounds staleness alone, with ρ = π / π_old of the learner. M is 0
  where the gradient of `ppo_clip` is. The paper has it with `sequence_sum` and
  `group_centered`.

  Args:
    logprobs, old_logprobs, advantages, mask: see `postrain.losses.policy`.
    sampler_logprobs: log μ as reported by the sampler.
    clip_low: ε_low, a positive offset.
    clip_high: ε_high, a positive offset.
    cap: c, upper bound of the weight; inf for none.
    max_log_ratio: limit of |log ρ| and |log π / μ|; None for none.

  Returns:
    Values, and metrics with 'clip_low' and 'clip_high', 1 where the mask took
    the gradient, and 'weight'.

  References:
    Zheng et al., 2025, Stabilizing Reinforcement Learning with LLMs:
    Formulation and Practices, arXiv:2512.01374.
  """
  logprobs, old_logprobs, sampler_logprobs, advantages = promoted(
    logprobs, old_logprobs, sampler_logprobs, advantages
  )
  advantages = jnp.where(mask, stop_gradient(advantages), 0)
  fixed = stop_gradient(logprobs)
  ratios = importance.ratio(
    fixed, old_logprobs, mask, max_log_ratio=max_log_ratio
  )
  _, flags = bounded(ratios, advantages, 1 - clip_low, 1 + clip_high)
  kept = mask & ~flags['clip_low'] & ~flags['clip_high']
  weights = importance.truncated(
    fixed, sampler_logprobs, mask, cap=cap, max_log_ratio=max_log_ratio
  )
  values = weighted_logprobs(weights * advantages, logprobs, kept)
  metrics = indicators(flags, mask, values) | {'weight': weights}
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def dppo(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  divergence: Literal['tv', 'kl'] = 'tv',
  clip_low: Scalar = 0.15,
  clip_high: Scalar = 0.2,
  cap: Scalar = 20.0,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Policy gradient that stops where a token's distribution has moved too far.

      ℓ_t = −M_t sg(min(ρ_t, c)) A_t log π(y_t)
      M_t = 0 where A_t > 0 ∧ p > q ∧ D > ε_high or A_t < 0 ∧ p < q ∧ D > ε_low
      D = |p − q|   or   q log(q / p) + (1 − q) log((1 − q) / (1 − p))

  p = π(y_t) and q = π_old(y_t): D is the divergence of the two-point
  distributions "this token or another". A ratio of 2 is nothing at q = 0.001
  and much at q = 0.4; PPO's clip treats both alike.

  Args:
    logprobs, old_logprobs, advantages, mask: see `postrain.losses.policy`.
    divergence: 'tv', total variation, or 'kl', KL(old‖new), which wants smaller
      bounds (0.05 is common).
    clip_low: ε_low, a divergence and no offset of the ratio.
    clip_high: ε_high, likewise.
    cap: c, upper bound of the weight; inf for none.
    max_log_ratio: limit of |log ρ|; None for none.

  Returns:
    Values, and metrics with 'clip_low' and 'clip_high', 1 where the mask took
    the gradient, and 'divergence'.

  Raises:
    ValueError: unknown divergence.

  References:
    Qi et al., 2026, Rethinking the Trust Region in LLM Reinforcement Learning,
    arXiv:2602.04879.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  advantages = jnp.where(mask, stop_gradient(advantages), 0)
  log_p = jnp.where(mask, stop_gradient(logprobs), 0)
  log_q = jnp.where(mask, stop_gradient(old_logprobs), 0)
  distance = _binary_divergence(log_p, log_q, divergence)
  signed = jnp.where(log_p > log_q, distance, -distance)
  _, flags = bounded(signed, advantages, -clip_low, clip_high)
  kept = mask & ~flags['clip_low'] & ~flags['clip_high']
  ratios = importance.ratio(log_p, log_q, mask, max_log_ratio=max_log_ratio)
  weights = jnp.minimum(ratios, cap) * advantages
  values = weighted_logprobs(weights, logprobs, kept)
  metrics = indicators(flags, mask, values) | {'divergence': distance}
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def kl_cov(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  selected: Bool[Array, 'B T'],
  *,
  kl_coef: Scalar = 1.0,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Policy gradient with a penalty on the tokens that cost the most entropy.

      ℓ_t = −ρ_t A_t + β |log ρ_t| · 1[t selected]

  Nothing is clipped. The penalty has value and gradient 0 on policy: it acts
  from the second update on.

  Args:
    logprobs, old_logprobs, advantages, mask: see `postrain.losses.policy`.
    selected: tokens under the penalty, by `postrain.masks.top_covariance`.
    kl_coef: β; one popular trainer ships 0.1.
    max_log_ratio: limit of |log ρ|, without gradient beyond; None for none.

  Returns:
    Values, and metrics with 'penalty', |log ρ| where selected, and 'selected'.

  References:
    Cui et al., 2025, The Entropy Mechanism of Reinforcement Learning for
    Reasoning Language Models, arXiv:2505.22617.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  args = (logprobs, old_logprobs, mask)
  advantages = jnp.where(mask, stop_gradient(advantages), 0)
  distance = kl.absolute(*args, max_log_ratio=max_log_ratio)
  penalty = jnp.where(selected, distance, 0)
  ratios = importance.ratio(*args, max_log_ratio=max_log_ratio)
  values = kl_coef * penalty - ratios * advantages
  metrics = indicators({'selected': selected}, mask, values)
  metrics['penalty'] = stop_gradient(penalty)
  return values, metrics | drift(*args, max_log_ratio)


def dro(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  kl_coef: Scalar,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Policy gradient with half a squared log-ratio on each token.

      ℓ_t = −A_t log π(y_t) + (τ / 2) (log π(y_t) − log π_old(y_t))²

  The token form that popular trainers have; for whole responses, as in the
  paper, see `mirror_descent`.

  Args:
    logprobs, old_logprobs, advantages, mask: see `postrain.losses.policy`.
    kl_coef: τ ≥ 0.
    max_log_ratio: limit of |log ρ| in the metrics; None for none. The square
      has no limit: far from the old policy its gradient is what leads back.

  Returns:
    Values and metrics.

  References:
    Richemond et al., 2024, Offline Regularised Reinforcement Learning for Large
    Language Models Alignment, arXiv:2405.19107.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  delta = importance.log_ratio(logprobs, old_logprobs, mask, max_log_ratio=None)
  values = weighted_logprobs(advantages, logprobs, mask)
  values = values + kl_coef * jnp.square(delta) / 2
  return values, drift(logprobs, old_logprobs, mask, max_log_ratio)


def mirror_descent(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  kl_coef: Scalar,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """One step of policy mirror descent: regress log-ratios on rewards.

      Δ = Σ_t (log π(y_t) − log π_old(y_t))
      ℓ_t = −A_t Δ + (τ / 2) Δ²  =  (A_t − τ Δ)² / (2 τ) − A_t² / (2 τ)

  With A = r − τ log E_old[exp(r / τ)] the minimiser is π ∝ π_old exp(r / τ);
  the paper puts the mean reward of the group in its place, the limit of a large
  τ. Written without the constant, the loss stays finite at τ = 0. Responses of
  older policies need no weight. Every token holds the value of its sequence, so
  that the mean over responses is `sequence_mean`.

  Args:
    logprobs, old_logprobs, advantages, mask: see `postrain.losses.policy`; the
      old policy is that of the iteration's start.
    kl_coef: τ ≥ 0, not published.
    max_log_ratio: limit of |log ρ| in the metrics; None for none. The square
      has no limit: far from the old policy its gradient is what leads back.

  Returns:
    Values, and metrics with 'sequence_log_ratio', Δ.

  References:
    Kimi Team, 2025, Kimi k1.5: Scaling Reinforcement Learning with LLMs,
    arXiv:2501.12599.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  delta = importance.log_ratio(logprobs, old_logprobs, mask, max_log_ratio=None)
  delta = jnp.where(mask, jnp.sum(delta, axis=1, keepdims=True), 0)
  advantages = jnp.where(mask, stop_gradient(advantages), 0)
  values = kl_coef * jnp.square(delta) / 2 - advantages * delta
  metrics = {'sequence_log_ratio': stop_gradient(delta)}
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def _binary_divergence(log_p: Array, log_q: Array, divergence: str) -> Array:
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  if divergence == 'tv':
    return jnp.abs(p - q)
  if divergence != 'kl':
    raise ValueError(f"divergence is {divergence!r}; choose 'tv' or 'kl'")
  # expm1 keeps the digits of 1 − p; p = 1 is infinitely far from q < 1.
  rest_p, rest_q = -jnp.expm1(log_p), -jnp.expm1(log_q)
  certain = rest_q <= 0
  rest = jnp.log(jnp.where(certain, 1, rest_q)) - jnp.log(rest_p)
  return q * (log_q - log_p) + jnp.where(certain, 0, rest_q * rest)
