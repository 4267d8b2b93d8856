"""From rollouts to minibatches: advantages, weights, layouts, cuts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import advantages, aggregation, importance
from postrain.batches import (
  assemble,
  call_by_name,
  check_packing,
  cut,
  cut_batch,
  join,
  minibatch_rows,
  pack,
  reweigh,
  take,
)
from postrain.types import Rollout

ROWS, LENGTH = 6, 5
MASK = np.array(
  [
    [0, 0, 1, 1, 1],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 1, 1, 1],
    [0, 0, 0, 0, 0],
    [0, 0, 1, 1, 0],
  ],
  bool,
)
REWARDS = np.array([[1.0, 0, 0.5], [0, 0, 2]])


def rollout():
  mask = jnp.asarray(MASK)
  ids = jnp.zeros(MASK.shape, jnp.int32)
  draw = np.random.default_rng(0)
  return Rollout(
    tokens=jnp.asarray(draw.integers(9, size=MASK.shape), jnp.int32),
    valid=mask.at[:, :2].set(True),
    mask=mask,
    rewards=jnp.asarray(REWARDS, jnp.float32),
    truncated=jnp.asarray([True, False, False, True, False, False]),
    version=ids,
    turn_ids=ids,
    arrays={
      name: jnp.asarray(draw.standard_normal(MASK.shape), jnp.float32)
      for name in ('old_logprobs', 'sampler_logprobs')
    },
  )


def test_each_token_has_the_advantage_of_its_sequence():
  batch = assemble(rollout(), advantage=advantages.group_centered)
  expected = (REWARDS - REWARDS.mean(1, keepdims=True)).reshape(-1, 1) * MASK
  np.testing.assert_allclose(batch.arrays['advantages'], expected, atol=1e-6)
  np.testing.assert_array_equal(batch.arrays['groups'], [0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(batch.arrays['trained'], MASK)
  np.testing.assert_array_equal(batch.arrays['counted'], MASK)


def test_advantages_along_tokens_see_the_reward_on_the_last_token():
  batch = assemble(rollout(), advantage=advantages.discounted_returns)
  expected = np.where(MASK, REWARDS.reshape(-1, 1), 0)
  np.testing.assert_allclose(batch.arrays['advantages'], expected, atol=1e-6)
  discounted = functools.partial(advantages.discounted_returns, discount=0.5)
  batch = assemble(rollout(), advantage=discounted)
  left = np.cumsum(MASK[:, ::-1], axis=1)[:, ::-1] - 1
  np.testing.assert_allclose(
    batch.arrays['advantages'], expected * 0.5 ** np.maximum(left, 0), atol=1e-6
  )


def test_advantages_may_ask_for_lengths_and_sequence_logprobs():
  batch = assemble(rollout(), advantage=advantages.optimal_baseline)
  lengths = MASK.sum(1).reshape(REWARDS.shape)
  means = (lengths * REWARDS).sum(1) / lengths.sum(1)
  expected = (REWARDS - means[:, None]).reshape(-1, 1) * MASK
  np.testing.assert_allclose(batch.arrays['advantages'], expected, atol=1e-6)
  smoothing = functools.partial(
    advantages.differential_smoothing, positive_coef=0.1, negative_coef=0.1
  )
  values = assemble(rollout(), advantage=smoothing).arrays['advantages']
  plain = assemble(rollout(), advantage=advantages.group_normalized)
  assert np.any(np.asarray(values) != np.asarray(plain.arrays['advantages']))


def kept_rows(*rows):
  return jnp.isin(jnp.arange(ROWS), jnp.array(rows))[:, None]


def test_what_trains_and_what_counts_are_two_masks():
  """A dropped row leaves the denominator, unless it is counted."""
  trained = rollout().mask & kept_rows(1, 2, 4, 5)
  build = functools.partial(
    assemble, rollout(), advantage=advantages.group_centered, trained=trained
  )
  only = reweigh(build(), aggregation=aggregation.token_mean).weights
  tokens = MASK[[1, 2, 5]].sum()
  trained = np.asarray(trained)
  np.testing.assert_allclose(only['policy'], trained / tokens, rtol=1e-6)
  counted = reweigh(
    build(counted=rollout().mask), aggregation=aggregation.token_mean
  ).weights
  np.testing.assert_allclose(counted['policy'], trained / MASK.sum(), rtol=1e-6)
  for weights in (only, counted):  # the other terms act on all tokens
    for term in ('entropy', 'value', 'kl'):
      np.testing.assert_allclose(weights[term], MASK / MASK.sum(), rtol=1e-6)


def test_tokens_that_count_need_not_train_and_masks_stay_inside_the_mask():
  everything = jnp.ones(MASK.shape, bool)
  batch = assemble(
    rollout(),
    advantage=advantages.group_centered,
    trained=everything,
    counted=everything,
  )
  np.testing.assert_array_equal(batch.arrays['trained'], MASK)
  np.testing.assert_array_equal(batch.arrays['counted'], MASK)


def test_kl_has_an_aggregation_of_its_own():
  batch = assemble(rollout(), advantage=advantages.group_centered)
  weights = reweigh(
    batch,
    aggregation=aggregation.token_mean,
    kl_aggregation=aggregation.sequence_sum,
  ).weights
  np.testing.assert_allclose(weights['kl'], MASK / 5, rtol=1e-6)
  np.testing.assert_allclose(weights['policy'], MASK / MASK.sum(), rtol=1e-6)


def test_a_correction_weighs_tokens_and_leaves_the_denominator():
  batch = assemble(rollout(), advantage=advantages.group_centered)
  arrays = batch.arrays
  weights = reweigh(
    batch,
    aggregation=aggregation.token_mean,
    correction=functools.partial(importance.truncated, cap=1.5),
  ).weights
  ratio = np.exp(arrays['old_logprobs'] - arrays['sampler_logprobs'])
  expected = MASK / MASK.sum() * np.minimum(ratio, 1.5)
  np.testing.assert_allclose(weights['policy'], expected, rtol=1e-5)
  np.testing.assert_allclose(weights['kl'], MASK / MASK.sum(), rtol=1e-6)


def test_weights_are_those_of_the_minibatch():
  """Half of a batch is normalised by what that half holds."""
  batch = assemble(rollout(), advantage=advantages.group_centered)
  rows = jnp.array([5, 0, 3])
  part = take(batch, rows)
  np.testing.assert_array_equal(part.tokens, batch.tokens[rows])
  np.testing.assert_array_equal(part.arrays['groups'], [1, 0, 1])
  weights = reweigh(part, aggregation=aggregation.group_token_mean).weights
  expected = MASK[[5, 0, 3]] / np.array([[5], [3], [5]]) / 2
  np.testing.assert_allclose(weights['policy'], expected, rtol=1e-6)


def test_arrays_are_passed_by_name():
  def fn(mask, logprobs, groups=None, *, scale=2):
    return mask, logprobs, groups, scale

  arrays = {'logprobs': 1, 'mask': 2, 'other': 3}
  assert call_by_name(fn, arrays) == (2, 1, None, 2)
  bound = functools.partial(fn, scale=5)
  assert call_by_name(bound, arrays | {'groups': 4}) == (2, 1, 4, 5)
  with pytest.raises(ValueError, match=r'fn asks for logprobs;.* has: mask$'):
    call_by_name(bound, {'mask': 2, 'logprobs': None})


@pytest.mark.parametrize('unit_size', [1, 2, 3])
def test_minibatches_are_a_partition_of_whole_units(unit_size):
  rows = minibatch_rows(jax.random.key(0), 12, 2, unit_size=unit_size)
  assert rows.shape == (2, 6)
  np.testing.assert_array_equal(np.sort(rows.ravel()), np.arange(12))
  units = np.asarray(rows).reshape(-1, unit_size)
  np.testing.assert_array_equal(
    units - units[:, :1], [range(unit_size)] * len(units)
  )
  assert (units[:, 0] % unit_size == 0).all()
  other = minibatch_rows(jax.random.key(1), 12, 2, unit_size=unit_size)
  assert not np.array_equal(rows, other)


def test_one_minibatch_keeps_the_order():
  rows = minibatch_rows(jax.random.key(0), 6, 1, unit_size=2)
  np.testing.assert_array_equal(rows, [range(6)])


def test_minibatches_must_divide_the_units():
  with pytest.raises(ValueError, match='3'):
    minibatch_rows(jax.random.key(0), 8, 3, unit_size=1)


@pytest.mark.parametrize('unit_size', [1, 2])
def test_join_undoes_cut(unit_size):
  tree = {'a': jnp.arange(24).reshape(12, 2), 'b': np.arange(12)}
  pieces = cut(tree, 3, unit_size)
  assert pieces['a'].shape == (3, 4, 2)
  units = np.arange(12).reshape(-1, unit_size)
  np.testing.assert_array_equal(pieces['b'][1], units[1::3].ravel())
  joined = join(pieces, unit_size)
  for name, leaf in tree.items():
    np.testing.assert_array_equal(joined[name], leaf)


def test_a_unit_is_never_cut():
  with pytest.raises(ValueError, match='12 rows do not divide into 4 slices'):
    cut(jnp.zeros(12), 4, 2)


@pytest.mark.parametrize(
  ('num_slices', 'unit_size'), [(1, 1), (3, 1), (2, 3), (3, 2)]
)
def test_packing_holds_every_token_once(num_slices, unit_size):
  valid = np.asarray(rollout().valid)
  tokens = np.arange(valid.size).reshape(valid.shape)
  packing = pack(valid, width=8, num_slices=num_slices, unit_size=unit_size)
  layout = [
    cut(x, num_slices)
    for x in (packing.source, packing.segment_ids, packing.positions)
  ]
  pieces = (
    *(cut(x, num_slices, unit_size) for x in (tokens, valid, packing.slot)),
    *layout,
  )
  for own, real, slot, source, segments, positions in zip(*pieces, strict=True):
    rows = own.reshape(-1)[source]
    found = rows.reshape(-1)[slot]
    np.testing.assert_array_equal(found[real], own[real])
    assert (segments > 0).sum() == real.sum()
    assert len(set(slot[real].tolist())) == real.sum()
    for b in range(len(own)):  # one segment, in order, without a gap
      at = slot[b][real[b]]
      assert len(set(segments.reshape(-1)[at].tolist())) <= 1
      np.testing.assert_array_equal(
        positions.reshape(-1)[at], np.arange(real[b].sum())
      )
      np.testing.assert_array_equal(np.diff(at), 1)


def test_packing_saves_rows():
  lengths = np.array([4, 3, 1, 2, 4, 2])
  valid = np.arange(4)[None] < lengths[:, None]
  assert pack(valid, width=4).source.shape == (4, 4)
  assert pack(valid, width=4, num_rows=6).source.shape == (6, 4)


def test_packing_says_what_does_not_fit():
  valid = np.ones((4, 6), bool)
  with pytest.raises(ValueError, match='a sequence of 6 tokens, rows of 5'):
    pack(valid, width=5)
  with pytest.raises(ValueError, match='4 rows are needed, num_rows=3'):
    pack(valid, width=6, num_rows=3)


def test_packing_for_other_slices_is_refused():
  packing = pack(np.ones((4, 6), bool), width=6, num_slices=2)
  check_packing(packing, 2, 1)
  for num_slices, unit_size in ((1, 1), (4, 1), (2, 2)):
    with pytest.raises(ValueError, match=r'num_slices=2.*pack the batch again'):
      check_packing(packing, num_slices, unit_size)


def test_a_cut_batch_has_its_leaves_in_their_order():
  batch = assemble(rollout(), advantage=advantages.group_centered)
  batch = reweigh(batch, aggregation=aggregation.token_mean)
  structure = jax.tree.structure(batch)
  leaves = cut_batch(batch, 2)
  first = jax.tree.unflatten(structure, [x[0] for x in leaves])
  expected = take(batch, jnp.array([0, 2, 4]))
  for a, b in zip(
    jax.tree.leaves(first), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(a, b)
