"""Losses of preferences, per pair: functions of the margin to a reference.

``chosen`` and ``rejected`` are sums of the completion's token log-probs under
the policy, ``ref_chosen`` and ``ref_rejected`` under the frozen reference: the
gradient flows through the first two, the others are constants. With

    h = β [(log π_w − log ref_w) − (log π_l − log ref_l)]

the losses differ in the function of h. Metrics of all: 'chosen_reward' and
'rejected_reward' (β times the log-ratio), their 'margin', 'accuracy' (1 where
it is above 0), 'chosen_logprob' (these losses often lower both). Another
divergence than the reverse KL composes with every loss here: pass the
`implicit_reward` of both sides with β = 1, and zeros for the reference.
"""

import math
from typing import Literal

from jax import Array
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, sigmoid
import jax.numpy as jnp
from jaxtyping import Float, Int

from postrain.dtypes import Scalar, promoted
from postrain.importance import log_ratio
from postrain.losses.pieces import (
  implicit_rewards,
  pair_figures,
  per_token,
  smoothed,
)

__all__ = [
  'aot',
  'discopop',
  'dpo',
  'exo_pair',
  'f_dpo',
  'hinge',
  'implicit_reward',
  'ipo',
  'length_normalized_dpo',
  'length_normalized_ipo',
  'robust_dpo',
]

Losses = tuple[Float[Array, ' N'], dict[str, Float[Array, ' N']]]
Divergence = Literal[
  'reverse_kl', 'forward_kl', 'jensen_shannon', 'alpha_divergence'
]


def implicit_reward(
  logprobs: Float[Array, ' N'],
  ref_logprobs: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  divergence: Divergence = 'reverse_kl',
  alpha: Scalar = 0.5,
  max_log_ratio: Scalar | None = 20.0,
) -> Float[Array, ' N']:
  """The reward for which a policy is optimal, up to a term of the prompt.

      r = β f′(e^u),   u = log π − log ref

      reverse_kl        u
      forward_kl        1 − e⁻ᵘ
      jensen_shannon    log 2 + log σ(u)
      alpha_divergence  (e^{(α−1)u} − 1) / (α − 1)

  α = 0 is the forward KL, and α → 1 the reverse.

  Args:
    logprobs: of sequences under the policy; the gradient flows here.
    ref_logprobs: under the reference, constants.
    beta: β > 0, the coefficient of the divergence.
    divergence: D_f(π‖ref) that holds the policy to the reference.
    alpha: α ≠ 1 of the alpha divergence.
    max_log_ratio: limit of |u| where it is exponentiated, without gradient
      beyond; None for none.

  Returns:
    Rewards, 0 where policy and reference agree.

  Raises:
    ValueError: unknown divergence.

  References:
    Wang et al., 2023, Beyond Reverse KL: Generalizing Direct Preference
    Optimization with Diverse Divergence Constraints, arXiv:2309.16240.
  """
  bounded = divergence in ('forward_kl', 'alpha_divergence')
  limit = max_log_ratio if bounded else None
  u = log_ratio(logprobs, ref_logprobs, max_log_ratio=limit)
  if divergence == 'reverse_kl':
    return beta * u
  if divergence == 'forward_kl':
    return -beta * jnp.expm1(-u)
  if divergence == 'jensen_shannon':
    return beta * (math.log(2) + log_sigmoid(u))
  if divergence == 'alpha_divergence':
    return beta * jnp.expm1((alpha - 1) * u) / (alpha - 1)
  raise ValueError(
    f"divergence is {divergence!r}; choose 'reverse_kl', 'forward_kl',"
    " 'jensen_shannon' or 'alpha_divergence'"
  )


