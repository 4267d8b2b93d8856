"""Estimators of KL(π‖π_ref) from sampled tokens, and the exact one.

With d = log π(y_t) − log π_ref(y_t) and y_t drawn from π, at a fixed state:

    estimator            value    E[value]      E[gradient] as a loss
    k1                   d        KL(π‖ref)     0
    k2                   d²/2     (2nd order)   ∇KL(π‖ref)
    k3                   e⁻ᵈ−1+d  KL(π‖ref)     ∇KL(ref‖π), the other direction
    ρ·k3, ρ = π/π_old             KL(π‖ref)     ∇KL(π‖ref)

In the reward (`postrain.shaping`), k1 has the exact gradient for whole
sequences; as a loss k2 (or a value with the gradient of k2) has it for each
state, and misses what a token does to later states. Exact too are k2 of the
sequence's sums as a loss, and k3 in the reward and in the loss. An unbiased
value says nothing about the gradient.

The coefficient is a constant, or the state of a controller: a pure function
from a coefficient and a measured divergence to the next coefficient.

The estimators are elementwise over any shape; the optional mask silences NaN.
The share of log-ratios at the limit is `postrain.importance.limit_hits`.
"""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.dtypes import Scalar, promoted
from postrain.importance import log_ratio

__all__ = [
  'absolute',
  'adaptive_coef',
  'exact',
  'fixed_coef',
  'importance_weighted',
  'k1',
  'k2',
  'k3',
  'straight_through',
]


def k1(
  logprobs: Float[Array, '*n'],
  ref_logprobs: Float[Array, '*n'],
  mask: Bool[Array, '*n'] | None = None,
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, '*n']:
  """The log-ratio itself: unbiased, may be negative.

      k1 = d = log π − log π_ref

  For the reward. As a loss its expected gradient is 0: pure noise.

  Args:
    logprobs: of the policy; the gradient flows here.
    ref_logprobs: of the reference, constants.
    mask: where the values mean anything; 0 elsewhere.
    max_log_ratio: limit of |d|, without gradient beyond; None for none.

  Returns:
    Estimates in nats.

  References:
    Schulman, 2020, Approximating KL Divergence (blog).
  """
  return log_ratio(logprobs, ref_logprobs, mask, max_log_ratio=max_log_ratio)


def k2(
  logprobs: Float[Array, '*n'],
  ref_logprobs: Float[Array, '*n'],
  mask: Bool[Array, '*n'] | None = None,
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, '*n']:
  """Half the squared log-ratio: biased value, right gradient as a loss.

      k2 = d² / 2

  Args:
    logprobs: of the policy; the gradient flows here.
    ref_logprobs: of the reference, constants.
    mask: where the values mean anything; 0 elsewhere.
    max_log_ratio: limit of |d|, without gradient beyond; None for none.

  Returns:
    Estimates in nats, at least 0.

  References:
    Schulman, 2020, Approximating KL Divergence (blog).
  """
  d = log_ratio(logprobs, ref_logprobs, mask, max_log_ratio=max_log_ratio)
  return jnp.square(d) / 2


def k3(
  logprobs: Float[Array, '*n'],
  ref_logprobs: Float[Array, '*n'],
  mask: Bool[Array, '*n'] | None = None,
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, '*n']:
  """The non-negative unbiased estimator of GRPO.

      k3 = e⁻ᵈ − 1 + d

  Low variance only near the reference. As a loss its expected gradient is
  that of KL(π_ref‖π). Some implementations also clamp the value to ±10, and
  so lose the gradient where d < −2.5; here only d is limited.

  Args:
    logprobs: of the policy; the gradient flows here.
    ref_logprobs: of the reference, constants.
    mask: where the values mean anything; 0 elsewhere.
    max_log_ratio: limit of |d|, without gradient beyond; None for none.

  Returns:
    Estimates in nats, at least 0.

  References:
    Schulman, 2020, Approximating KL Divergence (blog); Shao et al., 2024,
    DeepSeekMath, arXiv:2402.03300.
  """
  d = log_ratio(logprobs, ref_logprobs, mask, max_log_ratio=max_log_ratio)
  return jnp.expm1(-d) + d


def absolute(
  logprobs: Float[Array, '*n'],
  ref_logprobs: Float[Array, '*n'],
  mask: Bool[Array, '*n'] | None = None,
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, '*n']:
  """The absolute log-ratio, with subgradient 0 at 0.

      |d|

  A penalty, no estimator. `jax.grad(jnp.abs)(0.)` is 1: at the first step,
  where policy and reference agree, that would push every token down.

  Args:
    logprobs: of the policy; the gradient flows here.
    ref_logprobs: of the reference, constants.
    mask: where the values mean anything; 0 elsewhere.
    max_log_ratio: limit of |d|, without gradient beyond; None for none.

  Returns:
    Penalties, at least 0.

  References:
    Cui et al., 2025, The Entropy Mechanism of Reinforcement Learning for
    Reasoning Language Models, arXiv:2505.22617 (the penalty of KL-Cov).
  """
  d = log_ratio(logprobs, ref_logprobs, mask, max_log_ratio=max_log_ratio)
  return d * jnp.sign(d)


