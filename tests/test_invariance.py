"""One update, laid out in many ways: the gradient must not notice.

The normaliser is a weight array, so the gradient of a minibatch may depend
neither on micro-batches, padding, the order of its units, packing nor devices.
All policy losses, KL estimators and value losses share one compiled function
per layout: `jax.lax.switch` picks among them, and aggregations are weights.
"""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import aggregation, kl, losses, objectives, sharding
from postrain.batches import pack, reweigh, take
from postrain.binding import bind
from postrain.models.heads import scalar_head
from postrain.models.transformer import Config, transformer
from postrain.models.wrap import plain
from postrain.scoring import score
from postrain.train_step import accumulate, finish
from postrain.types import Batch, SharedPrompts

ROWS, LENGTH, VOCAB = 8, 10, 11
QUICKLY = {'xla_backend_optimization_level': 0}  # for the compiler
TOLERANCE = {'float32': 2e-5, 'float64': 1e-10}
NEEDED = {  # required hyperparameters
  'constant_length': {'length': 7.0},
  'dro': {'kl_coef': 0.2},
  'mirror_descent': {'kl_coef': 0.2},
}
KNOWN = (
  *('advantages', 'groups', 'logprobs', 'mask', 'old_logprobs', 'old_values'),
  *('ref_logprobs', 'returns', 'sampler_logprobs', 'selected', 'values'),
)


def inputs(fn):
  """Arrays that a function asks for, required ones first."""
  kinds = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
  )
  parameters = inspect.signature(fn).parameters.values()
  return {p.name: p.default for p in parameters if p.kind in kinds}


def walk(module, *asked):
  """Names of the module whose functions ask for these arrays among KNOWN."""
  found = []
  for name in module.__all__:
    names = inputs(getattr(module, name))
    needed = {k for k, v in names.items() if v is inspect.Parameter.empty}
    if needed >= set(asked) and needed <= set(KNOWN):
      found.append(name)
  return found


POLICY = walk(losses, 'logprobs', 'advantages')
VALUE = walk(losses, 'values', 'returns')
KL = walk(kl, 'logprobs', 'ref_logprobs')
AGGREGATIONS = list(aggregation.__all__)


def test_the_walk_finds_what_the_modules_have():
  assert {'reinforce', 'ppo_clip', 'gspo', 'gspo_token', 'cispo'} <= set(POLICY)
  assert {'squared_error', 'clipped_squared_error'} <= set(VALUE)
  assert {'k1', 'k2', 'k3', 'absolute'} <= set(KL)
  assert len(AGGREGATIONS) >= 5


def bound(module, name):
  return bind(module, {'name': name, **NEEDED.get(name, {})})


def switch(module, names, index):
  """The one of ``names`` at a traced index, as a loss or estimator."""
  asked = {n: list(inputs(getattr(module, n))) for n in names}
  wanted = sorted(set().union(*asked.values()))

  def branch(name):
    def call(arrays):
      out = bound(module, name)(*(arrays[k] for k in asked[name]))
      return out[0] if isinstance(out, tuple) else out

    return call

  def chosen(*arrays):
    arrays = dict(zip(wanted, arrays, strict=True))
    values = jax.lax.switch(index, [branch(n) for n in names], arrays)
    return values if module is kl else (values, {'loss': values})

  kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
  chosen.__signature__ = inspect.Signature(
    [inspect.Parameter(k, kind) for k in wanted]
  )
  return chosen


def averages(dtype):
  """A backbone that compiles fast: means over the tokens of the segment."""

  def init(key):
    return {'embedding': jax.random.normal(key, (VOCAB, 8), dtype)}

  def hidden(params, tokens, positions, segment_ids):
    real = segment_ids > 0
    x = params['embedding'].at[tokens].get(mode='fill', fill_value=0)
    x = jnp.where(real[..., None], x, 0)
    x = x * jnp.cos(positions.astype(dtype))[..., None]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = jnp.tril(same & real[:, None, :]).astype(dtype)
    return jnp.einsum('bmn,bnd->bmd', seen, x) / (
      1 + jnp.sum(seen, -1, keepdims=True)
    )

  return plain(init, hidden, lambda params, h: h, VOCAB)


