"""Losses of preferences, per pair, on sequence log-probs.

``chosen`` and ``rejected`` are sums of the completion's token log-probs under
the policy, ``ref_chosen`` and ``ref_rejected`` under the frozen reference.
"""

from jax import Array
from jax.lax import stop_gradient
from jax.nn import log_sigmoid
from jaxtyping import Float

from postrain.dtypes import Scalar, promoted

__all__ = ['dpo']

Losses = tuple[Float[Array, ' N'], dict[str, Float[Array, ' N']]]


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

      h = β [(log π_w − log ref_w) − (log π_l − log ref_l)]
      ℓ = −(1 − ε) log σ(h) − ε log σ(−h)

  ε is the probability that a label is flipped (conservative DPO). One popular
  trainer accepts ε for this loss and ignores it.

  Args:
    chosen: log-probs of the preferred completions; the gradient flows here.
    rejected: log-probs of the others; the gradient flows here.
    ref_chosen: of the reference, constants.
    ref_rejected: of the reference, constants.
    beta: β > 0, the inverse scale of the implicit reward.
    label_smoothing: ε in [0, 0.5).

  Returns:
    Values (log 2 at the reference), and metrics: 'chosen_reward' and
    'rejected_reward' (β times the log-ratio), their 'margin', 'accuracy' (1
    where it is above 0), 'chosen_logprob' (DPO often lowers both).

  References:
    Rafailov et al., 2023, Direct Preference Optimization: Your Language
    Model is Secretly a Reward Model, arXiv:2305.18290; Mitchell, 2023, A
    Note on DPO with Noisy Preferences and Relationship to IPO.
  """
  chosen, rejected, ref_chosen, ref_rejected = promoted(
    chosen, rejected, ref_chosen, ref_rejected
  )
  chosen_reward = beta * (chosen - stop_gradient(ref_chosen))
  rejected_reward = beta * (rejected - stop_gradient(ref_rejected))
  margin = chosen_reward - rejected_reward
  right, flipped = log_sigmoid(margin), log_sigmoid(-margin)
  values = -(1 - label_smoothing) * right - label_smoothing * flipped
  metrics = {
    'chosen_reward': chosen_reward,
    'rejected_reward': rejected_reward,
    'margin': margin,
    'accuracy': (margin > 0).astype(margin.dtype),
    'chosen_logprob': chosen,
  }
  return values, {k: stop_gradient(v) for k, v in metrics.items()}