def exact(
  logits: Float[Array, '*n V'], ref_logits: Float[Array, '*n V']
) -> Float[Array, '*n']:
  """KL divergence of whole next-token distributions, without variance.

      KL(π‖π_ref) = Σ_v π_v (log π_v − log π_ref,v)

  Exact for the state; the effect of a token on later states is not in it.
  Candidates that the policy excludes (logit −inf) add 0.

  Args:
    logits: of the policy; the gradient flows here.
    ref_logits: of the reference, constants.

  Returns:
    Divergences in nats, at least 0.

  References:
    Kullback and Leibler, 1951, On Information and Sufficiency.
  """
  logits, ref_logits = promoted(logits, ref_logits)
  logp = jax.nn.log_softmax(logits)
  ref_logp = jax.lax.stop_gradient(jax.nn.log_softmax(ref_logits))
  excluded = jnp.isneginf(logits)
  delta = jnp.where(excluded, 0, logp) - jnp.where(excluded, 0, ref_logp)
  return jnp.sum(jnp.exp(logp) * delta, axis=-1)


def straight_through(
  value: Float[Array, '*n'], gradient: Float[Array, '*n']
) -> Float[Array, '*n']:
  """The value of one estimator with the gradient of another.

      g − sg(g) + sg(v)

  `straight_through(k3(...), k2(...))` reports an unbiased value and trains
  with the right gradient; it is what some trainers call k3+.

  Args:
    value: what is reported.
    gradient: what is differentiated; it must be finite.

  Returns:
    Numbers equal to value.

  References:
    Bengio et al., 2013, Estimating or Propagating Gradients Through
    Stochastic Neurons for Conditional Computation, arXiv:1308.3432.
  """
  value, gradient = promoted(value, gradient)
  zero = gradient - jax.lax.stop_gradient(gradient)
  return zero + jax.lax.stop_gradient(value)


def importance_weighted(
  estimate: Float[Array, '*n'],
  logprobs: Float[Array, '*n'],
  old_logprobs: Float[Array, '*n'],
  mask: Bool[Array, '*n'] | None = None,
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, '*n']:
  """An estimate times the ratio to the policy that sampled.

      ρ · k,   ρ = π / π_old

  The gradient flows through both factors. With k3 that turns the gradient to
  the right direction, ∇(ρ k3) = ρ · k1 · ∇log π, on policy too; with ρ stopped
  the correction would be lost. Not meant for k2.

  Args:
    estimate: k1 or k3 of the same tokens, 0 off the mask.
    logprobs: of the policy; the gradient flows here.
    old_logprobs: of the policy that sampled, constants.
    mask: where the values mean anything; ρ is 1 elsewhere.
    max_log_ratio: limit of |log ρ|, without gradient beyond; None for none.

  Returns:
    Weighted estimates.

  References:
    DeepSeek-AI, 2025, DeepSeek-V3.2: Pushing the Frontier of Open Large
    Language Models, arXiv:2512.02556.
  """
  estimate, logprobs = promoted(estimate, logprobs)
  d = log_ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  return jnp.exp(d) * estimate


def fixed_coef(
  coef: Float[Array, '*n'], divergence: Float[Array, '*n']
) -> Float[Array, '*n']:
  """The coefficient as it was: the controller that does nothing.

      β' = β

  Args:
    coef: β of the last step.
    divergence: measured on its rollout, not used.

  Returns:
    Coefficient of the next step, a constant.
  """
  coef, _ = promoted(coef, divergence)
  return jax.lax.stop_gradient(coef)


def adaptive_coef(
  coef: Float[Array, '*n'],
  divergence: Float[Array, '*n'],
  *,
  num_sequences: Scalar,
  target: Scalar = 6.0,
  horizon: Scalar = 10_000.0,
  max_error: Scalar = 0.2,
) -> Float[Array, '*n']:
  """Move the coefficient so that the divergence comes to its target.

      e = clip(KL / target − 1, −m, m),   β' = β (1 + e · n / horizon)

  The target is meant for whole sequences, sums over their tokens. One peer
  feeds the mean over tokens and so has a target of 0.1. An estimate below 0 is
  only a large negative error.

  Args:
    coef: β of the last step.
    divergence: KL in nats, mean over the sequences of its rollout.
    num_sequences: n, how many sequences that were.
    target: KL > 0 to hold.
    horizon: sequences that an error of 1 takes to double β.
    max_error: m > 0; with m n < horizon β keeps its sign.

  Returns:
    Coefficient of the next step, a constant.

  Raises:
    ValueError: one step could make the coefficient 0 or negative.

  References:
    Ziegler et al., 2019, Fine-Tuning Language Models from Human
    Preferences, arXiv:1909.08593.
  """
  given = (max_error, num_sequences, horizon)
  numbers = all(isinstance(x, int | float) for x in given)
  if numbers and max_error * num_sequences >= horizon:
    raise ValueError(
      f'max_error={max_error} times num_sequences={num_sequences} is not below'
      f' horizon={horizon}: the coefficient could change its sign; take a'
      ' longer horizon'
    )
  coef, divergence = promoted(coef, divergence)
  error = jnp.clip(divergence / target - 1, -max_error, max_error)
  return jax.lax.stop_gradient(coef * (1 + error * num_sequences / horizon))
