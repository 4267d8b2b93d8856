"""Policies and probes of inner layers: one forward, the right numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain import internals, losses, objectives
from postrain.aggregation import token_mean
from postrain.batches import pack
from postrain.logprobs import token_entropy
from postrain.models.heads import scalar_head
from postrain.models.transformer import Config, transformer
from postrain.models.wrap import plain
from postrain.scoring import read_states, score
from postrain.types import Batch

quick_compiler = tiny.quick_compiler
ROWS, LENGTH, VOCAB, LAYERS, WIDTH = 4, 7, 11, 3, 16
CONFIG = Config(
  vocab_size=VOCAB, num_layers=LAYERS, model_dim=WIDTH, mlp_dim=16, num_heads=2,
  num_kv_heads=1, head_dim=8, max_length=32, tie_embeddings=False,
)  # fmt: skip


@functools.cache
def network(**changes):
  model = transformer(dataclasses.replace(CONFIG, **changes))

  def noisy(key):  # initial policies are close to uniform
    return jax.tree.map(
      lambda x: x + 0.3 * jax.random.normal(key, x.shape, x.dtype),
      model.init(key),
    )

  return model, jax.jit(noisy)(jax.random.key(0))


def inputs():
  slots = jnp.arange(LENGTH)[None]
  starts = jnp.array([[0], [2], [1], [3]])
  stops = jnp.array([[7], [6], [7], [5]])
  valid = (slots >= starts) & (slots < stops)
  tokens = jax.random.randint(jax.random.key(2), valid.shape, 0, VOCAB)
  return tokens, valid, valid & (slots >= starts + 1)


def once(model):
  """The model; it counts forwards that show internals and allows no other."""
  calls = []

  def shown(*args, **how):
    calls.append(how['capture'])
    return model.internals(*args, **how)

  def hidden(*args, **how):
    raise RuntimeError('a second forward')

  return dataclasses.replace(model, internals=shown, hidden=hidden), calls


def figures(logits, tokens):
  logp = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
  return chosen, -(jnp.exp(logp) * logp).sum(-1)


OPTIONS = [
  {},
  {'apply_final_norm': True, 'chunk_size': 3, 'num_slices': 2,
   'temperature': 0.7},
  {'packed': True},
]  # fmt: skip


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_m77_policies_of_all_layers_and_modules_are_of_one_forward(options):
  """Each against its logits, and the last layer's against the model's."""
  model, params = network()
  tokens, valid, mask = inputs()
  how = {k: v for k, v in options.items() if k != 'packed'}
  if 'packed' in options:
    how['packing'] = pack(np.asarray(valid), width=9)
  counted, calls = once(model)
  norm, tau = how.get('apply_final_norm'), how.get('temperature', 1.0)

  @jax.jit
  def everything(params):
    found = internals.layer_scores(
      counted, params, tokens, valid, mask, capture=internals.STATES, **how
    )
    states = internals.layer_states(
      model, params, tokens, valid, valid, capture=internals.STATES
    )
    plain = {k: v for k, v in how.items() if k != 'apply_final_norm'}
    whole = score(model, params, tokens, valid, mask, **plain)
    expected = {}
    for name, state in states.items():
      normed = model.normalize(params, state)
      last = normed if norm or name == 'residual' else state
      state = jnp.concatenate([(normed if norm else state)[:-1], last[-1:]])
      logits = model.unembed(params, state[:, :, :-1]) / tau
      after = jnp.broadcast_to(tokens[None, :, 1:], logits.shape[:-1])
      expected[name] = figures(logits, after)
    return found, whole, expected

  found, whole, expected = everything(params)
  assert calls == [internals.STATES]
  np.testing.assert_array_equal(found['residual'].logprobs[-1], whole.logprobs)
  np.testing.assert_array_equal(found['residual'].entropy[-1], whole.entropy)
  for name, of_name in found.items():
    for a, b in zip(of_name, expected[name], strict=True):
      b = jnp.where(mask[None, :, 1:], b, 0)
      np.testing.assert_allclose(a[..., 1:], b, atol=1e-5)
      np.testing.assert_array_equal(a[..., 0], 0)


def test_m77_layers_are_chosen_and_unknown_ones_refused():
  model, params = network()
  args = params, *inputs()

  def entropy(model, **how):
    scores = functools.partial(internals.layer_scores, model, **how)
    return lambda *args: scores(*args)['residual'].entropy

  @jax.jit
  def both(*args):
    return entropy(model)(*args), entropy(model, layers=(2, 0))(*args)

  every, chosen = both(*args)
  np.testing.assert_array_equal(chosen, every[jnp.array([2, 0])])
  blind = dataclasses.replace(model, internals=None, normalize=None)
  normless = dataclasses.replace(model, normalize=None)
  for words, wrong in (
    (r'layers \[3\] of 3', entropy(model, layers=(0, 3))),
    ('name some of residual, att', entropy(model, capture=('logits',))),
    ('without internals', entropy(blind)),
    ('without normalize', entropy(normless, apply_final_norm=True)),
  ):
    with pytest.raises(ValueError, match=words):
      jax.eval_shape(wrong, *args)
  with pytest.raises(ValueError, match='layer=1 of a model without internals'):
    internals.layer_policy(blind, 1)


def test_m77_changes_of_entropy_are_of_inputs_and_outputs():
  """Those of layers sum to the entropy of the model less the embedding's."""
  model, params = network()
  tokens, valid, mask = inputs()
  counted, calls = once(model)
  modules = ('attention', 'mlp', 'attention_input', 'mlp_input')

  @jax.jit
  def everything(params):
    flow = internals.entropy_flow(counted, params, tokens, valid, mask)
    end = internals.layer_scores(model, params, tokens, valid, mask)
    _, states = read_states(model, params, tokens, valid, None, modules)
    states['start'] = params['embedding'][tokens][None]
    after = {
      k: token_entropy(model.unembed(params, v[:, :, :-1]))
      for k, v in states.items()
    }
    return flow, end['residual'].entropy, after

  flow, entropy, after = everything(params)
  assert len(calls) == 1
  shown = {k: np.where(mask[:, 1:], v, 0) for k, v in after.items()}
  steps = np.diff(np.concatenate([shown['start'], entropy[..., 1:]]), axis=0)
  np.testing.assert_allclose(flow['layer'][..., 1:], steps, atol=2e-5)
  for name in ('attention', 'mlp'):
    change = shown[name] - shown[f'{name}_input']
    np.testing.assert_allclose(flow[name][..., 1:], change, atol=2e-5)
    np.testing.assert_array_equal(flow[name][..., 0], 0)
    assert np.abs(change).max() > 1e-2


