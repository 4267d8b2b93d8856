"""Surrogate losses of the policy gradient, per token.

All share the signature ``(logprobs, old_logprobs, advantages, mask, *, ...)``
and its meaning: ``logprobs`` of the current policy, the only way for the
gradient; ``old_logprobs`` of the policy that generated the data, re-scored by
the learner; ``advantages`` of each token (broadcast what belongs to a
sequence); ``mask`` on the tokens that the policy chose. Values and metrics are
0 off the mask. Metrics of all: 'ratio'; 'old_kl', the k3 estimate of
KL(π_old‖π); 'limit_hits' of ``max_log_ratio``.
"""

from jax import Array
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain import importance
from postrain.dtypes import Scalar, promoted
from postrain.losses.surrogate import (
  Losses,
  clipped,
  drift,
  indicators,
  weighted_logprobs,
)

__all__ = [
  'cispo',
  'gspo',
  'gspo_token',
  'ppo_clip',
  'reinforce',
  'sequence_clip',
]


def reinforce(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """The plain policy gradient.

      ℓ_t = −A_t log π(y_t)

  Right on policy only; the old policy enters the metrics, not the loss, so
  that 'ratio' shows when it is not.

  Args:
    logprobs, old_logprobs, advantages, mask: see the module.
    max_log_ratio: limit of |log ρ| in the metrics; None for none.

  Returns:
    Values and metrics.

  References:
    Williams, 1992, Simple Statistical Gradient-Following Algorithms for
    Connectionist Reinforcement Learning.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  values = weighted_logprobs(advantages, logprobs, mask)
  return values, drift(logprobs, old_logprobs, mask, max_log_ratio)


def ppo_clip(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_low: Scalar = 0.2,
  clip_high: Scalar = 0.2,
  dual_clip: Scalar | None = None,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """The clipped surrogate of PPO and GRPO.

      ℓ_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t)

  The gradient is 0 where A > 0 and ρ > 1 + ε_high, or A < 0 and
  ρ < 1 − ε_low, and alive in the other corners and on the bounds themselves.
  Unequal bounds are the clip-higher of DAPO. The dual clip also stops A < 0
  with ρ > c at −c A; one popular trainer has it on, at 3, by default. With
  c ≥ 1 + ε_high it is also the two-sided clip of INTELLECT-2, min(ρ, δ) in
  place of the first ρ, with δ = c.

  Args:
    logprobs, old_logprobs, advantages, mask: see the module.
    clip_low: ε_low, a positive offset; inf for no bound.
    clip_high: ε_high, a positive offset; inf for no bound.
    dual_clip: c > 1; None for none.
    max_log_ratio: limit of |log ρ|, without gradient beyond; None for none.

  Returns:
    Values, and metrics with 'clip_low', 'clip_high' and 'dual_clip' (if on),
    1 where the bound took the gradient.

  References:
    Schulman et al., 2017, Proximal Policy Optimization Algorithms,
    arXiv:1707.06347; Ye et al., 2019, Mastering Complex Control in MOBA
    Games with Deep Reinforcement Learning (dual clip), arXiv:1912.09729; Yu
    et al., 2025, DAPO (clip-higher), arXiv:2503.14476; Prime Intellect, 2025,
    INTELLECT-2 (two-sided clip), arXiv:2505.07291.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  ratios = importance.ratio(
    logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio
  )
  values, metrics = clipped(
    ratios, advantages, mask, clip_low, clip_high, dual_clip
  )
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def gspo(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_low: Scalar = 3e-4,
  clip_high: Scalar = 4e-4,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Clip the geometric mean of a sequence's ratios instead of each token's.

      s = exp((1 / |y|) Σ_t log ρ_t)
      ℓ_t = −min(s A_t, clip(s, 1 − ε_low, 1 + ε_high) A_t)

  A response is clipped as a whole, and every token of it has the same
  gradient. It belongs with `sequence_mean`; other weights change the
  algorithm, and two popular trainers do so by default.

  Args:
    logprobs, old_logprobs, advantages, mask: see the module.
    clip_low: ε_low, a positive offset, far below that of PPO.
    clip_high: ε_high, a positive offset.
    max_log_ratio: limit of |log s|, without gradient beyond; None for none.

  Returns:
    Values, and metrics with 'sequence_ratio', 'clip_low' and 'clip_high'.

  References:
    Zheng et al., 2025, Group Sequence Policy Optimization, arXiv:2507.18071.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  ratios = importance.sequence_ratio(
    logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio
  )
  ratios = jnp.broadcast_to(ratios[:, None], logprobs.shape)
  return _sequence_clipped(
    ratios,
    (logprobs, old_logprobs, advantages, mask),
    (clip_low, clip_high, max_log_ratio),
  )


def gspo_token(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_low: Scalar = 3e-4,
  clip_high: Scalar = 4e-4,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """GSPO whose gradient reaches each token by itself.

      s_t = sg(s) · π(y_t) / sg(π(y_t))
      ℓ_t = −min(s_t A_t, clip(s_t, 1 − ε_low, 1 + ε_high) A_t)

  The value is that of `gspo`; so is the gradient where advantages are equal
  along a sequence. It is the form to use where they are not.

  Args:
    logprobs, old_logprobs, advantages, mask: see the module.
    clip_low: ε_low, a positive offset, far below that of PPO.
    clip_high: ε_high, a positive offset.
    max_log_ratio: limit of |log s|, without gradient beyond; None for none.

  Returns:
    Values, and metrics with 'sequence_ratio', 'clip_low' and 'clip_high'.

  References:
    Zheng et al., 2025, Group Sequence Policy Optimization, arXiv:2507.18071.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  mean = importance.sequence_log_ratio(logprobs, old_logprobs, mask)
  own = logprobs - stop_gradient(logprobs)
  log_ratios = importance.log_ratio(
    stop_gradient(mean)[:, None] + own,
    jnp.zeros_like(own),
    mask,
    max_log_ratio=max_log_ratio,
  )
  return _sequence_clipped(
    jnp.exp(log_ratios),
    (logprobs, old_logprobs, advantages, mask),
    (clip_low, clip_high, max_log_ratio),
  )


def sequence_clip(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_low: Scalar = 0.2,
  clip_high: Scalar = 0.2,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Clip the probability ratio of the whole sequence, as RLOO trainers do.

      s = exp(Σ_t log ρ_t)
      ℓ_t = −min(s A_t, clip(s, 1 − ε_low, 1 + ε_high) A_t)

  An importance weight of the sequence, unlike that of `gspo`: the response is
  one action. Every token holds the value of its sequence, so that the mean
  over responses is `sequence_mean`. A product leaves the bounds the sooner the
  longer the response: a drift of 2e-4 per token clips at a thousand tokens.

  Args:
    logprobs, old_logprobs, advantages, mask: see the module.
    clip_low: ε_low, a positive offset.
    clip_high: ε_high, a positive offset.
    max_log_ratio: limit of |log s|, without gradient beyond; None for none.

  Returns:
    Values, and metrics with 'sequence_ratio', 'clip_low' and 'clip_high'.

  References:
    Ahmadian et al., 2024, Back to Basics (RLOO), arXiv:2402.14740.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  ratios = importance.product_ratio(
    logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio
  )
  ratios = jnp.broadcast_to(ratios[:, None], logprobs.shape)
  return _sequence_clipped(
    ratios,
    (logprobs, old_logprobs, advantages, mask),
    (clip_low, clip_high, max_log_ratio),
  )


def cispo(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_low: Scalar | None = None,
  clip_high: Scalar = 4.0,
  cap: Scalar | None = None,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Policy gradient with a bounded, constant importance weight.

      ℓ_t = −sg(clip(ρ_t, 1 − ε_low, 1 + ε_high)) A_t log π(y_t)

  No token loses its gradient. Bounds are offsets, as in the paper; some
  trainers mean an absolute cap by the same name, and an offset of 0.2 read as
  a cap shrinks every gradient five times. The paper sets no lower bound and
  does not print ε_high; the default is the cap of 5 that ScaleRL uses.

  Args:
    logprobs, old_logprobs, advantages, mask: see the module.
    clip_low: ε_low, a positive offset; None for no lower bound.
    clip_high: ε_high, a positive offset.
    cap: absolute upper bound c ≥ 1 that stands in place of 1 + ε_high; None for
      the offset.
    max_log_ratio: limit of |log ρ|; None for none.

  Returns:
    Values, and metrics with 'clip_low' and 'clip_high', 1 where the weight is
    at its bound.

  References:
    MiniMax, 2025, MiniMax-M1: Scaling Test-Time Compute Efficiently with
    Lightning Attention, arXiv:2506.13585; Khatri et al., 2025, The Art of
    Scaling Reinforcement Learning Compute for LLMs, arXiv:2510.13786.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  ratios = stop_gradient(
    importance.ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  )
  highest = 1 + clip_high if cap is None else cap
  flags = {'clip_high': ratios > highest}
  weights = jnp.minimum(ratios, highest)
  if clip_low is not None:
    flags['clip_low'] = ratios < 1 - clip_low
    weights = jnp.maximum(weights, 1 - clip_low)
  values = weighted_logprobs(weights * advantages, logprobs, mask)
  metrics = indicators(flags, mask, values)
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def _sequence_clipped(
  ratios: Array,
  inputs: tuple[Array, Array, Array, Array],
  bounds: tuple[Scalar, Scalar, Scalar | None],
) -> Losses:
  logprobs, old_logprobs, advantages, mask = inputs
  clip_low, clip_high, max_log_ratio = bounds
  values, metrics = clipped(ratios, advantages, mask, clip_low, clip_high, None)
  metrics['sequence_ratio'] = jnp.where(mask, stop_gradient(ratios), 0)
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)
