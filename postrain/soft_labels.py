"""Pairs whose order is known with a chance."""

from collections.abc import Callable, Mapping

from jax import Array

from postrain.batches import asked, call_by_name


def mean_over_labels(
  loss: Callable, arrays: Mapping[str, Array]
) -> tuple[Array, dict[str, Array]]:
  """Values of a loss of pairs, the mean over labels where these are soft.

      p ℓ(w, l) + (1 − p) ℓ(l, w)

  p is ``preference`` [N], the chance that the chosen is preferred. Of `dpo` it
  is the cross-entropy −p log σ(h) − (1 − p) log σ(−h), so that p = 1 − ε is the
  label smoothing ε of each pair; of `ipo` the target of the margin becomes
  (2p − 1) / 2β. A loss that asks for ``preference`` is given it and left alone.

  Args:
    loss: of `postrain.losses`, whose rows are not coupled.
    arrays: what it may ask for; those of one side are named ``chosen`` or
      ``rejected``.

  Returns:
    Values, and the metrics of the given order.

  References:
    Mitchell, 2023, A Note on DPO with Noisy Preferences and Relationship to
    IPO; Lee et al., 2023, RLAIF: Scaling Reinforcement Learning from Human
    Feedback with AI Feedback, arXiv:2309.00267.
  """
  values, figures = call_by_name(loss, arrays)
  chances = arrays.get('preference')
  if chances is None or 'preference' in asked(loss):
    return values, figures
  turned, _ = call_by_name(loss, {_turned(k): v for k, v in arrays.items()})
  chances = chances.astype(values.dtype)
  return chances * values + (1 - chances) * turned, figures


def _turned(name: str) -> str:
  """The name of an array once the rejected is preferred."""
  if 'chosen' in name:
    return name.replace('chosen', 'rejected')
  return name.replace('rejected', 'chosen')
