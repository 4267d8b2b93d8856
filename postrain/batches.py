"""From rollouts to optimiser minibatches: advantages, weights, layouts."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key
import numpy as np

from postrain import shaping
from postrain.aggregation import token_mean
from postrain.types import Batch, Packing, Rollout, SharedPrompts


def asked(fn: Callable) -> dict[str, Any]:
  """The arrays that a signature asks for, with their defaults."""
  return {
    p.name: p.default
    for p in inspect.signature(fn).parameters.values()
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  }


def call_by_name(fn: Callable, arrays: Mapping[str, Any]) -> Any:
  """Pass the arrays that a signature asks for by name."""
  wanted = asked(fn)
  present = sorted(k for k, v in arrays.items() if v is not None)
  missing = [
    name
    for name, default in wanted.items()
    if default is inspect.Parameter.empty and name not in present
  ]
  if missing:
    raise ValueError(
      f'{getattr(fn, "func", fn).__name__} asks for {", ".join(missing)};'
      f' this assembly has: {", ".join(present)}'
    )
  return fn(*(arrays.get(name) for name in wanted))


def assemble(
  rollout: Rollout,
  *,
  advantage: Callable[..., Array],
  whitening: Callable[..., Array] | None = None,
  returns: Callable[..., Array] | None = None,
  trained: Bool[Array, 'B T'] | None = None,
  counted: Bool[Array, 'B T'] | None = None,
  signals: Mapping[str, Array] | None = None,
  shared: SharedPrompts | None = None,
) -> Batch:
  """Make a batch of a rollout, with advantages over its groups.

  The weights come from `reweigh`, anew for each optimiser minibatch.

  Args:
    rollout: its rewards [P G] already hold what shapes them, but for
      ``penalties`` [B T] in its arrays, which are taken from rewards of tokens.
    advantage: of `postrain.advantages`; one that asks for a ``mask`` is along
      tokens, with the reward of a completion on its last token.
    whitening: of the advantages over all tokens of the mask; None for none.
    returns: what a critic is trained towards, from the arrays of an advantage
      along tokens, the ``old_values`` of the rollout as ``values``; None for
      none.
    trained: tokens of the policy term, the mask if None.
    counted: tokens of its denominator, ``trained`` if None.
    signals: what else the advantage may ask for: ``baselines`` [P],
      ``reward_parts`` [P G K].
    shared: has each prompt read once for its group, the unit of the batch then.
  """
  mask = rollout.mask
  num_prompts, num_samples = rollout.rewards.shape
  groups = jnp.repeat(jnp.arange(num_prompts), num_samples)
  advantages = _advantages(advantage, rollout, groups, signals or {})
  advantages = jnp.where(mask, advantages, 0)
  if whitening is not None:
    arrays = {'advantages': advantages, 'mask': mask}
    advantages = call_by_name(whitening, arrays)
  trained = mask if trained is None else trained & mask
  counted = trained if counted is None else counted & mask
  arrays = {
    'advantages': advantages,
    'groups': groups,
    'sequence_ids': jnp.arange(len(mask)),
    'trained': trained,
    'counted': counted,
  }
  if returns is not None:
    arrays['returns'] = _advantages(returns, rollout, groups, {})
  return Batch(
    tokens=rollout.tokens,
    valid=rollout.valid,
    mask=mask,
    weights={},
    arrays={**rollout.arrays, **arrays},
    packing=shared,
    unit_size=num_samples if shared else 1,
  )


def _advantages(
  advantage: Callable[..., Array], rollout: Rollout, groups: Array,
  signals: Mapping[str, Array],
) -> Array:  # fmt: skip
  """Advantages of tokens [B T], or of sequences [B 1]."""
  mask, rewards = rollout.mask, rollout.rewards
  if 'mask' in asked(advantage):
    free = jnp.zeros(mask.shape, rewards.dtype)
    penalties = rollout.arrays.get('penalties', free)
    token_rewards = shaping.kl_shaped(
      rewards.reshape(-1), penalties, mask, coef=1.0
    )
    arrays = {**rollout.arrays, 'rewards': token_rewards, 'mask': mask}
    arrays |= {'groups': groups, 'turn_ids': rollout.turn_ids}
    if 'old_values' in rollout.arrays:
      arrays['values'] = rollout.arrays['old_values']
    return call_by_name(advantage, arrays)
  lengths = mask.sum(-1).reshape(rewards.shape)
  arrays = {**signals, 'rewards': rewards, 'lengths': lengths}
  if 'old_logprobs' in rollout.arrays:
    logprobs = jnp.where(mask, rollout.arrays['old_logprobs'], 0).sum(-1)
    arrays['sequence_logprobs'] = logprobs.reshape(rewards.shape)
  return call_by_name(advantage, arrays).reshape(-1, 1)


def reweigh(
  batch: Batch,
  *,
  aggregation: Callable[..., Array],
  kl_aggregation: Callable[..., Array] | None = None,
  correction: Callable[..., Array] | None = None,
) -> Batch:
  """Compute the weights of an optimiser minibatch on all of it.

  weights = where(trained, aggregation(counted), 0) x correction for the term
  ``policy``; ``entropy`` and ``value`` (and ``kl``, unless it has an
  aggregation of its own) are aggregated over all of ``batch.mask``, and
  ``balance``, the load of experts, is a mean over ``batch.valid``.

  Args:
    batch: from `assemble`.
    aggregation: of `postrain.aggregation`.
    kl_aggregation: likewise.
    correction: of `postrain.importance`, for the gap between sampler and
      learner; it changes no denominator.
  """

  def aggregate(fn: Callable[..., Array], mask: Array) -> Array:
    return call_by_name(fn, {'mask': mask, 'groups': batch.arrays['groups']})

  policy = aggregate(aggregation, batch.arrays['counted'])
  policy = jnp.where(batch.arrays['trained'], policy, 0)
  if correction is not None:
    arrays = {**batch.arrays, 'mask': batch.mask}
    policy = policy * call_by_name(correction, arrays)
  everyone = aggregate(aggregation, batch.mask)
  weights = {'policy': policy, 'entropy': everyone, 'value': everyone}
  weights['kl'] = aggregate(kl_aggregation or aggregation, batch.mask)
  weights['balance'] = token_mean(batch.valid)
  return dataclasses.replace(batch, weights=weights)


def weigh_units(
  batch: Batch, *, sft_aggregation: Callable[..., Array] | None = None
) -> Batch:
  """Give each unit of a preference batch the same weight, that of its mean.

  ``preference`` [B] stands on the first row of a unit (of a pair the chosen);
  ``sft`` [B T] aggregates the tokens of the first rows, if asked for. A unit
  without a token has no weight.
  """
  first = jnp.arange(len(batch.mask)) % batch.unit_size == 0
  full = batch.mask.any(-1).reshape(-1, batch.unit_size).any(-1)
  count = jnp.maximum(full.sum().astype(float), 1)
  share = jnp.repeat(jnp.where(full, 1 / count, 0), batch.unit_size)
  weights = {'preference': jnp.where(first, share, 0)}
  if sft_aggregation is not None:
    mask = batch.mask & first[:, None]
    weights['sft'] = call_by_name(sft_aggregation, {'mask': mask})
  return dataclasses.replace(batch, weights=weights)


def mismatched(batch: Batch, *, prompt_length: int) -> Batch:
  """Put the completion of the next row behind each prompt, for KTO.

  Args:
    batch: prompts in the first slots, completions behind them; made before its
      rows are padded, permuted or packed.
    prompt_length: slots of the prompts.
  """

  def rotate(x: Array) -> Array:
    prompts, completions = x[:, :prompt_length], x[:, prompt_length:]
    return jnp.concatenate([prompts, jnp.roll(completions, -1, 0)], axis=1)

  parts = map(rotate, (batch.tokens, batch.valid, batch.mask))
  return Batch(*parts, weights={}, arrays={})


def take(batch: Batch, rows: Int[Array, ' N']) -> Batch:
  """Pick rows; weights are those of the whole until `reweigh`."""
  return jax.tree.map(lambda x: x[rows], batch)


def minibatch_rows(
  key: Key[Array, ''], num_rows: int, num_minibatches: int, *, unit_size: int
) -> Int[Array, 'M N']:
  """Shuffle units into minibatches; a single one keeps its order.

  Raises:
    ValueError: the minibatches would cut a unit or be unequal.
  """
  num_units = num_rows // unit_size
  if num_rows % unit_size or num_units % num_minibatches:
    raise ValueError(
      f'{num_rows} rows in units of {unit_size} do not divide into'
      f' {num_minibatches} minibatches: change num_minibatches or the number'
      ' of prompts or samples'
    )
  order = jnp.arange(num_units)
  if num_minibatches > 1:
    order = jax.random.permutation(key, order)
  rows = order[:, None] * unit_size + jnp.arange(unit_size)[None]
  return rows.reshape(num_minibatches, -1)


def pack(
  valid: Bool[np.ndarray, 'B T'],
  *,
  width: int,
  num_slices: int = 1,
  unit_size: int = 1,
  num_rows: int | Sequence[int] | None = None,
) -> Packing:
  """Lay sequences of unequal lengths into few rows (first fit, longest first).

  Packing is a layout of the model call alone. Each of the ``num_slices``
  strided slices of units (see `cut`) is laid out in rows of its own.

  Args:
    valid: True on real tokens.
    width: slots of a row, at least the longest sequence.
    num_slices: number of micro-batches or scoring slices.
    unit_size: rows of a unit.
    num_rows: rows of a slice, or several numbers, of which the least that will
      do is taken; as few as will do if None.

  Raises:
    ValueError: a sequence is longer than a row, or rows do not suffice.
  """
  arrays = packed_places(
    valid, width=width, num_slices=num_slices, unit_size=unit_size,
    num_rows=num_rows,
  )  # fmt: skip
  return Packing(
    *map(jnp.asarray, arrays), num_slices=num_slices, unit_size=unit_size
  )


def packed_places(
  valid: Bool[np.ndarray, 'B T'], *, width: int, num_slices: int = 1,
  unit_size: int = 1, num_rows: int | Sequence[int] | None = None,
) -> tuple[Int[np.ndarray, '...'], ...]:  # fmt: skip
  """The arrays of `pack` on the host: nothing is compiled for them."""
  longest = int(valid.sum(-1).max(initial=0))
  if longest > width:
    raise ValueError(f'a sequence of {longest} tokens, rows of {width} slots')
  slices = cut(valid, num_slices, unit_size)
  fits = [_first_fit(piece.sum(-1), width) for piece in slices]
  needed = max(max(rows, default=0) + 1 for rows, _ in fits)
  given = (needed,) if num_rows is None else np.atleast_1d(num_rows)
  enough = [int(number) for number in given if number >= needed]
  if not enough:
    raise ValueError(f'{needed} rows are needed, num_rows={num_rows} given')
  pieces = [
    _lay_out(piece, *fit, min(enough), width)
    for piece, fit in zip(slices, fits, strict=True)
  ]
  *layout, slot = (np.stack(x) for x in zip(*pieces, strict=True))
  return *join(layout), join(slot, unit_size)


def _first_fit(lengths: np.ndarray, width: int) -> tuple[list[int], list[int]]:
  """Row and first slot of each sequence."""
  used: list[int] = []
  rows, starts = [0] * len(lengths), [0] * len(lengths)
  for b in np.argsort(-lengths, kind='stable'):
    row = next(
      (r for r, n in enumerate(used) if n + lengths[b] <= width), len(used)
    )
    if row == len(used):
      used.append(0)
    rows[b], starts[b] = row, used[row]
    used[row] += int(lengths[b])
  return rows, starts


def _lay_out(
  valid: np.ndarray, rows: list[int], starts: list[int], num_rows: int,
  width: int,
) -> tuple[np.ndarray, ...]:  # fmt: skip
  """The fields of the `Packing` of a slice."""
  batch_size, length = valid.shape
  source = np.zeros((num_rows, width), np.int32)
  segment_ids, positions = np.zeros_like(source), np.zeros_like(source)
  slot = np.zeros((batch_size, length), np.int32)
  for b in range(batch_size):
    (real,) = np.nonzero(valid[b])
    slots = slice(starts[b], starts[b] + len(real))
    source[rows[b], slots] = b * length + real
    positions[rows[b], slots] = np.arange(len(real))
    segment_ids[rows[b], slots] = segment_ids[rows[b]].max(initial=0) + 1
    slot[b, real] = rows[b] * width + starts[b] + np.arange(len(real))
  return source, segment_ids, positions, slot


def cut(tree: Any, num_slices: int, unit_size: int = 1) -> Any:
  """Cut the leading axis into strided slices: slice m has units m, m + M, ...

  Strided, so that each shard of a sharded leading axis gives its part to every
  slice and nothing moves between devices.

  Raises:
    ValueError: the slices would cut a unit or be unequal.
  """

  def cut_leaf(x: Any) -> Any:
    if x.shape[0] % (num_slices * unit_size):
      raise ValueError(
        f'{x.shape[0]} rows do not divide into {num_slices} slices of whole'
        f' units of {unit_size}: change the batch or the number of slices'
      )
    units = x.reshape(-1, num_slices, unit_size, *x.shape[1:])
    return units.swapaxes(0, 1).reshape(num_slices, -1, *x.shape[1:])

  return jax.tree.map(cut_leaf, tree)


def together(packing: Packing | SharedPrompts | None) -> int:
  """Rows that a layout lets no slice part."""
  return packing.num_samples if isinstance(packing, SharedPrompts) else 1


def check_packing(
  packing: Packing | SharedPrompts | None, num_slices: int, unit_size: int
) -> None:
  """Refuse a layout whose indices point into other slices.

  Raises:
    ValueError: it was made for another number of slices or another unit.
  """
  if not isinstance(packing, Packing):
    return
  made_for = packing.num_slices, packing.unit_size
  if made_for != (num_slices, unit_size):
    raise ValueError(
      f'packing was made for num_slices={made_for[0]}, unit_size={made_for[1]}'
      f' and is used for {num_slices} and {unit_size}: pack the batch again'
    )


def cut_batch(batch: Batch, num_slices: int) -> list[Array]:
  """Cut the leaves of a batch and of its layout, in their order."""
  unpacked = dataclasses.replace(batch, packing=None)
  leaves = cut(jax.tree.leaves(unpacked), num_slices, batch.unit_size)
  if not isinstance(batch.packing, Packing):
    return leaves
  *layout, slot = jax.tree.leaves(batch.packing)
  return [
    *leaves,
    *cut(layout, num_slices),
    cut(slot, num_slices, batch.unit_size),
  ]


def join(tree: Any, unit_size: int = 1) -> Any:
  """Undo `cut`."""

  def join_leaf(x: Any) -> Any:
    units = x.reshape(x.shape[0], -1, unit_size, *x.shape[2:])
    return units.swapaxes(0, 1).reshape(-1, *x.shape[2:])

  return jax.tree.map(join_leaf, tree)