def dpo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  label_smoothing: Scalar = 0.0,
) -> Losses:
  """Direct preference optimisation.

      ℓ = −(1 − ε) log σ(h) − ε log σ(−h)

  ε is the probability that a label is flipped (conservative DPO). One popular
  trainer accepts ε for this loss and ignores it. Pairs sampled from the policy
  make it online DPO. With demonstrations as the chosen, samples of the last
  round's policy as the rejected, and that policy as the reference it is SPIN,
  whose gradient vanishes in expectation once the samples are like the
  demonstrations.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.
    label_smoothing: ε in [0, 0.5).

  Returns:
    Values (log 2 at the reference), and metrics.

  References:
    Rafailov et al., 2023, Direct Preference Optimization: Your Language
    Model is Secretly a Reward Model, arXiv:2305.18290; Mitchell, 2023, A
    Note on DPO with Noisy Preferences and Relationship to IPO; Chen et al.,
    2024, Self-Play Fine-Tuning (SPIN), arXiv:2401.01335.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  values = smoothed(won - lost, label_smoothing)
  return values, pair_figures(won, lost, chosen)


def robust_dpo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  label_smoothing: Scalar = 0.1,
) -> Losses:
  """DPO whose mean over flipped labels is that of the true ones.

      ℓ = (−(1 − ε) log σ(h) + ε log σ(−h)) / (1 − 2ε)

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.
    label_smoothing: ε in [0, 0.5), the rate of flipped labels.

  Returns:
    Values (log 2 at the reference, not bounded below), and metrics.

  References:
    Chowdhury et al., 2024, Provably Robust DPO: Aligning Language Models with
    Noisy Feedback, arXiv:2403.00409.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  flips = label_smoothing / (1 - 2 * label_smoothing)
  values = smoothed(won - lost, -flips)
  return values, pair_figures(won, lost, chosen)


def f_dpo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  divergence: Divergence = 'jensen_shannon',
  alpha: Scalar = 0.5,
  label_smoothing: Scalar = 0.0,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """DPO under another divergence from the reference than the reverse KL.

      ℓ = −(1 − ε) log σ(r_w − r_l) − ε log σ(r_l − r_w),   r = β f′(π / ref)

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the coefficient of the divergence.
    divergence, alpha, max_log_ratio: see `implicit_reward`.
    label_smoothing: ε in [0, 0.5).

  Returns:
    Values (log 2 at the reference), and metrics.

  References:
    Wang et al., 2023, Beyond Reverse KL: Generalizing Direct Preference
    Optimization with Diverse Divergence Constraints, arXiv:2309.16240.
  """
  won, lost = (
    implicit_reward(
      logprobs,
      ref_logprobs,
      beta=beta,
      divergence=divergence,
      alpha=alpha,
      max_log_ratio=max_log_ratio,
    )
    for logprobs, ref_logprobs in (
      (chosen, ref_chosen),
      (rejected, ref_rejected),
    )
  )
  values = smoothed(won - lost, label_smoothing)
  return values, pair_figures(won, lost, chosen)


def length_normalized_dpo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  chosen_lengths: Int[Array, ' N'],
  rejected_lengths: Int[Array, ' N'],
  *,
  beta: Scalar = 5.0,
  label_smoothing: Scalar = 0.0,
) -> Losses:
  """DPO on log-ratios per token.

      h = β [(log π_w − log ref_w) / |w| − (log π_l − log ref_l) / |l|]
      ℓ = −(1 − ε) log σ(h) − ε log σ(−h)

  Long pairs no longer saturate σ. β is that of one token, about the length
  times the β of DPO.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    chosen_lengths, rejected_lengths: numbers of completion tokens.
    beta: β > 0.
    label_smoothing: ε in [0, 0.5).

  Returns:
    Values (log 2 at the reference), and metrics.

  References:
    Lambert et al., 2024, Tülu 3: Pushing Frontiers in Open Language Model
    Post-Training, arXiv:2411.15124.
  """
  lengths = (chosen_lengths, rejected_lengths)
  return dpo(
    *per_token(chosen, rejected, *lengths),
    *per_token(ref_chosen, ref_rejected, *lengths),
    beta=beta,
    label_smoothing=label_smoothing,
  )


