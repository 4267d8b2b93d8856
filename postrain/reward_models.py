"""Reward models: scores of tokens, steps and completions, and their training.

A score is indexed by the token that it has read, ``scores[:, t]`` by
``tokens[:, t]``, unlike a value, which is of the state before its token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain.batches import call_by_name, check_packing
from postrain.dtypes import promoted
from postrain.losses import score_centering, step_correctness
from postrain.objectives import masked_mean
from postrain.scoring import in_slices, map_logits, masked_states, read_states
from postrain.soft_labels import mean_over_labels
from postrain.types import (
  Batch,
  Metrics,
  Model,
  Objective,
  Packing,
  Params,
  Scalar,
  Sum,
)

__all__ = [
  'completion_objective',
  'completion_scores',
  'ensemble',
  'label_score',
  'step_ends',
  'step_objective',
  'token_scores',
]


def label_score(logits: Float[Array, '*n K']) -> Float[Array, '*n']:
  """One number of a head: its only logit, or of two labels the log-odds.

      s = z_0   or   s = z_1 − z_0,   with σ(s) the chance of the second label

  Cross-entropy of two labels is `postrain.losses.step_correctness` of s.

  Raises:
    ValueError: more than two labels.
  """
  num_labels = logits.shape[-1]
  if num_labels > 2:
    raise ValueError(
      f'a head of {num_labels} labels has no single score: give a function of'
      ' its logits'
    )
  return logits[..., 0] if num_labels == 1 else logits[..., 1] - logits[..., 0]


def token_scores(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  chunk_size: int = 128,
  num_slices: int = 1,
  packing: Packing | None = None,
) -> Float[Array, 'B T']:
  """Score the text up to and with each token under the mask.

  Args:
    model: whose unembed gives one score, or two labels (wrong, right).
    params: its parameters.
    tokens: prompt and completion.
    valid: True on real tokens.
    mask: True where scores are wanted: ``valid``, or `step_ends`.
    chunk_size: time positions that the head sees at once.
    num_slices: slices of the batch that run one after the other; it must
      divide B.
    packing: layout made for the same ``num_slices`` and units of one row.

  Returns:
    Scores, 0 off the mask.

  Raises:
    ValueError: the head has more labels, or the packing is of other slices.
  """
  check_packing(packing, num_slices, 1)

  def of_slice(piece: tuple) -> Array:
    tokens, valid, mask, packing = piece
    states, _ = read_states(model, params, tokens, valid, packing)
    return _at_tokens(model, params, states, mask, chunk_size)

  return in_slices(of_slice, (tokens, valid, mask, packing), num_slices)


def completion_scores(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  *,
  num_slices: int = 1,
  packing: Packing | None = None,
) -> Float[Array, ' B']:
  """Score each row at its last real token, wherever the padding is.

  A response that was cut off is scored at its last token, where a reward model
  that never saw one deserves no trust.

  Args:
    model, params, tokens, valid, num_slices, packing: as in `token_scores`.

  Returns:
    Scores, 0 for a row without tokens.
  """
  check_packing(packing, num_slices, 1)

  def of_slice(piece: tuple) -> Array:
    tokens, valid, packing = piece
    states, _ = read_states(model, params, tokens, valid, packing)
    return _at_ends(model, params, states, valid)

  return in_slices(of_slice, (tokens, valid, packing), num_slices)


def ensemble(
  scores: Float[Array, 'M N'],
  *,
  aggregate: str = 'mean',
  coef: Scalar = 1.0,
) -> Float[Array, ' N']:
  """One reward of M models, less where they disagree.

      mean_m s_m,   min_m s_m   or   mean_m s_m − β √(mean_m (s_m − mean)²)

  A policy finds where one model errs; several of other seeds err in other
  places. Only differences within a prompt are learnt by a model, so that
  before any but the mean the scores of each want the same zero and scale:
  subtract their mean over completions of the reference. The paper of the last
  form charges the variance in place of its root.

  Args:
    scores: of N completions by M models.
    aggregate: 'mean', 'min' or 'lower', the bound by the deviation.
    coef: β ≥ 0, of 'lower' alone; it may be traced.

  Returns:
    Rewards, constants.

  Raises:
    ValueError: unknown aggregate.

  References:
    Coste et al., 2023, Reward Model Ensembles Help Mitigate Overoptimization,
    arXiv:2310.02743; Eisenstein et al., 2023, Helping or Herding?,
    arXiv:2312.09244.
  """
  scores = jax.lax.stop_gradient(promoted(scores)[0])
  if aggregate == 'min':
    return jnp.min(scores, axis=0)
  mean = jnp.mean(scores, axis=0)
  if aggregate == 'mean':
    return mean
  if aggregate != 'lower':
    raise ValueError(
      f"aggregate is {aggregate!r}; choose 'mean', 'min' or 'lower'"
    )
  return mean - coef * jnp.std(scores, axis=0)


def _at_tokens(
  model: Model, params: Params, states: Array, mask: Array, chunk_size: int
) -> Float[Array, 'B T']:
  states = masked_states(states, mask)
  scores = map_logits(label_score, model, params, states, chunk_size=chunk_size)
  return jnp.where(mask, scores, 0)


def _at_ends(
  model: Model, params: Params, states: Array, valid: Array
) -> Float[Array, ' B']:
  last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
  states = masked_states(states, valid)
  states = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
  scores = label_score(model.unembed(params, states))
  return jnp.where(jnp.any(valid, axis=1), scores, 0)


def step_ends(
  tokens: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  separators: tuple[tuple[int, ...], ...],
  last: bool = True,
) -> Bool[Array, 'B T']:
  """The last token of each step: of the separator that ends it.

  Separators that touch or overlap end one step together, so that no step is
  empty. A tokenizer may join a separator with what stands before it; list each
  id whose text ends with it.

  Args:
    tokens: prompt and completion.
    mask: where steps are looked for, say the completion.
    separators: each a sequence of ids, often of one.
    last: whether the last token under the mask ends a step without a separator.

  Returns:
    True on ends of steps; never off the mask.

  Raises:
    ValueError: no separator, or an empty one.
  """
  if not separators or not all(separators):
    raise ValueError(
      f'separators={separators}: give at least one, each with at least one id'
    )

  def shifted(x: Array, by: int) -> Array:
    """x[:, t - by], False where there is none."""
    length = x.shape[1]
    x = jnp.pad(x, ((0, 0), (max(by, 0), max(-by, 0))))
    return x[:, max(-by, 0) :][:, :length]

  matches = [
    jnp.all(
      jnp.stack([
        shifted(mask & (tokens == token), len(ids) - 1 - i)
        for i, token in enumerate(ids)
      ]),
      axis=0,
    )
    for ids in separators
  ]  # fmt: skip
  ends = jnp.any(jnp.stack(matches), axis=0)
  if last:
    ends |= mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
  for ids, match in zip(separators, matches, strict=True):
    for by in range(1, len(ids) + 1):
      ends &= ~shifted(match, -by)
  return ends


def completion_objective(
  model: Model, *, loss: Callable, centering_coef: Scalar | None = None
) -> Objective:
  """The objective of reward models of whole completions.

  Σ w_preference·loss + centering_coef Σ w_preference·(s_w + s_l)², the second
  without its term if the coefficient is None. The loss asks for ``chosen`` and
  ``rejected`` (units of two rows: `postrain.losses.bradley_terry`), for
  ``rewards`` [P K] and ``where`` of units of K (`plackett_luce`), or for
  ``scores`` of rows (`outcome_correctness`), and for what ``batch.arrays`` has
  of each row: ``labels``, ``ranks``, ``margins``, ``preference`` (both read at
  the chosen; see `postrain.soft_labels`). The weights are those of
  `postrain.batches.weigh_units`.

  Args:
    model: of the role ``reward_model``, see `token_scores`.
    loss: of `postrain.losses`.
    centering_coef: of `postrain.losses.score_centering`.
  """

  def objective(
    params: dict[str, Params], frozen: dict[str, Params], batch: Batch
  ) -> tuple[Array, Metrics]:
    del frozen
    states, _ = read_states(
      model, params['reward_model'], batch.tokens, batch.valid, batch.packing
    )
    scores = _at_ends(model, params['reward_model'], states, batch.valid)
    arrays = _unit_arrays(scores, batch)
    values, figures = mean_over_labels(loss, arrays)
    units = batch.mask.any(-1).reshape(len(values), -1)
    weights = batch.weights['preference'].reshape(units.shape)[:, 0]
    total = jnp.sum(weights * values)
    if centering_coef is not None:
      centering, more = call_by_name(score_centering, arrays)
      total += centering_coef * jnp.sum(weights * centering)
      figures |= more
    metrics: Metrics = {'loss': Sum(jax.lax.stop_gradient(total))}
    full = units.any(-1)
    return total, metrics | {
      f'reward_model/{k}': masked_mean(v, full) for k, v in figures.items()
    }

  return objective


def _unit_arrays(scores: Array, batch: Batch) -> dict[str, Array]:
  """Scores and what belongs to them, by row, by unit and by pair."""
  units = (-1, batch.unit_size)
  arrays = {**batch.arrays, 'scores': scores, 'rewards': scores.reshape(units)}
  arrays['where'] = batch.valid.any(-1).reshape(units)
  if 'ranks' in arrays:
    arrays['ranks'] = arrays['ranks'].reshape(units)
  if batch.unit_size == 2:
    arrays['chosen'], arrays['rejected'] = scores[::2], scores[1::2]
    for name in ('margins', 'preference'):
      if arrays.get(name) is not None:
        arrays[name] = arrays[name][::2]
  return arrays


def step_objective(
  model: Model, *, loss: Callable = step_correctness, chunk_size: int = 128
) -> Objective:
  """The objective of process reward models: Σ w_policy·loss(scores, labels).

  ``batch.mask`` is True on the ends of the steps to train (`step_ends`,
  `postrain.losses.until_first_error`), or on every token for the values of
  prefixes; ``batch.arrays['labels']`` [B T] holds their labels.
  """

  def objective(
    params: dict[str, Params], frozen: dict[str, Params], batch: Batch
  ) -> tuple[Array, Metrics]:
    del frozen
    mask, weights = batch.mask, params['reward_model']
    states, _ = read_states(
      model, weights, batch.tokens, batch.valid, batch.packing
    )
    scores = _at_tokens(model, weights, states, mask, chunk_size)
    values, figures = call_by_name(
      loss, {**batch.arrays, 'mask': mask, 'scores': scores}
    )
    total = jnp.sum(batch.weights['policy'] * values)
    metrics: Metrics = {'loss': Sum(jax.lax.stop_gradient(total))}
    return total, metrics | {
      f'reward_model/{k}': masked_mean(v, mask) for k, v in figures.items()
    }

  return objective