@functools.cache
def networks(dtype):
  model = transformer(
    Config(
      vocab_size=VOCAB,
      num_layers=1,
      model_dim=16,
      mlp_dim=16,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      max_length=32,
      dtype=dtype,
      param_dtype=dtype,
    )
  )
  critic = scalar_head(averages(dtype))
  params = {
    'actor': jax.jit(model.init)(jax.random.key(0)),
    'critic': critic.init(jax.random.key(1)),
  }
  draw = np.random.default_rng(0)
  noisy = jax.tree.map(
    lambda x: x + jnp.asarray(0.3 * draw.standard_normal(x.shape), dtype),
    params,
  )
  return model, critic, noisy


@functools.cache
def minibatch(dtype):
  """Left-padded prompts, completions of unequal length, one of them empty.

  The policies differ enough that every clip of every loss takes some token.
  """
  draw = np.random.default_rng(1)
  slots = np.arange(LENGTH)[None]
  starts = np.array([0, 0, 2, 2, 3, 3, 1, 1])[:, None]
  stops = np.array([10, 7, 9, 5, 6, 10, 4, 8])[:, None]
  valid = (slots >= starts) & (slots < stops)
  mask = valid & (slots >= 4)
  tokens = draw.integers(VOCAB, size=(ROWS, LENGTH))
  tokens[1::2, :4] = tokens[::2, :4]  # two rows of a prompt
  tokens = jnp.asarray(tokens, jnp.int32)
  valid, mask = jnp.asarray(valid), jnp.asarray(mask)
  model, _, params = networks(dtype)
  logprobs = score(model, params['actor'], tokens, valid, mask).logprobs

  def noise(scale):
    return jnp.asarray(scale * draw.standard_normal(mask.shape), dtype)

  trained = mask & jnp.asarray(np.arange(ROWS) != 2)[:, None]
  arrays = {
    'old_logprobs': logprobs + noise(0.3),
    'ref_logprobs': logprobs + noise(0.5),
    'sampler_logprobs': logprobs + noise(0.1),
    'advantages': noise(1.0),
    'old_values': noise(0.5),
    'returns': noise(1.0),
    'groups': jnp.arange(ROWS) // 4,
    'trained': trained,
    'counted': mask,
    'selected': mask & jnp.asarray(draw.random(mask.shape) < 0.5),
  }
  # What stands off the mask must not matter.
  arrays |= {
    k: jnp.where(mask, v, jnp.nan)
    for k, v in arrays.items()
    if v.dtype == dtype
  }
  return Batch(tokens, valid, mask, {}, arrays)


def weighted(batch, number):
  """Each term under an aggregation of its own: number, number + 1, ..."""
  names = np.roll(AGGREGATIONS, -number).tolist()
  each = [
    reweigh(batch, aggregation=bound(aggregation, n)).weights for n in names
  ]
  terms = ('policy', 'kl', 'entropy', 'value')
  weights = {k: each[i % len(each)][k] for i, k in enumerate(terms)}
  return dataclasses.replace(batch, weights=weights)


def gradient(dtype, params, batch, choice, num_micro_batches):
  """Gradient and metrics; ``choice`` holds the numbers of the losses."""
  model, critic, _ = networks(dtype)
  objective = objectives.policy_gradient(
    model,
    loss=switch(losses, POLICY, choice[0]),
    kl=switch(kl, KL, choice[1]),
    kl_coef=0.3,
    entropy_coef=0.1,
    value_loss=switch(losses, VALUE, choice[2]),
    value_coef=0.5,
    critic=critic,
    temperature=0.8,
    chunk_size=4,
  )
  return accumulate(objective, params, {}, batch, num_micro_batches)


compiled = jax.jit(
  gradient,
  static_argnums=(0, 4),
  compiler_options=QUICKLY,
)


def choices(loss, number):
  """Every estimator and every value loss meets some policy loss."""
  index = POLICY.index(loss) + number
  return jnp.array(
    [POLICY.index(loss), index % len(KL), index % len(VALUE)], jnp.int32
  )