def ipo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
) -> Losses:
  """Identity preference optimisation: regress the margin on a target.

      ℓ = (h / β − 1 / (2β))²

  The margin of log-ratios is drawn to 1 / (2β) and pushed back beyond it; with
  labels that never contradict, DPO's diverges. Sums, as in the paper; one
  popular trainer has `length_normalized_ipo` under this name.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the paper's τ.

  Returns:
    Values (1 / 4β² at the reference), and metrics.

  References:
    Azar et al., 2023, A General Theoretical Paradigm to Understand Learning
    from Human Preferences, arXiv:2310.12036.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  values = jnp.square((won - lost - 0.5) / beta)
  return values, pair_figures(won, lost, chosen)


def length_normalized_ipo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  chosen_lengths: Int[Array, ' N'],
  rejected_lengths: Int[Array, ' N'],
  *,
  beta: Scalar = 0.1,
) -> Losses:
  """IPO on log-ratios per token.

      ℓ = ((log π_w − log ref_w) / |w| − (log π_l − log ref_l) / |l| − 1 / 2β)²

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    chosen_lengths, rejected_lengths: numbers of completion tokens.
    beta: β > 0, the paper's τ.

  Returns:
    Values (1 / 4β² at the reference), and metrics.

  References:
    Azar et al., 2023, A General Theoretical Paradigm to Understand Learning
    from Human Preferences, arXiv:2310.12036.
  """
  lengths = (chosen_lengths, rejected_lengths)
  return ipo(
    *per_token(chosen, rejected, *lengths),
    *per_token(ref_chosen, ref_rejected, *lengths),
    beta=beta,
  )


def hinge(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
) -> Losses:
  """Zero once the margin is 1.

      ℓ = max(0, 1 − h)

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module; zeros for the
      reference give the calibration loss of SLiC, which has none.
    beta: β > 0, the inverse scale of the implicit reward.

  Returns:
    Values (1 at the reference), and metrics.

  References:
    Zhao et al., 2023, SLiC-HF, arXiv:2305.10425; Liu et al., 2023,
    Statistical Rejection Sampling Improves Preference Optimization,
    arXiv:2309.06657.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  margin = won - lost
  values = jnp.where(margin < 1, 1 - margin, 0)
  return values, pair_figures(won, lost, chosen)


def exo_pair(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  label_smoothing: Scalar = 1e-3,
) -> Losses:
  """Reverse KL of the policy's preference to the smoothed label.

      ℓ = q log(q / (1 − ε)) + (1 − q) log((1 − q) / ε),   q = σ(h)

  DPO has the forward direction.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.
    label_smoothing: ε in (0, 0.5); at 0 the loss would be infinite.

  Returns:
    Values (at least 0, which is at q = 1 − ε), and metrics.

  References:
    Ji et al., 2024, Towards Efficient Exact Optimization of Language Model
    Alignment, arXiv:2402.00856.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  margin = won - lost
  label = jnp.asarray(label_smoothing, margin.dtype)
  right = log_sigmoid(margin) - jnp.log1p(-label)
  flipped = log_sigmoid(-margin) - jnp.log(label)
  values = sigmoid(margin) * right + sigmoid(-margin) * flipped
  return values, pair_figures(won, lost, chosen)


def discopop(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  temperature: Scalar = 0.05,
) -> Losses:
  """Logistic loss for wrong margins, exponential for right ones.

      ℓ = −(1 − s) log σ(h) + s e⁻ʰ,   s = σ(h / τ)

  Found by a search over programs; it is not convex.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.
    temperature: τ in (0, 1) of the blend.

  Returns:
    Values, and metrics.

  References:
    Lu et al., 2024, Discovering Preference Optimization Algorithms with and
    for Large Language Models (DiscoPOP), arXiv:2406.08414.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  margin = won - lost
  blend = margin / temperature
  # One exponential: s → 0 faster than e⁻ʰ overflows.
  exponential = jnp.exp(log_sigmoid(blend) - margin)
  values = exponential - sigmoid(-blend) * log_sigmoid(margin)
  return values, pair_figures(won, lost, chosen)


def aot(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  label_smoothing: Scalar = 0.0,
) -> Losses:
  """Margins of the policy above the reference's, quantile by quantile.

      h_(k) = β [sort(log π_w − log π_l)_k − sort(log ref_w − log ref_l)_k]
      ℓ = −(1 − ε) log σ(h) − ε log σ(−h)

  The only loss here that couples its rows: the reference's quantiles are those
  of the arrays given, so it is not additive over micro-batches.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.
    label_smoothing: ε in [0, 0.5).

  Returns:
    Values in the order of the pairs (log 2 at the reference), and metrics.

  References:
    Melnyk et al., 2024, Distributional Preference Alignment of LLMs via
    Optimal Transport, arXiv:2406.05882.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  chosen, rejected, ref_chosen, ref_rejected = promoted(
    chosen, rejected, ref_chosen, ref_rejected
  )
  gaps, ref_gaps = chosen - rejected, stop_gradient(ref_chosen - ref_rejected)
  ranks = jnp.argsort(jnp.argsort(gaps))
  margin = beta * (gaps - jnp.sort(ref_gaps)[ranks])
  values = smoothed(margin, label_smoothing)
  return values, pair_figures(won, lost, chosen)
