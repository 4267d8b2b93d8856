"""Ratios of probabilities: policy to old policy, learner to sampler.

The ratio to the behaviour policy splits by token into mismatch and staleness,

    π_θ / μ = (π_old / μ) · (π_θ / π_old),

where μ is what the sampler says it sampled from and π_old the learner's score
with the same weights. The losses bound the second factor; `truncated` and
`masked` give constant weights for the first, to multiply the policy term with
(not the KL, and not the denominator).

Arguments throughout: ``old_logprobs`` of the learner and ``sampler_logprobs``
of the sampler (filters and temperature applied) on the sampler's tokens;
``mask`` on the tokens that the policy chose, NaN elsewhere is harmless;
``max_log_ratio`` limits the absolute log-ratio (after sum or mean where a
sequence has one ratio), without gradient beyond, None for no limit.
"""

from typing import Literal

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.dtypes import Scalar, promoted

__all__ = [
  'decomposition',
  'effective_sample_size',
  'limit_hits',
  'log_ratio',
  'masked',
  'mismatch_metrics',
  'product_ratio',
  'ratio',
  'self_normalized',
  'sequence_log_ratio',
  'sequence_ratio',
  'truncated',
]

Level = Literal['token', 'sequence', 'geometric']


def log_ratio(
  logprobs: Float[Array, '*n'],
  old_logprobs: Float[Array, '*n'],
  mask: Bool[Array, '*n'] | None = None,
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, '*n']:
  """Logarithm of a probability ratio, limited, 0 off the mask.

      d = clip(log π(a) − log π_old(a), −m, m)

  The gradient reaches logprobs alone and is 0 beyond the limit (exp overflows
  float32 at 88, and one inf times a coefficient of 0 is NaN). Peers that
  limit use ±20 as here; others do not limit at all.

  Args:
    logprobs: of the current policy.
    old_logprobs: of the other policy, constants.
    mask, max_log_ratio: see the module; mask None for all.

  Returns:
    Log-ratios in [−m, m].
  """
  logprobs, old_logprobs = promoted(logprobs, old_logprobs)
  return _limited(_difference(logprobs, old_logprobs, mask), max_log_ratio)


def limit_hits(
  logprobs: Float[Array, '*n'],
  old_logprobs: Float[Array, '*n'],
  mask: Bool[Array, '*n'] | None = None,
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, '*n']:
  """Indicator of the log-ratios that the limit changed.

      1[|log π(a) − log π_old(a)| > m]

  A metric: its mean is the share of tokens without a gradient.

  Args:
    logprobs: of the current policy.
    old_logprobs: of the other policy.
    mask: where the values mean anything; 0 elsewhere.
    max_log_ratio: m > 0; with None nothing is ever hit.

  Returns:
    1 where the limit acted, else 0.
  """
  logprobs, old_logprobs = promoted(logprobs, old_logprobs)
  delta = jax.lax.stop_gradient(_difference(logprobs, old_logprobs, mask))
  if max_log_ratio is None:
    return jnp.zeros_like(delta)
  return (jnp.abs(delta) > max_log_ratio).astype(delta.dtype)


def ratio(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, 'B T']:
  """Probability ratio of each token, 1 off the mask.

      ρ_t = exp(clip(log π(y_t) − log π_old(y_t), −m, m))

  Args:
    logprobs: of the current policy; the gradient flows here.
    old_logprobs: of the policy that generated the tokens, constants.
    mask, max_log_ratio: see the module.

  Returns:
    Ratios ρ > 0.

  References:
    Schulman et al., 2017, Proximal Policy Optimization Algorithms,
    arXiv:1707.06347.
  """
  return jnp.exp(
    log_ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  )


def sequence_log_ratio(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, ' B']:
  """Mean log-ratio of a sequence's tokens, without limit.

      log s = (1 / |y|) Σ_t (log π(y_t) − log π_old(y_t))

  Args:
    logprobs: of the current policy; the gradient flows here.
    old_logprobs: of the policy that generated the tokens, constants.
    mask: see the module; an empty row gives 0.

  Returns:
    One log s for each sequence.
  """
  delta = log_ratio(logprobs, old_logprobs, mask, max_log_ratio=None)
  length = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(delta.dtype)
  return jnp.sum(delta, axis=1) / length


