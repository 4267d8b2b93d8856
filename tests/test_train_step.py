"""One optimiser step: sums over micro-batches, figures, updates left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from postrain import losses, objectives, optimizers
from postrain.models.wrap import plain
from postrain.train_step import (
  accumulate,
  finish,
  make_train_step,
  merge,
  value,
)
from postrain.types import Batch, Max, Mean, Sum, TrainState

ROWS, LENGTH, VOCAB = 8, 4, 5
BIGRAM = plain(
  lambda key: {'table': jax.random.normal(key, (VOCAB, VOCAB))},
  lambda params, tokens, positions, ids: jax.nn.one_hot(tokens, VOCAB),
  lambda params, hidden: hidden @ params['table'],
  VOCAB,
)
OBJECTIVE = objectives.policy_gradient(BIGRAM, loss=losses.ppo_clip)
ADAM = optimizers.adamw(learning_rate=0.1)


def minibatch():
  draw = np.random.default_rng(0)
  mask = jnp.ones((ROWS, LENGTH), bool).at[:, 0].set(False)

  def noise():
    return jnp.asarray(draw.standard_normal(mask.shape), jnp.float32)

  return Batch(
    tokens=jnp.asarray(draw.integers(VOCAB, size=mask.shape), jnp.int32),
    valid=jnp.ones(mask.shape, bool),
    mask=mask,
    weights={'policy': mask.astype(float) / mask.sum().astype(float)},
    arrays={'old_logprobs': noise() - 2, 'advantages': noise()},
  )


def fresh(optimizer=ADAM):
  params = {'actor': BIGRAM.init(jax.random.key(0))}
  return TrainState(jnp.int32(3), params, optimizer.init(params))


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_a_step_of_gradient_descent():
  step = jax.jit(make_train_step(OBJECTIVE, optimizers.sgd(learning_rate=0.5)))
  state = fresh(optimizers.sgd(learning_rate=0.5))
  after, metrics = step(state, {}, minibatch())
  gradient = jax.grad(lambda p: OBJECTIVE(p, {}, minibatch())[0])(state.params)
  expected = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, gradient)
  np.testing.assert_allclose(
    after.params['actor']['table'], expected['actor']['table'], atol=1e-6
  )
  assert after.step == 4
  found = finish(metrics)
  assert found['skipped'] == 0
  assert found['gradient_norm'] == pytest.approx(
    float(optax.tree.norm(gradient)), rel=1e-5
  )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('num_micro_batches', [1, 4])
def test_a_gradient_that_is_not_finite_changes_no_bit(bad, num_micro_batches):
  """One bad number in one row, on the mask; the next step goes on."""
  step = jax.jit(
    make_train_step(OBJECTIVE, ADAM, num_micro_batches=num_micro_batches)
  )
  state, _ = step(fresh(), {}, minibatch())
  batch = minibatch()
  batch.arrays['advantages'] = batch.arrays['advantages'].at[5, 2].set(bad)
  after, metrics = step(state, {}, batch)
  assert bits(after.params) == bits(state.params)
  assert bits(after.opt_state) == bits(state.opt_state)
  assert after.step == state.step + 1
  assert finish(metrics)['skipped'] == 1
  healed, metrics = step(after, {}, minibatch())
  expected, _ = step(state, {}, minibatch())
  assert bits(healed.params) == bits(expected.params)
  assert bits(healed.params) != bits(state.params)
  assert finish(metrics)['skipped'] == 0


def test_bad_numbers_off_the_mask_do_not_skip():
  batch = minibatch()
  arrays = {k: v.at[:, 0].set(jnp.nan) for k, v in batch.arrays.items()}
  step = jax.jit(make_train_step(OBJECTIVE, ADAM))
  expected, _ = step(fresh(), {}, batch)
  found, metrics = step(fresh(), {}, dataclasses.replace(batch, arrays=arrays))
  assert finish(metrics)['skipped'] == 0
  assert bits(found) == bits(expected)


def counting(params, frozen, batch):
  """An objective with one figure of each kind."""
  del frozen
  figures = batch.arrays['figures']
  weight = params['actor']['weight']
  return jnp.sum(figures) * weight, {
    'mean': Mean(jnp.sum(figures), jnp.array(figures.size, float)),
    'ragged': Mean(
      jnp.sum(jnp.where(figures > 0, figures, 0)),
      jnp.sum(figures > 0, dtype=jnp.float32),
    ),
    'sum': Sum(jnp.sum(figures)),
    'max': Max(jnp.max(figures)),
  }


@pytest.mark.parametrize('num_micro_batches', [1, 2, 4, 8])
def test_figures_merge_by_their_own_rules(num_micro_batches):
  figures = np.random.default_rng(1).standard_normal((ROWS, LENGTH))
  batch = minibatch().replace(
    arrays={'figures': jnp.asarray(figures, 'float32')}
  )
  params = {'actor': {'weight': jnp.float32(2)}}
  gradient, metrics = accumulate(counting, params, {}, batch, num_micro_batches)
  found = finish(metrics)
  assert float(gradient['actor']['weight']) == pytest.approx(
    figures.sum(), rel=1e-5
  )
  assert found == {
    'mean': pytest.approx(figures.mean(), rel=1e-5),
    'ragged': pytest.approx(figures[figures > 0].mean(), rel=1e-5),
    'sum': pytest.approx(figures.sum(), rel=1e-5),
    'max': pytest.approx(figures.max(), rel=1e-6),
  }


def test_figures_of_steps_are_averages_but_for_the_maximum():
  """A sum over micro-batches belongs to its step: steps are averaged."""
  step = make_train_step(counting, optimizers.sgd(learning_rate=0.0))
  params = {'actor': {'weight': jnp.float32(2)}}
  state = TrainState(jnp.int32(0), params, optax.EmptyState())
  typed = []
  for scale in (1.0, 3.0):
    batch = dataclasses.replace(
      minibatch(), arrays={'figures': jnp.full((ROWS, 4), scale)}
    )
    state, metrics = step(state, {}, batch)
    typed.append(metrics)
  found = finish(merge(jax.tree.map(lambda *x: jnp.stack(x), *typed)))
  assert found['sum'] == 2 * 32
  assert found['mean'] == 2
  assert found['max'] == 3
  assert found['skipped'] == 0


def test_a_mean_of_nothing_is_zero():
  assert value(Mean(jnp.float32(0), jnp.float32(0))) == 0
  assert finish({'a': Mean(jnp.float32(3), jnp.float32(2))}) == {'a': 1.5}


def test_gradients_of_small_floats_are_summed_in_float32():
  """1 + 255 x 2^-9 is 1 in bfloat16, one after the other."""
  figures = jnp.full((256, 1), 2.0**-9).at[0].set(1)
  mask = jnp.ones(figures.shape, bool)
  batch = Batch(
    jnp.zeros(mask.shape, jnp.int32), mask, mask, {}, {'x': figures}
  )

  def objective(params, frozen, batch):
    weight = params['actor']['weight'].astype(jnp.float32)
    return jnp.sum(batch.arrays['x']) * weight, {}

  params = {'actor': {'weight': jnp.bfloat16(1)}}
  gradient, _ = accumulate(objective, params, {}, batch, 256)
  assert gradient['actor']['weight'].dtype == jnp.float32
  assert gradient['actor']['weight'] == 1 + 255 / 512
  optimizer = optimizers.sgd(learning_rate=0.5)
  state = TrainState(jnp.int32(0), params, optimizer.init(params))
  step = make_train_step(objective, optimizer, num_micro_batches=256)
  after, _ = step(state, {}, batch)
  assert after.params['actor']['weight'].dtype == jnp.bfloat16
  assert after.params['actor']['weight'] == 0.25


def test_micro_batches_must_divide_the_rows():
  step = make_train_step(OBJECTIVE, ADAM, num_micro_batches=3)
  with pytest.raises(ValueError, match='8 rows do not divide into 3 slices'):
    step(fresh(), {}, minibatch())


def test_m16_the_reference_stays_as_it_is():
  reference = {'table': jnp.ones((VOCAB, VOCAB))}
  state = dataclasses.replace(fresh(), ref_params=reference)
  after, _ = make_train_step(OBJECTIVE, ADAM)(state, {}, minibatch())
  assert bits(after.ref_params) == bits(reference)


def test_scales_and_biases_do_not_decay():
  """Weight decay alone: what has no gradient shrinks, or stays."""
  params = {
    'layers': {
      'query': jnp.ones((2, 3)),
      'query_bias': jnp.ones((2, 3)),
      'mlp_norm': jnp.ones((2, 3)),
    },
    'list': [jnp.ones(2)],
    'final_norm': jnp.ones(3),
  }
  optimizer = optimizers.adamw(learning_rate=0.5, weight_decay=0.1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  with jax.numpy_dtype_promotion('standard'):  # as in the train step
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  np.testing.assert_allclose(updates['layers']['query'], -0.05, rtol=1e-6)
  np.testing.assert_allclose(updates['list'][0], -0.05, rtol=1e-6)
  for still in (
    updates['layers']['query_bias'],
    updates['layers']['mlp_norm'],
    updates['final_norm'],
  ):
    np.testing.assert_array_equal(still, 0)


@pytest.mark.parametrize(
  ('schedule', 'expected'),
  [
    ('constant', [0, 0.5, 1, 1, 1, 1, 1]),
    ('linear', [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
    ('cosine', [0, 0.5, 1, 0.853553, 0.5, 0.146447, 0]),
  ],
)
def test_schedules(schedule, expected):
  rate = optimizers.learning_rate_schedule(1.0, schedule, 2, 6)
  with jax.numpy_dtype_promotion('standard'):  # as in the train step
    found = [float(rate(jnp.int32(i))) for i in range(7)]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_schedules_that_cannot_be():
  with pytest.raises(ValueError, match='one of constant, linear, cosine'):
    optimizers.learning_rate_schedule(1.0, 'step', 0, 6)
  with pytest.raises(ValueError, match='needs total_steps'):
    optimizers.learning_rate_schedule(1.0, 'cosine', 0, None)
  with pytest.raises(ValueError, match='leaves no step behind warmup_steps=6'):
    optimizers.learning_rate_schedule(1.0, 'linear', 6, 6)
  with pytest.raises(ValueError, match=r'learning_rate=-1\.0'):
    optimizers.learning_rate_schedule(-1.0, 'constant', 0, None)