@functools.cache
def expected(dtype, loss, number):
  *_, params = networks(dtype)
  batch = weighted(minibatch(dtype), number)
  return compiled(dtype, params, batch, choices(loss, number), 1)


def check(dtype, loss, number, found):
  wanted, figures = expected(dtype, loss, number)
  assert distance(found[0], wanted) < TOLERANCE[dtype]
  figures, metrics = finish(figures), finish(found[1])
  assert metrics.keys() == figures.keys()
  for name, figure in figures.items():
    assert metrics[name] == pytest.approx(
      figure, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype]
    ), name


def distance(found, wanted):
  """Norm of the difference over the norm."""

  def norm(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.linalg.norm(np.concatenate(leaves))

  found, wanted = jax.device_get((found, wanted))
  return norm(jax.tree.map(np.subtract, found, wanted)) / norm(wanted)


# Layouts change a batch that has no weights yet.


def filling(x):
  """What padding holds: no token, some id, and figures that would show."""
  if x.dtype == bool:
    return False
  return 7 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.nan


def padding_rows(batch):
  """Four rows without a token among the others, a group of their own."""

  def extend(x):
    blank = jnp.full((4, *x.shape[1:]), filling(x), x.dtype)
    return jnp.concatenate([x[:3], blank, x[3:]])

  return jax.tree.map(extend, batch)


def padding_columns(batch):
  """Three columns on the left and two on the right."""

  def extend(x):
    widths = ((0, 0), (3, 2))[: x.ndim]
    return x if x.ndim == 1 else jnp.pad(x, widths, constant_values=filling(x))

  return jax.tree.map(extend, batch)


def permuted(batch):
  return take(batch, jnp.array([5, 2, 7, 0, 1, 6, 4, 3]))


def packed(batch, num_slices):
  packing = pack(np.asarray(batch.valid), width=12, num_slices=num_slices)
  assert packing.source.size < batch.tokens.size
  return dataclasses.replace(batch, packing=packing)


def shared(batch):
  layout = SharedPrompts(length=4, num_samples=2)
  return dataclasses.replace(batch, packing=layout, unit_size=2)


LAYOUTS = {  # change of the batch, number of micro-batches
  'micro-batches 2': (lambda batch: batch, 2),
  'micro-batches 4': (lambda batch: batch, 4),
  'micro-batches 8': (lambda batch: batch, 8),
  'padding rows': (padding_rows, 1),
  'padding columns': (padding_columns, 1),
  'permuted': (permuted, 1),
  'permuted, micro-batches 2': (permuted, 2),
  'shared prompts': (shared, 1),
  'shared prompts, micro-batches 2': (shared, 2),
  'packed': (functools.partial(packed, num_slices=1), 1),
  'packed, micro-batches 2': (functools.partial(packed, num_slices=2), 2),
}
MESHES = {
  '1 device': {},
  '2 devices': {'data': 2},
  '4 devices': {'fsdp': 4},
  '8 devices': {'data': 2, 'fsdp': 2, 'tensor': 2},
}
each_choice = pytest.mark.parametrize(
  ('loss', 'number'), list(itertools.product(POLICY, range(len(AGGREGATIONS))))
)


@functools.cache
def laid_out(dtype, layout, number):
  change, num_micro_batches = LAYOUTS[layout]
  return weighted(change(minibatch(dtype)), number), num_micro_batches


def update(dtype, layout, loss, number):
  *_, params = networks(dtype)
  batch, num_micro_batches = laid_out(dtype, layout, number)
  return compiled(
    dtype, params, batch, choices(loss, number), num_micro_batches
  )


@pytest.mark.parametrize('layout', LAYOUTS)
@each_choice
def test_layout_changes_nothing(layout, loss, number):
  found = update('float32', layout, loss, number)
  check('float32', loss, number, found)


@functools.cache
def placed(devices, number):
  model, critic, params = networks('float32')
  mesh = sharding.make_mesh(**MESHES[devices])
  shardings = {
    'actor': sharding.param_shardings(mesh, model),
    'critic': sharding.param_shardings(mesh, critic),
  }
  batch = weighted(minibatch('float32'), number)
  return (
    mesh, jax.device_put(params, shardings), sharding.put_rows(mesh, batch)
  )  # fmt: skip


@pytest.mark.parametrize('devices', MESHES)
@each_choice
def test_devices_change_nothing(devices, loss, number):
  mesh, params, batch = placed(devices, number)
  with sharding.on(mesh):
    found = compiled('float32', params, batch, choices(loss, number), 1)
  check('float32', loss, number, found)


@pytest.mark.parametrize(
  'layout',
  [
    'padding columns',
    'packed, micro-batches 2',
    *(pytest.param(k, marks=pytest.mark.slow) for k in LAYOUTS),
  ],
)
@each_choice
def test_in_float64_it_is_exact(layout, loss, number):
  with jax.enable_x64(True):
    found = update('float64', layout, loss, number)
    check('float64', loss, number, found)


# Pairs are units of two rows; imitation is cut by the same units.


def pairs(dtype, change=lambda batch: batch):
  """Units in order: chosen row, rejected row; each pair its own weight."""
  batch = minibatch(dtype)
  arrays = {'ref_logprobs': batch.arrays['ref_logprobs']}
  weights = jnp.repeat(jnp.array([0.5, 1.0, 0.25, 2.0], dtype), 2)
  batch = dataclasses.replace(
    batch, arrays=arrays, unit_size=2, weights={'preference': weights}
  )
  batch = change(batch)
  tokens = aggregation.token_mean(batch.mask)
  return dataclasses.replace(batch, weights=batch.weights | {'policy': tokens})


def padding_pairs(batch):
  def extend(x):
    blank = jnp.full((4, *x.shape[1:]), filling(x), x.dtype)
    return jnp.concatenate([x[:2], blank, x[2:]])

  batch = jax.tree.map(extend, batch)
  weights = {k: jnp.nan_to_num(w, nan=0) for k, w in batch.weights.items()}
  return dataclasses.replace(batch, weights=weights)


def permuted_pairs(batch):
  return take(batch, jnp.array([4, 5, 0, 1, 6, 7, 2, 3]))


def packed_pairs(batch):
  valid = np.asarray(batch.valid)
  packing = pack(valid, width=12, num_slices=2, unit_size=2)
  return dataclasses.replace(batch, packing=packing)


def imitation(dtype, params, batch, num_micro_batches):
  """Gradients and metrics of DPO and of supervised fine-tuning."""
  model, *_ = networks(dtype)
  params = {'actor': params['actor']}
  preference = objectives.preference(model, loss=losses.dpo, chunk_size=4)
  supervised = objectives.supervised(
    model, loss=losses.negative_log_likelihood, chunk_size=4
  )
  return [
    accumulate(objective, params, {}, batch, num_micro_batches)
    for objective in (preference, supervised)
  ]


compiled_imitation = jax.jit(
  imitation, static_argnums=(0, 3), compiler_options=QUICKLY
)


@pytest.mark.parametrize(
  ('change', 'num_micro_batches'),
  [
    (permuted_pairs, 1),
    (lambda batch: batch, 2),
    (lambda batch: batch, 4),
    (padding_pairs, 3),
    (padding_columns, 1),
    (packed_pairs, 2),
  ],
  ids=['permuted', '2', '4', 'padding rows, 3', 'padding columns', 'packed, 2'],
)
def test_layout_changes_neither_pairs_nor_imitation(change, num_micro_batches):
  *_, params = networks('float32')
  wanted = compiled_imitation('float32', params, pairs('float32'), 1)
  found = compiled_imitation(
    'float32', params, pairs('float32', change), num_micro_batches
  )
  for (gradient, metrics), (expected, figures) in zip(
    found, wanted, strict=True
  ):
    assert distance(gradient, expected) < TOLERANCE['float32']
    assert finish(metrics)['loss'] == pytest.approx(
      finish(figures)['loss'], rel=1e-5
    )