def sequence_ratio(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, ' B']:
  """Geometric mean of a sequence's token ratios.

      s = exp((1 / |y|) Σ_t (log π(y_t) − log π_old(y_t)))

  A statistic of distance, no importance weight: E_old[s f] ≠ E_π[f].

  Args:
    logprobs: of the current policy; the gradient flows here.
    old_logprobs: of the policy that generated the tokens, constants.
    mask, max_log_ratio: see the module; an empty row gives 1.

  Returns:
    One s > 0 for each sequence.

  References:
    Zheng et al., 2025, Group Sequence Policy Optimization, arXiv:2507.18071.
  """
  log_s = sequence_log_ratio(logprobs, old_logprobs, mask)
  return jnp.exp(_limited(log_s, max_log_ratio))


def product_ratio(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, ' B']:
  """Ratio of the probabilities of a whole sequence.

      w = exp(Σ_t (log π(y_t) − log π_old(y_t)))

  The importance weight: E_old[w f] = E_π[f]. With iid log-ratios of variance
  s² its variance is exp(T s²) − 1, that of `sequence_ratio` about s² / T.

  Args:
    logprobs: of the current policy; the gradient flows here.
    old_logprobs: of the policy that generated the tokens, constants.
    mask, max_log_ratio: see the module; an empty row gives 1.

  Returns:
    One w > 0 for each sequence.

  References:
    Precup et al., 2000, Eligibility Traces for Off-Policy Policy Evaluation.
  """
  delta = log_ratio(logprobs, old_logprobs, mask, max_log_ratio=None)
  return jnp.exp(_limited(jnp.sum(delta, axis=1), max_log_ratio))


def truncated(
  old_logprobs: Float[Array, 'B T'],
  sampler_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  cap: Scalar = 2.0,
  level: Level = 'token',
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, 'B T']:
  """Truncated importance weights of learner to sampler.

      w = min(π_old / μ, c)

  Args:
    old_logprobs, sampler_logprobs, mask, max_log_ratio: see the module.
    cap: upper bound c > 0; 2 is common, MiniRL uses 5.
    level: 'token'; 'sequence', the product over its tokens; 'geometric', its
      geometric mean. A product drops long sequences first.

  Returns:
    Constant weights in [0, c], 0 off the mask.

  Raises:
    ValueError: unknown level.

  References:
    Yao et al., 2025, Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training (blog); Espeholt et al., 2018, IMPALA,
    arXiv:1802.01561.
  """
  weights = _weights(old_logprobs, sampler_logprobs, mask, level, max_log_ratio)
  return jnp.where(mask, jnp.minimum(weights, cap), 0)


def masked(
  old_logprobs: Float[Array, 'B T'],
  sampler_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  low: Scalar = 0.5,
  high: Scalar = 5.0,
  level: Level = 'token',
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, 'B T']:
  """Importance weights of learner to sampler, 0 outside a band.

      w · 1[low ≤ w ≤ high],   w = π_old / μ

  The band holds the ratio itself (one popular implementation compares its
  inverse). The denominator of the aggregation does not change.

  Args:
    old_logprobs, sampler_logprobs, mask, max_log_ratio: see the module.
    low: lower bound, at least 0.
    high: upper bound, above low.
    level: 'token', 'sequence' or 'geometric', as for `truncated`.

  Returns:
    Constant weights in {0} ∪ [low, high], 0 off the mask.

  Raises:
    ValueError: unknown level.

  References:
    Ling Team, 2025, Every Step Evolves: Scaling Reinforcement Learning for
    Trillion-Scale Thinking Model (IcePop), arXiv:2510.18855.
  """
  weights = _weights(old_logprobs, sampler_logprobs, mask, level, max_log_ratio)
  inside = mask & (weights >= low) & (weights <= high)
  return jnp.where(inside, weights, 0)


