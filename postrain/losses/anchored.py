"""Losses of pairs that anchor each completion, not their margin alone.

Arrays and metrics are those of `postrain.losses.preference`; with
x = β (log π_w − log ref_w) and y = β (log π_l − log ref_l) these losses say
where x and y should be, so that the chosen cannot fall with the rejected.
"""

from jax import Array
from jax.nn import log_sigmoid, sigmoid
import jax.numpy as jnp
from jaxtyping import Float

from postrain.dtypes import Scalar
from postrain.losses.pieces import implicit_rewards, pair_figures

__all__ = ['apo_down', 'apo_zero', 'bco_pair', 'nca_pair', 'sppo_hard']

Losses = tuple[Float[Array, ' N'], dict[str, Float[Array, ' N']]]


def apo_zero(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
) -> Losses:
  """Raise the chosen and lower the rejected.

      ℓ = 1 − σ(x) + σ(y)

  For chosen completions better than what the policy writes.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.

  Returns:
    Values in (0, 2), 1 at the reference, and metrics.

  References:
    D'Oosterlinck et al., 2024, Anchored Preference Optimization and
    Contrastive Revisions, arXiv:2408.06266.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  values = sigmoid(-won) + sigmoid(lost)
  return values, pair_figures(won, lost, chosen)


def apo_down(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
) -> Losses:
  """Lower the chosen, and the rejected more.

      ℓ = σ(x) + 1 − σ(x − y)

  For chosen completions worse than what the policy writes.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.

  Returns:
    Values in (0, 2), 1 at the reference, and metrics.

  References:
    D'Oosterlinck et al., 2024, Anchored Preference Optimization and
    Contrastive Revisions, arXiv:2408.06266.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  values = sigmoid(won) + sigmoid(lost - won)
  return values, pair_figures(won, lost, chosen)


def bco_pair(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  shift: Scalar = 0.0,
) -> Losses:
  """Classify the chosen as good and the rejected as bad.

      ℓ = −log σ(x − δ) − log σ(δ − y)

  It bounds the DPO loss from above. The paper's δ is a running mean of both
  rewards; without it (the default, as in a popular trainer) the reference is
  the boundary.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.
    shift: δ, a constant.

  Returns:
    Values (2 log 2 at the reference without shift), and metrics.

  References:
    Jung et al., 2024, Binary Classifier Optimization for Large Language
    Model Alignment, arXiv:2404.04656.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  values = -log_sigmoid(won - shift) - log_sigmoid(shift - lost)
  return values, pair_figures(won, lost, chosen)


def nca_pair(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
) -> Losses:
  """Tell the chosen from a noise made of both.

      ℓ = −log σ(x) − ½ log σ(−x) − ½ log σ(−y)

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.

  Returns:
    Values (2 log 2 at the reference), and metrics.

  References:
    Chen et al., 2024, Noise Contrastive Alignment of Language Models with
    Explicit Rewards, arXiv:2402.05369.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  noise = (log_sigmoid(-won) + log_sigmoid(-lost)) / 2
  return -log_sigmoid(won) - noise, pair_figures(won, lost, chosen)


def sppo_hard(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  ref_chosen: Float[Array, ' N'],
  ref_rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
) -> Losses:
  """Self-play: the winner's log-ratio goes to a target, the loser's opposite.

      ℓ = ((x − ½) / β)² + ((y + ½) / β)²

  The labels are certain: a win rate of 1 and of 0. β is the inverse of the
  paper's η, and the reference the policy that sampled.

  Args:
    chosen, rejected, ref_chosen, ref_rejected: see the module.
    beta: β > 0, the inverse scale of the implicit reward.

  Returns:
    Values (1 / 2β² at the reference), and metrics.

  References:
    Wu et al., 2024, Self-Play Preference Optimization for Language Model
    Alignment, arXiv:2405.00675.
  """
  won, lost = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
  values = jnp.square((won - 0.5) / beta) + jnp.square((lost + 0.5) / beta)
  return values, pair_figures(won, lost, chosen)
