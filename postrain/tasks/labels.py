"""What raters say of completions whose reward is known, as batches.

A rater sees two completions of a prompt and prefers the first with the chance

  P(a ≻ b) = σ(scale (gold_a − gold_b) + bias (feature_a − feature_b))

Gold and feature are rewards of the task. A reward model can learn no more than
scale·gold + bias·feature, so that a bias on what gold dislikes is a reward to
be over-optimised. Batches hold prompts in the first slots, completions behind
them, and the array ``gold``; `postrain.batches.weigh_units` makes them ready
for objectives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from postrain.types import Batch, Scalar, Task


class Candidates(NamedTuple):
  """K completions of each prompt: drawn by `candidates`, or of any policy."""

  prompts: Int[Array, 'P S']
  prompt_mask: Bool[Array, 'P S']
  completions: Int[Array, 'P K T']
  mask: Bool[Array, 'P K T']


def candidates(
  task: Task,
  key: Key[Array, ''],
  *,
  num_prompts: int,
  num_samples: int = 2,
  logits: Float[Array, ' V'] | None = None,
  held_out: bool = False,
) -> Candidates:
  """Draw prompts, and completions token by token from one distribution.

  Args:
    task: with a stop token, which ends a completion at its last slot if it was
      not drawn before.
    key: of prompts and tokens.
    num_prompts: P.
    num_samples: K, completions of a prompt.
    logits: of a token; None for a uniform one, but for padding.
    held_out: whether prompts are those of evaluation.

  Raises:
    ValueError: the task has no stop token.
  """
  if not task.stop_ids:
    raise ValueError('the task has no stop_ids: take one whose completions end')
  of_prompts, of_tokens = jax.random.split(key)
  prompts, prompt_mask = jax.vmap(lambda k: task.prompt(k, held_out))(
    jax.random.split(of_prompts, num_prompts)
  )
  if logits is None:
    logits = jnp.zeros(task.vocab_size).at[task.pad_id].set(-jnp.inf)
  shape = (num_prompts, num_samples, task.completion_length)
  tokens = jax.random.categorical(of_tokens, logits, shape=shape)
  tokens = tokens.astype(jnp.int32).at[..., -1].set(task.stop_ids[0])
  stops = jnp.isin(tokens, jnp.array(task.stop_ids, jnp.int32))
  # True up to the first stop, which is a token of the completion.
  mask = jnp.cumsum(stops, -1, dtype=jnp.int32) <= stops.astype(jnp.int32)
  tokens = jnp.where(mask, tokens, task.pad_id)
  return Candidates(prompts, prompt_mask, tokens, mask)


def label_probability(
  gold: Float[Array, 'P 2'],
  feature: Float[Array, 'P 2'] | None = None,
  *,
  scale: float = 10.0,
  bias: Scalar = 0.0,
  flip: float = 0.0,
) -> Float[Array, ' P']:
  """The chance that the first of two is preferred, after flips.

      p = σ(scale Δgold + bias Δfeature),   P = (1 − flip) p + flip (1 − p)

  Args:
    gold: rewards of both.
    feature: what the rater has a taste for.
    scale: > 0; infinite for a rater who never errs, and decides by the bias
      alone between equal gold, else by chance.
    bias: of any sign; it may be traced.
    flip: share of labels that are turned around.

  Raises:
    ValueError: scale or flip out of range, or a bias without a feature.
  """
  _check(scale, bias, flip, feature is not None)
  distance = gold[:, 0] - gold[:, 1]
  logit = jnp.where(distance == 0, 0, distance * scale)  # 0 x inf is nan
  if feature is not None:
    logit += bias * (feature[:, 0] - feature[:, 1])
  p = jax.nn.sigmoid(logit)
  return (1 - flip) * p + flip * (1 - p)


def pairs(
  task: Task,
  drawn: Candidates,
  key: Key[Array, ''],
  *,
  scale: float = 10.0,
  feature: str | None = None,
  bias: Scalar = 0.0,
  flip: float = 0.0,
  tie_width: float | None = None,
) -> Batch:
  """Units of two rows, chosen and rejected, by `label_probability`.

  Args:
    task: its rewards name ``gold`` and the feature.
    drawn: two completions of each prompt.
    key: of the labels.
    scale, bias, flip: see `label_probability`.
    feature: name of a reward.
    tie_width: where |Δgold| is not beyond it, the rater sees no difference, and
      the unit has no token; None for no ties.

  Raises:
    ValueError: not two completions; a number out of range.
  """
  if drawn.mask.shape[1] != 2:
    raise ValueError(
      f'{drawn.mask.shape[1]} completions of a prompt: pairs have two; draw'
      ' num_samples=2, or take rankings'
    )
  gold, tastes = _scores(task, drawn, 'gold'), _tastes(task, drawn, feature)
  chance = label_probability(gold, tastes, scale=scale, bias=bias, flip=flip)
  swapped = ~jax.random.bernoulli(key, chance)
  order = jnp.stack([swapped, ~swapped], 1).astype(jnp.int32)
  seen = jnp.ones(len(gold), bool)
  if tie_width is not None:
    seen = jnp.abs(gold[:, 0] - gold[:, 1]) > tie_width
  ordered = drawn._replace(
    completions=jnp.take_along_axis(drawn.completions, order[..., None], 1),
    mask=jnp.take_along_axis(drawn.mask, order[..., None], 1),
  )
  gold = jnp.take_along_axis(gold, order, 1)
  return _batch(ordered, 2, seen, gold=gold.reshape(-1))


def rankings(
  task: Task,
  drawn: Candidates,
  key: Key[Array, ''],
  *,
  scale: float = 10.0,
  feature: str | None = None,
  bias: Scalar = 0.0,
) -> Batch:
  """Units of K rows with ``ranks``, by Plackett and Luce; 0 is the best.

  Each in turn is drawn of those that are left, with P ∝ exp(scale·gold +
  bias·feature); of two that is `label_probability`.

  Args:
    task, drawn, key, scale, feature, bias: see `pairs`; K completions.

  Raises:
    ValueError: a number out of range.
  """
  _check(scale, bias, 0.0, feature is not None)
  gold = _scores(task, drawn, 'gold')
  # Sorting under Gumbel noise draws without replacement.
  noise = jax.random.gumbel(key, gold.shape, gold.dtype)
  ranks = _ranks(gold, noise, _tastes(task, drawn, feature), scale, bias)
  seen = jnp.ones(len(gold), bool)
  return _batch(
    drawn, gold.shape[1], seen, gold=gold.reshape(-1), ranks=ranks.reshape(-1)
  )


def unpaired(
  task: Task,
  drawn: Candidates,
  key: Key[Array, ''],
  *,
  scale: float = 10.0,
  feature: str | None = None,
  bias: Scalar = 0.0,
  flip: float = 0.0,
  share: float = 0.5,
) -> Batch:
  """Single rows, ``desirable`` or not, of an exact share.

  A completion is desirable where scale·gold + bias·feature and logistic noise
  are beyond a bar that ``share`` of all N = P K completions pass.

  Args:
    task, drawn, key, scale, feature, bias: see `pairs`; any K.
    flip: share of labels that are turned around after that.
    share: of desirable completions; N share is rounded.

  Raises:
    ValueError: a number out of range.
  """
  _check(scale, bias, flip, feature is not None)
  if not 0 <= share <= 1:
    raise ValueError(f'share={share}: choose it in [0, 1]')
  of_noise, of_flips = jax.random.split(key)
  gold = _scores(task, drawn, 'gold').reshape(1, -1)
  noise = jax.random.logistic(of_noise, gold.shape, gold.dtype)
  tastes = _tastes(task, drawn, feature)
  tastes = None if tastes is None else tastes.reshape(1, -1)
  ranks = _ranks(gold, noise, tastes, scale, bias)[0]
  desirable = ranks < round(share * gold.size)
  desirable ^= jax.random.bernoulli(of_flips, flip, desirable.shape)
  seen = jnp.ones(len(drawn.prompts), bool)
  return _batch(drawn, 1, seen, gold=gold[0], desirable=desirable)


def pair_accuracy(batch: Batch, scores: Float[Array, ' B']) -> Float[Array, '']:
  """The share of pairs whose chosen has the larger score; equal ones half.

  With ``batch.arrays['gold']`` it is the oracle's, which no reward model can
  hope to pass on new labels of an unbiased rater.
  """
  distance = scores[::2] - scores[1::2]
  right = (1 + jnp.sign(distance)) / 2
  seen = batch.mask.any(-1)[::2].astype(right.dtype)
  return jnp.where(seen > 0, right, 0).sum() / jnp.maximum(seen.sum(), 1)


def _scores(task: Task, drawn: Candidates, name: str) -> Float[Array, 'P K']:
  if name not in task.rewards:
    raise ValueError(
      f'the task has no reward {name!r}, only {", ".join(task.rewards)}'
    )
  num_prompts, num_samples, length = drawn.mask.shape
  values = task.rewards[name](
    jnp.repeat(drawn.prompts, num_samples, axis=0),
    drawn.completions.reshape(-1, length),
    drawn.mask.reshape(-1, length),
  )
  return values.reshape(num_prompts, num_samples)


def _tastes(
  task: Task, drawn: Candidates, feature: str | None
) -> Float[Array, 'P K'] | None:
  return None if feature is None else _scores(task, drawn, feature)


def _ranks(
  gold: Float[Array, 'N K'],
  noise: Float[Array, 'N K'],
  tastes: Float[Array, 'N K'] | None,
  scale: float,
  bias: Scalar,
) -> Int[Array, 'N K']:
  """Places by scale·gold + bias·tastes + noise, the largest first."""
  rest = noise if tastes is None else noise + bias * tastes
  # Divided by the scale, and again behind it: an infinite scale leaves gold,
  # and the rest decides between equals.
  order = jnp.lexsort((-rest, -(gold + rest / scale)), axis=-1)
  return jnp.argsort(order, axis=-1).astype(jnp.int32)


def _batch(
  drawn: Candidates, unit_size: int, seen: Bool[Array, ' P'],
  **arrays: Array,
) -> Batch:  # fmt: skip
  """Rows of prompt and completion; none of a unit that is not seen."""
  _, num_samples, length = drawn.mask.shape
  mask = (drawn.mask & seen[:, None, None]).reshape(-1, length)

  def rows(prompts: Array, completions: Array) -> Array:
    prompts = jnp.repeat(prompts, num_samples, axis=0)
    return jnp.concatenate([prompts, completions], axis=1)

  unseen = jnp.zeros_like(drawn.prompt_mask)
  return Batch(
    tokens=rows(drawn.prompts, drawn.completions.reshape(-1, length)),
    valid=rows(drawn.prompt_mask & seen[:, None], mask),
    mask=rows(unseen, mask),
    weights={},
    arrays=arrays,
    unit_size=unit_size,
  )


def _check(scale: float, bias: Scalar, flip: float, tasteful: bool) -> None:
  if not scale > 0:
    raise ValueError(f'scale={scale}: choose it above 0; infinity never errs')
  if not 0 <= flip <= 1:
    raise ValueError(f'flip={flip}: choose it in [0, 1]')
  if not tasteful and bias:
    raise ValueError(f'bias={bias}: name the feature that it is on')
