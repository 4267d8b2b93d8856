"""Statistics of the whole minibatch: in every layout they are the same.

Clip-Cov, KL-Cov and KTO on one minibatch, each with its pass before the cut.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_invariance import (
  MESHES,
  TOLERANCE,
  averages,
  distance,
  minibatch,
  packed,
  padding_columns,
  padding_rows,
  permuted,
)
import tiny

from postrain import aggregation, losses, masks, objectives, sharding
from postrain.batches import mismatched, reweigh, take, weigh_units
from postrain.couplings import with_array, with_reference_point, with_selection
from postrain.scoring import score
from postrain.train_step import accumulate, finish, make_train_step
from postrain.types import Batch, TrainState

quick_compiler = tiny.quick_compiler

MODEL = dataclasses.replace(
  averages('float32'), unembed=lambda params, h: h @ params['embedding'].T
)
PARAMS = {'actor': MODEL.init(jax.random.key(3))}
KEY = jax.random.key(7)
TOP = functools.partial(masks.top_covariance, fraction=0.2)
SOME = functools.partial(masks.covariance, fraction=0.3, low=-9.0, high=9.0)


@functools.cache
def both() -> tuple[Batch, Batch]:
  """A minibatch, and its prompts with completions of others."""
  draw = np.random.default_rng(5)
  batch = minibatch('float32')
  batch = with_array(batch, 'sequence_ids', jnp.arange(len(batch.mask)))
  batch = with_array(batch, 'desirable', jnp.arange(len(batch.mask)) % 3 == 0)
  other = mismatched(batch, prompt_length=4)
  ref = jnp.asarray(draw.standard_normal(other.mask.shape) - 4, jnp.float32)
  return batch, with_array(
    other, 'ref_logprobs', jnp.where(other.mask, ref, jnp.nan)
  )


def selections(params, batch, num_slices):
  add = functools.partial(
    with_selection, MODEL, params['actor'], batch, key=KEY, temperature=0.8,
    chunk_size=4, num_slices=num_slices,
  )  # fmt: skip
  return add(selection=TOP), add(selection=SOME)


def update(params, batch, other, num_micro_batches):
  """Gradients and metrics of KL-Cov, Clip-Cov and KTO."""
  top, some = selections(params, batch, num_micro_batches)
  trained = some.arrays['trained'] & some.arrays['selected']
  some = with_array(some, 'trained', trained)
  kto = with_reference_point(
    MODEL, params['actor'], batch, other, chunk_size=4,
    num_slices=num_micro_batches,
  )  # fmt: skip
  policy = functools.partial(
    objectives.policy_gradient, MODEL, temperature=0.8, chunk_size=4
  )
  weigh = functools.partial(reweigh, aggregation=aggregation.token_mean)
  return [
    accumulate(objective, params, {}, each, num_micro_batches)
    for objective, each in (
      (policy(loss=losses.kl_cov), weigh(top)),
      (policy(loss=losses.ppo_clip), weigh(some)),
      (objectives.unpaired(MODEL, loss=losses.kto), weigh_units(kto)),
    )
  ]


compiled = jax.jit(
  update,
  static_argnums=3,
  compiler_options={'xla_backend_optimization_level': 0},
)


@functools.cache
def expected():
  return compiled(PARAMS, *both(), 1)


def check(found):
  for (gradient, metrics), (wanted, figures) in zip(
    found, expected(), strict=True
  ):
    assert distance(gradient, wanted) < TOLERANCE['float32']
    metrics, figures = finish(metrics), finish(figures)
    assert metrics == pytest.approx(figures, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
  ('change', 'num_micro_batches'),
  [
    (lambda batch: batch, 4),
    (padding_rows, 1),
    (padding_columns, 1),
    (permuted, 2),
    (functools.partial(packed, num_slices=2), 2),
  ],
  ids=['4', 'padding rows', 'padding columns', 'permuted, 2', 'packed, 2'],
)
def test_layout_changes_no_statistic(change, num_micro_batches):
  check(compiled(PARAMS, *map(change, both()), num_micro_batches))


def test_devices_change_no_statistic():
  mesh = sharding.make_mesh(**MESHES['8 devices'])
  with sharding.on(mesh):
    batches = sharding.put_rows(mesh, both())
    check(compiled(PARAMS, *batches, 1))


def test_m73_m74_tokens_are_chosen_of_all_that_train():
  """By the oracles, from the log-probs of the current policy."""
  batch, _ = both()
  logprobs = score(
    MODEL, PARAMS['actor'], batch.tokens, batch.valid, batch.mask,
    temperature=0.8,
  ).logprobs  # fmt: skip
  arrays = [np.asarray(batch.arrays[k]) for k in ('old_logprobs', 'advantages')]
  trained = np.asarray(batch.arrays['trained'])
  logprobs = np.asarray(logprobs)
  top, some = jax.jit(selections, static_argnums=2)(PARAMS, batch, 1)
  np.testing.assert_array_equal(
    top.arrays['selected'],
    oracles.top_covariance(logprobs, arrays[1], trained, fraction=0.2),
  )
  np.testing.assert_array_equal(
    some.arrays['selected'],
    oracles.covariance(
      logprobs, *arrays, trained, KEY, fraction=0.3, low=-9.0, high=9.0
    ),
  )


def test_m24_the_reference_point_is_of_all_completions_of_others():
  batch, other = both()
  own = score(
    MODEL, PARAMS['actor'], other.tokens, other.valid, other.mask
  ).logprobs  # fmt: skip
  gaps = np.where(other.mask, own - other.arrays['ref_logprobs'], 0).sum(-1)
  full = np.asarray(other.mask).any(-1)
  point = with_reference_point(MODEL, PARAMS['actor'], batch, other)
  np.testing.assert_allclose(
    point.arrays['reference_point'], gaps[full].mean(), rtol=1e-5
  )
  assert gaps[full].mean() > 0
  np.testing.assert_array_equal(other.tokens[:, :4], batch.tokens[:, :4])
  np.testing.assert_array_equal(
    other.tokens[:, 4:], jnp.roll(batch.tokens[:, 4:], -1, axis=0)
  )
  one = take(batch, jnp.arange(1)), take(other, jnp.arange(1))
  with pytest.raises(ValueError, match='1 examples have no mismatched'):
    with_reference_point(MODEL, PARAMS['actor'], *one)


def test_m24_kto_tells_good_completions_from_bad():
  """From the reference, with one good completion among three."""
  batch, other = both()

  def at_reference(batch):
    scores = score(
      MODEL, PARAMS['actor'], batch.tokens, batch.valid, batch.mask
    )
    return with_array(batch, 'ref_logprobs', scores.logprobs)

  batch, other = at_reference(batch), at_reference(other)
  optimizer = optax.adam(0.05)
  step = make_train_step(
    objectives.unpaired(MODEL, loss=losses.kto), optimizer, num_micro_batches=2
  )

  @jax.jit
  def advance(state, batch, other):
    batch = with_reference_point(MODEL, state.params['actor'], batch, other)
    return step(state, {}, weigh_units(batch))

  state = TrainState(jnp.int32(0), PARAMS, optimizer.init(PARAMS))
  found = []
  # How soon the last of the seven is told depends on rounding.
  for _ in range(50):
    state, metrics = advance(state, batch, other)
    found.append(finish(metrics))
  assert found[0]['loss'] == pytest.approx(0.5)
  assert found[-1]['loss'] < 0.2
  assert found[-1]['preference/accuracy'] > 0.9