def self_normalized(
  weights: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  level: Literal['token', 'sequence'] = 'token',
) -> Float[Array, 'B T']:
  """Importance weights divided by their mean.

      w / mean(w)

  A rollout whose weights are all small keeps its step size, at the price of a
  bias of order 1 / n.

  Args:
    weights: at least 0, of `truncated` or `masked`.
    mask: see the module.
    level: mean over 'token's, or over 'sequence's of the mean of each.

  Returns:
    Constant weights of mean 1, 0 off the mask; 0 where all are.

  Raises:
    ValueError: unknown level.

  References:
    Owen, 2013, Monte Carlo Theory, Methods and Examples (self-normalised
    importance sampling).
  """
  (weights,) = promoted(weights)
  weights = jnp.where(mask, jax.lax.stop_gradient(weights), 0)
  if level == 'token':
    mean = _mean(weights, mask)
  elif level == 'sequence':
    length = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(weights.dtype)
    mean = _mean(jnp.sum(weights, axis=1) / length, jnp.any(mask, axis=1))
  else:
    raise ValueError(f"level is {level!r}; choose 'token' or 'sequence'")
  return weights / jnp.where(mean > 0, mean, 1)


def effective_sample_size(
  weights: Float[Array, '*n'], mask: Bool[Array, '*n']
) -> Float[Array, '']:
  """Effective share of samples under importance weights.

      ESS / n = (Σ w)² / (n Σ w²)

  Args:
    weights: at least 0.
    mask: which of them count, n in number.

  Returns:
    A share in [0, 1]: 1 for equal weights, 0 where none counts.

  References:
    Kong, 1992, A Note on Importance Sampling using Standardized Weights.
  """
  (weights,) = promoted(weights)
  weights = jax.lax.stop_gradient(jnp.where(mask, weights, 0))
  squares = jnp.sum(mask).astype(weights.dtype) * jnp.sum(weights**2)
  total = jnp.sum(weights) ** 2
  return jnp.where(squares > 0, total / jnp.where(squares > 0, squares, 1), 0)


