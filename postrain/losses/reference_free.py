"""Losses of pairs without a reference model.

``chosen`` and ``rejected`` are sums of the completion's token log-probs under
the policy, ``chosen_lengths`` and ``rejected_lengths`` numbers of their tokens.
Nothing holds the policy to where it began: watch its divergence.
"""

from jax import Array
from jax.lax import stop_gradient
from jax.nn import log_sigmoid
import jax.numpy as jnp
from jaxtyping import Float, Int

from postrain.dtypes import Scalar, promoted
from postrain.losses.pieces import log1mexp, pair_figures, per_token

__all__ = ['cpo', 'orpo', 'simpo']

Losses = tuple[Float[Array, ' N'], dict[str, Float[Array, ' N']]]


def simpo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  chosen_lengths: Int[Array, ' N'],
  rejected_lengths: Int[Array, ' N'],
  *,
  beta: Scalar = 2.0,
  gamma: Scalar = 1.0,
) -> Losses:
  """The policy's own log-prob per token as the reward, with a target margin.

      ℓ = −log σ(β log π_w / |w| − β log π_l / |l| − γ)

  What is generated is ranked by the same quantity. γ is the whole margin; some
  configs give γ / β. One popular trainer adds a likelihood term unless told
  not to.

  Args:
    chosen, rejected, chosen_lengths, rejected_lengths: see the module.
    beta: β > 0, 2 to 2.5 in the paper.
    gamma: γ ≥ 0, 0.3 to 0.8 times β in the paper.

  Returns:
    Values (log(1 + e^γ) at equal rewards), and metrics: 'chosen_reward' and
    'rejected_reward' (β times the mean log-prob), 'margin', 'accuracy',
    'chosen_logprob'.

  References:
    Meng et al., 2024, SimPO: Simple Preference Optimization with a
    Reference-Free Reward, arXiv:2405.14734.
  """
  averages = per_token(chosen, rejected, chosen_lengths, rejected_lengths)
  won, lost = (beta * average for average in averages)
  values = -log_sigmoid(won - lost - gamma)
  return values, pair_figures(won, lost, chosen)


def orpo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  chosen_lengths: Int[Array, ' N'],
  rejected_lengths: Int[Array, ' N'],
  *,
  coef: Scalar = 0.1,
) -> Losses:
  """Supervised fine-tuning that also raises the odds of the chosen.

      ℓ = −p_w − λ log σ(odds_w − odds_l)
      odds = p − log(1 − eᵖ),   p = log π(y) / |y|

  The probability is the geometric mean over tokens: that of a whole sequence
  would be 0 in any float. One popular trainer imitates the prompt too.

  Args:
    chosen, rejected, chosen_lengths, rejected_lengths: see the module.
    coef: λ ≥ 0.

  Returns:
    Values, and metrics: 'chosen_reward' and 'rejected_reward' (log-odds),
    'margin', 'accuracy', 'chosen_logprob', 'odds_ratio_loss' (before λ).

  References:
    Hong et al., 2024, ORPO: Monolithic Preference Optimization without
    Reference Model, arXiv:2403.07691.
  """
  averages = per_token(chosen, rejected, chosen_lengths, rejected_lengths)
  won, lost = map(_log_odds, averages)
  penalty = -log_sigmoid(won - lost)
  metrics = {'odds_ratio_loss': stop_gradient(penalty)}
  values = coef * penalty - averages[0]
  return values, metrics | pair_figures(won, lost, chosen)


def cpo(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  *,
  beta: Scalar = 0.1,
  nll_coef: Scalar | None = 1.0,
) -> Losses:
  """DPO with a uniform reference, and the likelihood of the chosen.

      ℓ = −log σ(β (log π_w − log π_l)) − c log π_w

  Args:
    chosen, rejected: see the module.
    beta: β > 0.
    nll_coef: c; None for no such term. One popular trainer has the mean over
      tokens here: then use None and `negative_log_likelihood` as a term of
      its own.

  Returns:
    Values, and metrics: 'chosen_reward' and 'rejected_reward' (β times the
    log-prob), 'margin', 'accuracy', 'chosen_logprob'.

  References:
    Xu et al., 2024, Contrastive Preference Optimization: Pushing the
    Boundaries of LLM Performance in Machine Translation, arXiv:2401.08417.
  """
  chosen, rejected = promoted(chosen, rejected)
  won, lost = beta * chosen, beta * rejected
  values = -log_sigmoid(won - lost)
  if nll_coef is not None:
    values = values - nll_coef * chosen
  return values, pair_figures(won, lost, chosen)


def _log_odds(logprob: Array) -> Array:
  # A certain token has infinite odds; 1e-6 is where float32 still resolves.
  logprob = jnp.minimum(logprob, -1e-6)
  return logprob - log1mexp(logprob)