def loss(model, batch):
  objective = objectives.policy_gradient(model, loss=losses.ppo_clip)
  return lambda params: objective({'actor': params}, {}, batch)[0]


def test_m78_gradients_reach_the_layers_below_and_the_embeddings():
  """Exactly 0 above; the policy of the last layer is the model."""
  model, params = network(remat='nothing_saveable')
  tokens, valid, mask = inputs()
  advantages = jax.random.normal(jax.random.key(3), mask.shape)
  weights = {'policy': token_mean(mask)}
  inner = internals.layer_policy(model, 1)

  @jax.jit
  def gradients(params):
    old = score(inner, params, tokens, valid, mask).logprobs
    direct = internals.layer_scores(
      model, params, tokens, valid, mask, layers=(1,)
    )['residual'].logprobs[0]
    arrays = {'old_logprobs': old, 'advantages': advantages}
    batch = Batch(tokens, valid, mask, weights, arrays)
    whole = score(model, params, tokens, valid, mask).logprobs
    arrays = arrays | {'old_logprobs': whole}
    grpo = dataclasses.replace(batch, arrays=arrays)
    last = internals.layer_policy(model, LAYERS - 1)
    return old, direct, jax.grad(loss(inner, batch))(params), [
      jax.grad(loss(m, grpo))(params) for m in (last, model)
    ]  # fmt: skip

  old, direct, gradient, (last, whole) = gradients(params)
  np.testing.assert_allclose(old, direct, atol=1e-6)
  for name, leaf in gradient['layers'].items():
    np.testing.assert_array_equal(leaf[2], 0, name)
    assert np.abs(leaf[:2]).reshape(2, -1).max(-1).all(), name
  assert gradient['embedding'].any()
  assert gradient['unembedding'].any()
  np.testing.assert_array_equal(gradient['final_norm'], 0)
  for a, b in zip(*map(jax.tree.leaves, (last, whole)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_policy_of_no_layer_is_refused():
  model, params = network()
  tokens, valid, mask = inputs()
  wrong = functools.partial(score, internals.layer_policy(model, 3))
  with pytest.raises(ValueError, match=r'layers \[3\] of 3'):
    jax.eval_shape(wrong, params, tokens, valid, mask)


def stack():
  """Two plain layers that show their stream."""

  def captured(params, tokens, positions, ids, capture):
    first = params['table'][tokens]
    states = {'residual': jnp.stack([first, first @ params['mix']])}
    return states['residual'][-1], {k: states[k] for k in capture}

  return plain(
    lambda key: {
      'table': jax.random.normal(key, (VOCAB, WIDTH)),
      'mix': jax.random.normal(jax.random.key(9), (WIDTH, WIDTH)),
    },
    lambda *args: captured(*args, ())[0],
    lambda params, hidden: hidden @ params['table'].T,
    VOCAB,
    captured=captured,
    normalize=lambda params, residual: residual,
  )  # fmt: skip


def test_m77_strangers_and_heads_show_their_layers():
  tokens, valid, mask = inputs()
  model = stack()
  params = model.init(jax.random.key(0))
  inner, critic = internals.layer_policy(model, 0), scalar_head(model)

  @jax.jit
  def everything(params):
    layers = internals.layer_scores(model, params, tokens, valid, mask)
    whole = score(model, params, tokens, valid, mask)
    head = {'backbone': params, 'head': jnp.ones((WIDTH, 1))}
    states = internals.layer_states(critic, head, tokens, valid, valid)
    cache, ids = inner.empty_cache(ROWS, LENGTH), jnp.ones((ROWS, 2), jnp.int32)
    decoded = []
    for at in (slice(0, 2), slice(2, 4)):
      hidden, cache = inner.hidden(
        params, tokens[:, at], positions=ids, segment_ids=ids, cache=cache
      )
      decoded.append(hidden)
    return layers['residual'].logprobs[1], whole.logprobs, states, decoded

  last, whole, states, decoded = everything(params)
  np.testing.assert_array_equal(last, whole)
  embedded = params['table'][tokens]
  np.testing.assert_array_equal(
    states['residual'][0], jnp.where(valid[..., None], embedded, 0)
  )
  np.testing.assert_array_equal(
    jnp.concatenate(decoded, axis=1), embedded[:, :4]
  )
  with pytest.raises(ValueError, match='it has none'):
    model.internals(
      params, tokens, positions=tokens, segment_ids=tokens,
      experts=tokens[..., None, None],
    )  # fmt: skip


def test_m80_a_probe_is_ridge_regression_in_closed_form():
  draw = np.random.default_rng(0)
  states = draw.standard_normal((50, 6)) * 3 + 1
  states[:, 4] = 2.0  # a feature that never changes says nothing
  labels, where = draw.integers(3, size=50), draw.random(50) < 0.8

  @jax.jit
  def examine(*inputs):
    probe = internals.linear_probe(*inputs, num_classes=3, ridge=0.1)
    return probe, internals.probe_accuracy(probe, *inputs)

  probe, found = examine(states.astype(np.float32), labels, where)
  kept, target = states[where], np.eye(3)[labels[where]]
  spread = kept.std(0)
  x = (kept - kept.mean(0)) / np.where(spread > 0, spread, 1)
  gram = x.T @ x / len(x) + 0.1 * np.eye(6)
  kernel = np.linalg.solve(gram, x.T @ (target - target.mean(0)) / len(x))
  np.testing.assert_allclose(probe.kernel, kernel, atol=1e-5)
  np.testing.assert_allclose(probe.bias, target.mean(0), atol=1e-6)
  scores = (x @ kernel + target.mean(0)).argmax(1)
  np.testing.assert_allclose(found, (scores == labels[where]).mean(), rtol=1e-6)


def test_m80_probes_find_what_a_layer_knows_and_nothing_in_shuffled_labels():
  """The token before cannot be read until attention has moved it."""
  model, params = network()
  rows, seen = 1200, 900
  tokens = jax.random.randint(jax.random.key(7), (rows, 2), 0, VOCAB)
  valid = jnp.ones(tokens.shape, bool)
  before, now = (tokens % 2).T
  shuffled = jax.random.permutation(jax.random.key(5), now)

  @jax.jit
  def accuracies(params):
    states = internals.layer_states(model, params, tokens, valid, valid)
    embedded = params['embedding'][tokens][None]
    states = jnp.concatenate([embedded, states['residual']])[:, :, 1]

    def examine(states, labels):
      probe = internals.linear_probe(
        states[:seen], labels[:seen], num_classes=2
      )
      return internals.probe_accuracy(probe, states[seen:], labels[seen:])

    return [
      jax.vmap(examine, (0, None))(states, labels)
      for labels in (now, before, shuffled)
    ]

  current, previous, control = map(np.asarray, accuracies(params))
  # The share of even tokens, and three standard errors.
  chance = 6 / 11 + 3 * 0.5 / np.sqrt(rows - seen)
  assert current[0] > 0.95
  assert previous[0] < chance < 0.7 < previous[1:].max()
  assert np.all(control < chance)
