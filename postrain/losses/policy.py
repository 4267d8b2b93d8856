"""Surrogate losses of the policy gradient, per token.

All share the signature ``(logprobs, old_logprobs, advantages, mask, *, ...)``
and its meaning: ``logprobs`` of the current policy, the only way for the
gradient; ``old_logprobs`` of the policy that generated the data, re-scored by
the learner; ``advantages`` of each token (broadcast what belongs to a
sequence); ``mask`` on the tokens that the policy chose. Values and metrics are
0 off the mask. Metrics of all: 'ratio'; 'old_kl', the k3 estimate of
KL(π_old‖π); 'limit_hits' of ``max_log_ratio``.
"""

import jax
from jax import Array
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain import importance
from postrain.dtypes import Scalar, promoted

__all__ = ['cispo', 'gspo', 'gspo_token', 'ppo_clip', 'reinforce']

Losses = tuple[Float[Array, 'B T'], dict[str, Float[Array, 'B T']]]


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
  values = _weighted_logprobs(advantages, logprobs, mask)
  return values, _drift(logprobs, old_logprobs, mask, max_log_ratio)


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
  with ρ > c at −c A; one popular trainer has it on, at 3, by default.

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
    et al., 2025, DAPO (clip-higher), arXiv:2503.14476.
  """
  logprobs, old_logprobs, advantages = promoted(
    logprobs, old_logprobs, advantages
  )
  ratios = importance.ratio(
    logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio
  )
  values, metrics = _clipped(
    ratios, advantages, mask, clip_low, clip_high, dual_clip
  )
  return values, metrics | _drift(logprobs, old_logprobs, mask, max_log_ratio)


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


def cispo(
  logprobs: Float[Array, 'B T'],
  old_logprobs: Float[Array, 'B T'],
  advantages: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_low: Scalar | None = None,
  clip_high: Scalar = 4.0,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Policy gradient with a bounded, constant importance weight.

      ℓ_t = −sg(clip(ρ_t, 1 − ε_low, 1 + ε_high)) A_t log π(y_t)

  No token loses its gradient. Bounds are offsets: the absolute cap c of some
  trainers is clip_high = c − 1, and a cap below 1 would shrink every gradient.
  The paper sets no lower bound and does not print ε_high; the default is the
  cap of 5 that ScaleRL uses.

  Args:
    logprobs, old_logprobs, advantages, mask: see the module.
    clip_low: ε_low, a positive offset; None for no lower bound.
    clip_high: ε_high, a positive offset.
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
  clipped = {'clip_high': ratios > 1 + clip_high}
  weights = jnp.minimum(ratios, 1 + clip_high)
  if clip_low is not None:
    clipped['clip_low'] = ratios < 1 - clip_low
    weights = jnp.maximum(weights, 1 - clip_low)
  values = _weighted_logprobs(weights * advantages, logprobs, mask)
  metrics = _indicators(clipped, mask, values)
  return values, metrics | _drift(logprobs, old_logprobs, mask, max_log_ratio)


def _weighted_logprobs(weights: Array, logprobs: Array, mask: Array) -> Array:
  weights = jnp.where(mask, stop_gradient(weights), 0)
  return -weights * jnp.where(mask, logprobs, 0)


def _clipped(
  ratios: Array,
  advantages: Array,
  mask: Array,
  clip_low: Scalar,
  clip_high: Scalar,
  dual_clip: Scalar | None,
) -> Losses:
  # Selected, not min and clip: these halve the gradient at a tie.
  advantages = jnp.where(mask, stop_gradient(advantages), 0)
  clipped = {
    'clip_low': (advantages < 0) & (ratios < 1 - clip_low),
    'clip_high': (advantages > 0) & (ratios > 1 + clip_high),
  }
  bounded = jnp.where(clipped['clip_low'], 1 - clip_low, ratios)
  bounded = jnp.where(clipped['clip_high'], 1 + clip_high, bounded)
  if dual_clip is not None:
    clipped['dual_clip'] = (advantages < 0) & (ratios > dual_clip)
    bounded = jnp.where(clipped['dual_clip'], dual_clip, bounded)
  values = jnp.where(mask, -bounded * advantages, 0)
  return values, _indicators(clipped, mask, values)


def _sequence_clipped(
  ratios: Array,
  inputs: tuple[Array, Array, Array, Array],
  bounds: tuple[Scalar, Scalar, Scalar | None],
) -> Losses:
  logprobs, old_logprobs, advantages, mask = inputs
  clip_low, clip_high, max_log_ratio = bounds
  values, metrics = _clipped(
    ratios, advantages, mask, clip_low, clip_high, None
  )
  metrics['sequence_ratio'] = jnp.where(mask, stop_gradient(ratios), 0)
  return values, metrics | _drift(logprobs, old_logprobs, mask, max_log_ratio)


def _indicators(
  flags: dict[str, Array], mask: Array, like: Array
) -> dict[str, Array]:
  return {k: (v & mask).astype(like.dtype) for k, v in flags.items()}


def _drift(
  logprobs: Array, old_logprobs: Array, mask: Array, limit: Scalar | None
) -> dict[str, Array]:
  args = (stop_gradient(logprobs), old_logprobs, mask)
  d = importance.log_ratio(*args, max_log_ratio=limit)
  metrics = {
    'ratio': jnp.where(mask, jnp.exp(d), 0),
    'old_kl': jnp.expm1(d) - d,
    'limit_hits': importance.limit_hits(*args, max_log_ratio=limit),
  }
  return jax.tree.map(stop_gradient, metrics)