def mismatch_metrics(
  old_logprobs: Float[Array, 'B T'],
  sampler_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> dict[str, Float[Array, '']]:
  """Distance of learner and sampler on the sampler's own tokens.

      x = log π_old − log μ:  E[−x],  E[eˣ − 1 − x],  E[x eˣ − eˣ + 1],
      E[e²ˣ] − 1,  max |x|

  Means over the tokens of the mask, or over the sequences that have any; of a
  whole rollout, so that the maximum and the effective sample size need no
  merging.

  Args:
    old_logprobs, sampler_logprobs, mask, max_log_ratio: see the module.

  Returns:
    Scalars. Of tokens: 'kl' and 'k3' estimate KL(μ‖π_old), 'reverse_kl'
    KL(π_old‖μ), 'chi_squared' χ²(π_old‖μ), 'gap' and 'max_gap' of |x|,
    'effective_sample_size' of the ratios, 'limit_hits' the share of |x| above
    the limit. Of sequences: 'sequence_chi_squared',
    'sequence_effective_sample_size', 'perplexity' of the learner,
    'sampler_perplexity', and 'perplexity_ratio', the mean of their quotients.
  """
  args = (old_logprobs, sampler_logprobs, mask)
  raw = jax.lax.stop_gradient(log_ratio(*args, max_log_ratio=None))
  limited = _limited(raw, max_log_ratio)
  ratios = jnp.exp(limited)
  hits = limit_hits(*args, max_log_ratio=max_log_ratio)
  return {
    'kl': _mean(-raw, mask),
    'k3': _mean(jnp.expm1(limited) - limited, mask),
    'reverse_kl': _mean(ratios * limited - jnp.expm1(limited), mask),
    'chi_squared': _mean(jnp.square(ratios) - 1, mask),
    'gap': _mean(jnp.abs(raw), mask),
    'max_gap': jnp.max(jnp.abs(raw), initial=0),
    'effective_sample_size': effective_sample_size(ratios, mask),
    'limit_hits': _mean(hits, mask),
  } | _sequence_metrics(*args, max_log_ratio)


def decomposition(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  sampler_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> dict[str, Float[Array, '']]:
  """How much of the distance to the sampler is mismatch and how much staleness.

      log μ − log π  =  (log μ − log π_old)  +  (log π_old − log π)
          total      =        mismatch       +       staleness

  On the sampler's tokens the mean of total estimates KL(μ‖π). Mismatch is that
  of two engines at equal weights, staleness that of the updates since; only
  the second is bounded by a clip.

  Args:
    logprobs: of the current policy.
    old_logprobs, sampler_logprobs, mask, max_log_ratio: see the module.

  Returns:
    Scalars, of each part: its mean over the tokens of the mask ('mismatch',
    'staleness', 'total'; they add up), and the effective sample size of its
    ratios ('mismatch_sample_size', ...).

  References:
    Zheng et al., 2025, Stabilizing Reinforcement Learning with LLMs:
    Formulation and Practices, arXiv:2512.01374.
  """
  parts = {
    'mismatch': (old_logprobs, sampler_logprobs),
    'staleness': (logprobs, old_logprobs),
    'total': (logprobs, sampler_logprobs),
  }
  found = {}
  for name, pair in parts.items():
    raw = jax.lax.stop_gradient(log_ratio(*pair, mask, max_log_ratio=None))
    ratios = jnp.exp(_limited(raw, max_log_ratio))
    found[name] = _mean(-raw, mask)
    found[f'{name}_sample_size'] = effective_sample_size(ratios, mask)
  return found


def _sequence_metrics(
  old_logprobs: Array,
  sampler_logprobs: Array,
  mask: Array,
  limit: Scalar | None,
) -> dict[str, Array]:
  args = (jax.lax.stop_gradient(old_logprobs), sampler_logprobs, mask)
  some = jnp.any(mask, axis=1)
  products = product_ratio(*args, max_log_ratio=limit)

  def perplexity(logprobs: Array, other: Array) -> Array:
    pair = (jax.lax.stop_gradient(logprobs), other, mask)
    return _mean(1 / sequence_ratio(*pair, max_log_ratio=limit), some)

  certain = jnp.zeros_like(old_logprobs)
  return {
    'sequence_chi_squared': _mean(jnp.square(products) - 1, some),
    'sequence_effective_sample_size': effective_sample_size(products, some),
    'perplexity': perplexity(old_logprobs, certain),
    'sampler_perplexity': perplexity(sampler_logprobs, certain),
    'perplexity_ratio': perplexity(old_logprobs, sampler_logprobs),
  }


def _mean(x: Array, where: Array) -> Array:
  count = jnp.maximum(jnp.sum(where), 1).astype(x.dtype)
  return jnp.sum(jnp.where(where, x, 0)) / count


def _difference(logprobs: Array, old: Array, mask: Array | None) -> Array:
  delta = logprobs - jax.lax.stop_gradient(old)
  return delta if mask is None else jnp.where(mask, delta, 0)


def _limited(delta: Array, limit: Scalar | None) -> Array:
  # A select: the gradient of clip is a half where value and limit are equal.
  if limit is None:
    return delta
  return jnp.where(jnp.abs(delta) > limit, jnp.sign(delta) * limit, delta)


def _weights(
  old_logprobs: Array,
  sampler_logprobs: Array,
  mask: Array,
  level: Level,
  limit: Scalar | None,
) -> Array:
  args = (jax.lax.stop_gradient(old_logprobs), sampler_logprobs, mask)
  delta = log_ratio(*args, max_log_ratio=None)
  if level == 'token':
    return jnp.exp(_limited(delta, limit))
  if level == 'sequence':
    weights = product_ratio(*args, max_log_ratio=limit)
  elif level == 'geometric':
    weights = sequence_ratio(*args, max_log_ratio=limit)
  else:
    raise ValueError(
      f"level is {level!r}; choose 'token', 'sequence' or 'geometric'"
    )
  return jnp.broadcast_to(weights[:, None], delta.shape)
