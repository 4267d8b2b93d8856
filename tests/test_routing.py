"""Routing that one pass records and another replays; the load of experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_invariance import (
  TOLERANCE,
  distance,
  filling,
  packed,
  padding_rows,
  permuted,
)
import tiny

from postrain import aggregation, device_loop, losses, objectives, sharding
from postrain.batches import reweigh
from postrain.couplings import with_array, with_expert_shares
from postrain.models import moe
from postrain.models.transformer import Config, transformer
from postrain.rollouts import select_groups
from postrain.sampling import sample
from postrain.scoring import rerouted, routed_states, score, selected
from postrain.tasks.mixture import mixture_policy, with_router_noise
from postrain.train_step import accumulate, finish
from postrain.types import Batch, Model, Prompts, Samples

quick_compiler = tiny.quick_compiler

# So many experts that the dense form is taken, which compiles fastest.
VOCAB, PAD, STOP, LAYERS, EXPERTS, VISITED = 13, 0, 10, 2, 16, 2
ROWS, LENGTH = 8, 10


@functools.cache
def mixture():
  model = transformer(
    Config(
      vocab_size=VOCAB, num_layers=LAYERS, model_dim=8, mlp_dim=8, num_heads=1,
      num_kv_heads=1, head_dim=8, max_length=32, num_experts=EXPERTS,
      experts_per_token=VISITED,
    )
  )  # fmt: skip
  params = jax.jit(model.init)(jax.random.key(0))
  draw = np.random.default_rng(1)  # initial logits are close to uniform
  return model, jax.tree.map(
    lambda x: x + 0.3 * jnp.asarray(draw.standard_normal(x.shape), x.dtype),
    params,
  )


@functools.cache
def averages():
  """Two layers of experts on means over the past: it compiles fast."""

  def init(key):
    shapes = {
      'embedding': (VOCAB, 8), 'router': (LAYERS, 8, EXPERTS),
      'gate': (LAYERS, EXPERTS, 8, 8), 'up': (LAYERS, EXPERTS, 8, 8),
      'down': (LAYERS, EXPERTS, 8, 8),
    }  # fmt: skip
    return {
      name: 0.7 * jax.random.normal(jax.random.fold_in(key, i), shape)
      for i, (name, shape) in enumerate(shapes.items())
    }

  def internals(
    params, tokens, *, positions, segment_ids, cache=None, capture=(),
    experts=None,
  ):  # fmt: skip
    del positions, cache, capture
    real = (segment_ids > 0)[..., None]
    x = params['embedding'].at[tokens].get(mode='fill', fill_value=0)
    same = segment_ids[:, :, None] == segment_ids[:, None]
    seen = jnp.tril(same).astype(x.dtype)
    x = seen / seen.sum(-1, keepdims=True) @ jnp.where(real, x, 0)
    flat, routings = x.reshape(-1, 8), []
    for layer in range(LAYERS):
      weights = {k: v[layer] for k, v in params.items() if k != 'embedding'}
      given = None if experts is None else experts[:, :, layer]
      routing = moe.route(
        flat @ weights.pop('router'), num_selected=VISITED, normalize=True,
        experts=None if given is None else given.reshape(-1, VISITED),
      )  # fmt: skip
      flat += moe.dense_mlp(
        flat, routing.experts, routing.gates, **weights, activation=jnp.tanh
      )
      routings.append(routing)
    lead = tokens.shape
    each = [r.experts.reshape(*lead, -1) for r in routings]
    logits = [r.logits.reshape(*lead, -1) for r in routings]
    found = {'experts': jnp.stack(each, 2), 'router_logits': jnp.stack(logits)}
    return flat.reshape(x.shape), None, found

  model = Model(
    init=init,
    hidden=lambda *args, **kwargs: internals(*args, **kwargs)[:2],
    unembed=lambda params, h: h @ params['embedding'].T,
    empty_cache=lambda *args: None,
    vocab_size=VOCAB,
    internals=internals,
    num_experts=EXPERTS,
  )
  return model, model.init(jax.random.key(4))


@functools.cache
def minibatch():
  draw = np.random.default_rng(2)
  slots = np.arange(LENGTH)[None]
  starts = np.array([0, 2, 1, 3, 0, 2, 2, 1])[:, None]
  stops = np.array([10, 7, 9, 5, 6, 10, 8, 8])[:, None]
  valid = jnp.asarray((slots >= starts) & (slots < stops))
  mask = valid & jnp.asarray(slots >= 4)
  tokens = jnp.asarray(draw.integers(VOCAB, size=mask.shape), jnp.int32)
  model, params = mixture()
  logprobs = scored(model, params, tokens, valid, mask).logprobs
  noise = jnp.asarray(draw.standard_normal((2, *mask.shape)), jnp.float32)
  arrays = {
    'old_logprobs': logprobs + 0.1 * noise[0],
    'advantages': noise[1],
    'groups': jnp.arange(ROWS) // 4,
    'trained': mask,
    'counted': mask,
  }
  return Batch(tokens, valid, mask, {}, arrays)


@functools.cache
def elsewhere():
  """Experts that routers would not select, known for most tokens."""
  draw = np.random.default_rng(3)
  shape = (ROWS, LENGTH, LAYERS)
  experts = draw.random((*shape, EXPERTS)).argsort(-1)[..., :VISITED]
  experts[draw.random((ROWS, LENGTH)) < 0.2] = -1
  return jnp.asarray(experts, jnp.int32)


scored = jax.jit(
  score, static_argnums=0, static_argnames=('num_slices', 'record_routing')
)


def inputs(network=mixture):
  batch = minibatch()
  return *network(), batch.tokens, batch.valid, batch.mask


def test_m69_replay_of_the_natural_routing_is_the_unforced_forward():
  """Bit for bit, values and gradients."""
  scores = scored(*inputs(), record_routing=True)
  np.testing.assert_array_equal(
    scores.experts >= 0,
    jnp.broadcast_to(minibatch().valid[..., None, None], scores.experts.shape),
  )
  again = scored(*inputs(), experts=scores.experts, record_routing=True)
  jax.tree.map(np.testing.assert_array_equal, again, scores)
  unforced = gradient(*mixture(), minibatch())[0]
  recorded = with_array(minibatch(), 'experts', scores.experts)
  forced = gradient(*mixture(), recorded)[0]
  jax.tree.map(np.testing.assert_array_equal, forced, unforced)
  assert np.all(forced['actor']['layers']['router'].any((1, 2)))


@pytest.mark.parametrize('num_slices', [1, 2])
def test_routing_is_that_of_the_token_in_every_layout(num_slices):
  """Packed and in slices, forced and recorded."""
  batch, force = minibatch(), elsewhere()
  forced = scored(*inputs(), experts=force, record_routing=True)
  layout = packed(batch, num_slices).packing
  found = scored(
    *inputs(), experts=force, record_routing=True, packing=layout,
    num_slices=num_slices,
  )  # fmt: skip
  np.testing.assert_array_equal(found.experts, forced.experts)
  np.testing.assert_allclose(found[:3], forced[:3], rtol=0, atol=2e-6)
  free = scored(*inputs())
  assert np.abs(free.logprobs - forced.logprobs).max() > 0.1


GROUP, NEW = 3, 6


@functools.partial(jax.jit, static_argnums=0)
def drawn(model, params, prompts, prompt_mask):
  return sample(
    model, params, prompts, prompt_mask, jax.random.key(2),
    num_samples=GROUP, max_new_tokens=NEW, stop_ids=(STOP, 3, 5), pad_id=PAD,
    record_routing=True,
  )  # fmt: skip


@functools.cache
def rollout(scale):
  """Of a sampler whose routers are wrong by some noise."""
  model, params = mixture()
  prompts = jnp.array([[3, 1, 4, 1], [0, 0, 2, 6]], jnp.int32)
  prompt_mask = jnp.array([[True] * 4, [False, False, True, True]])
  noisy = with_router_noise(params, jax.random.key(5), scale=scale)
  samples = drawn(model, noisy, prompts, prompt_mask)
  tokens, valid = (
    jnp.concatenate([jnp.repeat(a, GROUP, axis=0), b], axis=1)
    for a, b in ((prompts, samples.tokens), (prompt_mask, samples.mask))
  )
  mask = jnp.pad(samples.mask, ((0, 0), (4, 0)))
  return samples, (model, params, tokens, valid, mask)


def test_m69_the_sampler_records_what_the_learner_would_visit():
  """Where parameters are the same; nothing of tokens that were not fed."""
  samples, arrays = rollout(0.0)
  scores = scored(*arrays, record_routing=True)
  valid = np.asarray(arrays[3])
  last = valid & ~np.pad(valid[:, 1:], ((0, 0), (0, 1)))
  fed = valid & ~last
  assert len({tuple(row) for row in valid.tolist()}) > 3  # unequal lengths
  np.testing.assert_array_equal(samples.experts[fed], scores.experts[fed])
  assert (samples.experts[~fed] == -1).all()
  assert (scores.experts[~valid] == -1).all()
  assert not rerouted(samples.experts, scores.experts).any()


def test_m69_replay_narrows_the_gap_to_a_sampler_with_noisy_routers():
  samples, arrays = rollout(0.2)
  known, gaps = (samples.experts >= 0).all((-2, -1)), {}
  for name, experts in (('none', None), ('sampler', samples.experts)):
    scores = scored(*arrays, experts=experts, record_routing=True)
    gap = scores.model_logprobs[:, 4:] - samples.model_logprobs
    gaps[name] = np.abs(gap)[samples.mask].mean()
    assert rerouted(samples.experts, scores.experts)[known].mean() > 0.2
  assert 0 < gaps['sampler'] < 0.5 * gaps['none']


def test_noise_is_of_the_routers_alone_and_of_their_size():
  model = mixture_policy(vocab_size=VOCAB, max_length=8)
  assert model.num_experts == 4
  params = jax.eval_shape(model.init, jax.random.key(0))
  params = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape) / x.size,
                        params)  # fmt: skip
  noisy = with_router_noise(params, jax.random.key(0), scale=0.5)
  moved = jax.tree.map(lambda a, b: float((a - b).std()), noisy, params)
  router = moved['layers'].pop('router')
  assert not any(jax.tree.leaves(moved))
  spread = float(params['layers']['router'].std())
  assert router == pytest.approx(0.5 * spread, rel=0.2)


def test_rerouted_compares_sets_of_what_is_known():
  experts = jnp.array([[[[0, 1]], [[0, 1]], [[2, 3]], [[-1, -1]]]])
  others = jnp.array([[[[1, 0]], [[0, 2]], [[-1, -1]], [[0, 1]]]])
  np.testing.assert_array_equal(rerouted(experts, others), [[0, 1, 0, 0]])


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def gradient(model, params, batch, balance_over=None, num_micro_batches=1):
  """Gradient and metrics of PPO, with a loss of balance unless it is None."""
  if balance_over == 'minibatch':
    batch = with_expert_shares(
      model, params, batch, num_slices=num_micro_batches
    )
  objective = objectives.policy_gradient(
    model,
    loss=losses.ppo_clip,
    balance_coef=None if balance_over is None else 3.0,
  )
  batch = reweigh(batch, aggregation=aggregation.token_mean)
  return accumulate(objective, {'actor': params}, {}, batch, num_micro_batches)


def forced():
  return with_array(minibatch(), 'experts', elsewhere())


@functools.cache
def expected(over):
  found, figures = gradient(*averages(), forced(), over)
  return found, finish(figures)


def check(over, found):
  wanted, figures = expected(over)
  assert distance(found[0], wanted) < TOLERANCE['float32']
  assert finish(found[1]) == pytest.approx(figures, rel=2e-5, abs=2e-5)


def padding_columns(batch):
  def extend(x):
    widths = ((0, 0), (3, 2), *[(0, 0)] * (x.ndim - 2))
    return x if x.ndim == 1 else jnp.pad(x, widths, constant_values=filling(x))

  return jax.tree.map(extend, batch)


@pytest.mark.parametrize(
  ('change', 'num_micro_batches', 'over'),
  [
    (lambda batch: batch, 4, 'minibatch'),
    (padding_rows, 1, 'minibatch'),
    (padding_columns, 1, 'sequence'),
    (permuted, 2, 'sequence'),
    (functools.partial(packed, num_slices=2), 2, 'minibatch'),
  ],
  ids=['4', 'padding rows', 'padding columns', 'permuted, 2', 'packed, 2'],
)
def test_m69_layout_changes_neither_replay_nor_balance(
  change, num_micro_batches, over
):
  check(over, gradient(*averages(), change(forced()), over, num_micro_batches))


def test_m69_devices_change_neither_replay_nor_balance():
  mesh = sharding.make_mesh(data=8)
  with sharding.on(mesh):
    batch = sharding.put_rows(mesh, forced())
    check('minibatch', gradient(*averages(), batch, 'minibatch'))


def test_the_loss_of_balance_is_the_mean_over_layers_and_real_tokens():
  """By hand, with shares of the minibatch and of each sequence."""
  batch = forced()
  _, routing = routed_states(
    *inputs(averages), experts=elsewhere(), record=True
  )
  visited = np.asarray(jax.nn.one_hot(routing['experts'], EXPERTS).mean(-2))
  probs = np.asarray(jax.nn.softmax(routing['router_logits']))
  valid, totals = np.asarray(batch.valid), {'minibatch': [], 'sequence': []}
  for layer in range(LAYERS):
    whole = visited[:, :, layer][valid].mean(0)
    for b, t in np.argwhere(valid):
      own = visited[b, :, layer][valid[b]].mean(0)
      for over, shares in (('minibatch', whole), ('sequence', own)):
        totals[over].append(EXPERTS * np.sum(shares * probs[b, t, layer]))
  for over, values in totals.items():
    _, figures = expected(over)
    assert figures['balance/loss'] == pytest.approx(np.mean(values), rel=1e-5)
    total = figures['loss/policy'] + 3 * np.mean(values)
    assert figures['loss'] == pytest.approx(total, rel=1e-4)
  moved = rerouted(routing['experts'], selected(routing))
  share = np.asarray(moved)[valid].mean()
  assert figures['policy/rerouted'] == pytest.approx(share)
  assert share > 0.5


@pytest.mark.parametrize(
  'replay', ['sampler', pytest.param('old', marks=pytest.mark.slow)]
)
def test_m69_a_run_replays_and_balances(replay):
  """On policy: a minibatch, then one after a step."""
  config = tiny.arithmetic()
  config.model.update(
    family='mixtral', num_experts=EXPERTS, experts_per_token=VISITED
  )
  config.sft.num_steps = 0
  config.rl.num_iterations = 1
  config.rl.num_minibatches = 2
  config.routing = dict(
    record=True, replay=replay, balance_coef=0.1, balance_over='minibatch'
  )
  _, figures = device_loop.run(config, seeds=jnp.arange(1))
  assert figures['sampler/rerouted'] == 0  # one numerics
  assert figures['sampler/logprob_gap_max'] < 1e-5
  assert 0 < figures['policy/rerouted'] < 0.5  # of the second alone
  assert figures['balance/loss'] > 0.5


@pytest.mark.parametrize(
  ('field', 'value'), [('replay', 'old'), ('record', True), ('balance_coef', 0)]
)
def test_m69_a_config_for_a_dense_model_is_refused(field, value):
  config = tiny.arithmetic()
  config.sft.num_steps = 0
  config.routing.update({field: value})
  with pytest.raises(ValueError, match=f'routing.{field}=.*has no experts'):
    device_loop.run(config, seeds=jnp.arange(1))


def test_experts_of_prompts_of_unequal_length_are_joined():
  def part(length):
    experts = np.full((2, length + 2, 1, 1), length, np.int32)
    blank = np.zeros((2, 2))
    samples = Samples(
      *(blank.astype(t) for t in (int, bool, float, float)),
      truncated=np.zeros(2, bool), experts=experts,
    )  # fmt: skip
    prompts = Prompts(np.ones((1, length)), np.ones((1, length), bool), [{}])
    return prompts, samples, {'right': np.zeros(2)}

  parts = [part(1), part(3)]
  _, samples, _ = select_groups(parts[:1], np.array([False]), 1, PAD)
  assert samples.experts.shape == (2, 3, 1, 1)
  _, samples, _ = select_groups(parts, np.array([True, False]), 1, PAD)
  np.testing.assert_array_equal(
    samples.experts[..., 0, 0], [[-1, -1, 1, 1, 1]] * 2
  )


def test_m69_a_dense_model_is_refused():
  dense = dataclasses.replace(mixture()[0], num_experts=0)
  with pytest.raises(ValueError, match='the model has no experts'):
    score(dense, *inputs()[1:], record_routing=True)
