"""Scores against loops, where they stand, and reward models that learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from postrain import losses
from postrain.aggregation import token_mean
from postrain.batches import pack, weigh_units
from postrain.models.heads import scalar_head, with_labels
from postrain.models.transformer import Config, transformer
from postrain.models.wrap import plain
from postrain.reward_models import (
  completion_objective,
  completion_scores,
  ensemble,
  label_score,
  step_ends,
  step_objective,
  token_scores,
)
from postrain.scoring import hidden_states
from postrain.train_step import accumulate, finish, make_train_step
from postrain.types import Batch, TrainState

quick_compiler = tiny.quick_compiler
ROWS, LENGTH, VOCAB = 4, 9, 8
CONFIG = Config(
  vocab_size=VOCAB, num_layers=1, model_dim=16, mlp_dim=16, num_heads=2,
  num_kv_heads=1, head_dim=8, max_length=32,
)  # fmt: skip


@functools.cache
def network(num_labels=2, head='token_labels'):
  """A model that scores, and its parameters with none of them 0."""
  params = jax.jit(transformer(CONFIG).init)(jax.random.key(0))
  config, params = with_labels(CONFIG, params, num_labels=num_labels, head=head)
  draw = np.random.default_rng(1)
  return transformer(config), jax.tree.map(
    lambda x: x + 0.3 * jnp.asarray(draw.standard_normal(x.shape), x.dtype),
    params,
  )


def inputs():
  slots = jnp.arange(LENGTH)[None]
  starts, stops = (
    jnp.array([[0], [2], [1], [3]]),
    jnp.array([[9], [6], [5], [3]]),  # the last row is empty
  )
  valid = (slots >= starts) & (slots < stops)
  tokens = jax.random.randint(jax.random.key(2), valid.shape, 0, VOCAB)
  return tokens, valid


@functools.cache
def by_hand():
  """Each row alone, unpadded, token by token."""
  model, params = network()
  tokens, valid = map(np.asarray, inputs())
  out = np.zeros((ROWS, LENGTH))
  run = jax.jit(model.hidden)
  for b in range(ROWS):
    (real,) = np.nonzero(valid[b])
    if not real.size:
      continue
    row = jnp.asarray(tokens[b][real])[None]
    states, _ = run(
      params, row, positions=jnp.arange(row.size)[None],
      segment_ids=jnp.ones(row.shape, jnp.int32),
    )  # fmt: skip
    for i, t in enumerate(real):
      state = np.asarray(states[0, i], float)
      wrong, right = state @ np.asarray(params['score'], float) + np.asarray(
        params['score_bias'], float
      )
      out[b, t] = right - wrong
  return out


OPTIONS = [{}, {'num_slices': 2}, {'packed': True}]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_m11_scores_are_those_of_each_row_alone(options):
  """Of every token and of the last, whatever the padding and the layout."""
  model, params = network()
  tokens, valid = inputs()
  how = {'num_slices': options.get('num_slices', 1)}
  if options.get('packed'):
    how['packing'] = pack(np.asarray(valid), width=11)
  expected = by_hand()

  @jax.jit
  def found(params):
    every = token_scores(
      model, params, tokens, valid, valid, chunk_size=4, **how
    )
    return every, completion_scores(model, params, tokens, valid, **how)

  every, last = found(params)
  np.testing.assert_allclose(every, expected, atol=2e-6)
  np.testing.assert_allclose(
    last, [expected[0, 8], expected[1, 5], expected[2, 4], 0], atol=2e-6
  )
  np.testing.assert_allclose(last, losses.last_score(every, valid), atol=2e-6)


def test_scores_off_the_mask_are_zero_and_padding_moves_no_bit():
  model, params = network()
  tokens, valid = inputs()
  mask = valid & (tokens % 2 == 0)
  score = jax.jit(lambda x: token_scores(model, params, x, valid, mask))
  found, again = score(tokens), score(jnp.where(valid, tokens, 7 - tokens))
  np.testing.assert_array_equal(found, again)
  np.testing.assert_array_equal(found[~mask], 0)
  np.testing.assert_allclose(found, np.where(mask, by_hand(), 0), atol=2e-6)


def test_a_value_is_of_the_state_before_its_token_and_a_score_after():
  model, params = network(1, 'sequence_labels')
  tokens, valid = jnp.ones((1, 6), jnp.int32), jnp.ones((1, 6), bool)
  critic = scalar_head(transformer(CONFIG))
  head = {'backbone': params, 'head': params['score']}

  @jax.jit
  def both(tokens):
    hidden = hidden_states(critic, head, tokens, valid, valid)
    values = critic.unembed(head, hidden)[..., 0]
    return values, token_scores(model, params, tokens, valid, valid)

  values, scores = both(tokens)
  changed = both(tokens.at[0, 3].set(5))
  moved = [a != b for a, b in zip(changed, (values, scores), strict=True)]
  np.testing.assert_array_equal(moved[0][0], [0, 0, 0, 0, 1, 1])
  np.testing.assert_array_equal(moved[1][0], [0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(values[:, 0], 0)
  np.testing.assert_allclose(values[:, 1:], scores[:, :-1], atol=1e-6)


def test_two_labels_are_the_log_odds_of_the_second():
  logits = jnp.array([[0.3, -1.2], [0.0, 2.0]])
  chance = jax.nn.softmax(logits)[:, 1]
  np.testing.assert_allclose(jax.nn.sigmoid(label_score(logits)), chance, 1e-6)
  labels, mask = jnp.array([[1.0, 0.0]]), jnp.ones((1, 2), bool)
  values, _ = losses.step_correctness(label_score(logits)[None], labels, mask)
  expected = -jax.nn.log_softmax(logits)[jnp.arange(2), jnp.array([1, 0])]
  np.testing.assert_allclose(values[0], expected, rtol=1e-6)
  np.testing.assert_array_equal(label_score(logits[:, :1]), logits[:, 0])
  with pytest.raises(ValueError, match='3 labels has no single score'):
    label_score(jnp.zeros((2, 3)))


def ends_by_hand(tokens, mask, separators, last):
  found = np.zeros(tokens.shape, bool)
  for b, row in enumerate(tokens):
    spans = [
      (t - len(ids) + 1, t)
      for ids in separators
      for t in range(len(ids) - 1, len(row))
      if tuple(row[t - len(ids) + 1 : t + 1]) == ids
      and mask[b, t - len(ids) + 1 : t + 1].all()
    ]
    ends = {end for _, end in spans}
    if last and mask[b].any():
      ends.add(np.nonzero(mask[b])[0][-1])
    for t in ends:  # unless one that touches or overlaps it goes on
      found[b, t] = not any(start <= t + 1 and end > t for start, end in spans)
  return found


@pytest.mark.parametrize('last', [True, False])
@pytest.mark.parametrize(
  'separators', [((1,),), ((1,), (0, 1)), ((1, 2),), ((0, 0), (2, 1, 0))]
)
def test_m61_ends_of_steps_are_those_of_a_scan(separators, last):
  draw = np.random.default_rng(0)
  tokens = draw.integers(3, size=(40, 12)).astype(np.int32)
  mask = np.arange(12) >= draw.integers(12, size=(40, 1))
  mask[::3, 5] = False
  mask[7] = False
  found = step_ends(
    jnp.asarray(tokens), jnp.asarray(mask), separators=separators, last=last
  )
  expected = ends_by_hand(tokens, mask, separators, last)
  np.testing.assert_array_equal(found, expected)


def test_separators_must_exist():
  tokens, valid = inputs()
  for separators in ((), ((),)):
    with pytest.raises(ValueError, match='give at least one'):
      step_ends(tokens, valid, separators=separators)


def pairs(tokens, valid, labels):
  """Rows in pairs; the oracle's labels say which stands first."""
  better = labels[::2] > labels[1::2]
  rows = 2 * jnp.arange(len(better)) + jnp.where(better, 0, 1)
  order = jnp.stack([rows, rows ^ 1], axis=1).reshape(-1)
  return weigh_units(
    Batch(tokens[order], valid[order], valid[order], {}, {}, unit_size=2)
  )


def test_gradients_do_not_depend_on_micro_batches_or_packing():
  model, params = network(1, 'sequence_labels')
  tokens, valid = inputs()
  batch = pairs(tokens, valid, jnp.arange(4.0))
  packing = pack(np.asarray(batch.valid), width=9, num_slices=2, unit_size=2)
  objective = completion_objective(
    model, loss=losses.bradley_terry, centering_coef=0.1
  )

  @jax.jit
  def gradients(params):
    layouts = (batch, 1), (batch, 2), (batch.replace(packing=packing), 2)
    return [
      accumulate(objective, {'reward_model': params}, {}, *layout)[0]
      for layout in layouts
    ]

  whole, *others = gradients(params)
  for other in others:
    for a, b in zip(*map(jax.tree.leaves, (whole, other)), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize('loss', [losses.plackett_luce, losses.ranked_pairs])
def test_units_of_any_size_are_ranked(loss):
  """A rewardless model pays what an even one does; empty rows do not count."""
  flat = plain(
    lambda key: {}, lambda params, tokens, *_: jnp.zeros((*tokens.shape, 1)),
    lambda params, hidden: hidden, VOCAB,
  )  # fmt: skip
  tokens, valid = inputs()
  batch = weigh_units(
    Batch(tokens, valid, valid, {}, {'ranks': jnp.arange(4)}, unit_size=4)
  )
  objective = jax.jit(completion_objective(flat, loss=loss))
  value, metrics = objective({'reward_model': {}}, {}, batch)
  fair = {losses.plackett_luce: np.log(6), losses.ranked_pairs: np.log(2)}
  np.testing.assert_allclose(value, fair[loss], rtol=1e-6)
  assert finish(metrics)['loss'] == pytest.approx(float(value))


def test_an_ensemble_pays_less_where_its_models_disagree():
  scores = jnp.array([[1.0, 2.0, -3.0], [3.0, 2.0, 0.0], [2.0, 2.0, 0.0]])
  found = {a: ensemble(scores, aggregate=a) for a in ('mean', 'min', 'lower')}
  np.testing.assert_allclose(found['mean'], [2, 2, -1], atol=1e-6)
  np.testing.assert_array_equal(found['min'], [1, 2, -3])
  spread = [np.sqrt(2 / 3), 0, np.sqrt(2)]
  np.testing.assert_allclose(
    found['lower'], found['mean'] - jnp.array(spread), atol=1e-6
  )
  # One model is no ensemble; order is none either; a coefficient is traced.
  for aggregate in found:
    one = ensemble(scores[:1], aggregate=aggregate)
    np.testing.assert_array_equal(one, scores[0])
    turned = ensemble(scores[::-1], aggregate=aggregate)
    np.testing.assert_allclose(turned, found[aggregate], atol=1e-6)
  free = jax.jit(lambda c: ensemble(scores, aggregate='lower', coef=c))(0.0)
  np.testing.assert_allclose(free, found['mean'], atol=1e-6)
  # A deviation of 0 has no gradient that is a number; rewards are constants.
  gradient = jax.grad(lambda s: ensemble(s, aggregate='lower').sum())(scores)
  np.testing.assert_array_equal(gradient, 0)
  with pytest.raises(ValueError, match="aggregate is 'median'; choose 'mean'"):
    ensemble(scores, aggregate='median')


WORTH = jnp.array([0.0, 2.0, -1.0, 0.5, -2.0, 1.0, 3.0, -0.5])


def texts(key, rows, length=8):
  """Random tokens, left-padded by up to three slots."""
  tokens = jax.random.randint(key, (rows, length), 0, VOCAB)
  pad = jax.random.randint(jax.random.fold_in(key, 1), (rows, 1), 0, 4)
  return tokens, jnp.arange(length)[None] >= pad


def outcomes(key):
  """The oracle averages what tokens are worth."""
  tokens, valid = texts(key, 64)
  worth = jnp.where(valid, WORTH[tokens], 0).sum(-1)
  return pairs(tokens, valid, worth / valid.sum(-1).astype(jnp.float32))


def steps(key):
  """Steps end with token 0; one is right if the token before it is even."""
  tokens, valid = texts(key, 64)
  ends = step_ends(tokens, valid, separators=((0,),), last=False)
  before = jnp.roll(jnp.where(valid, tokens, 0), 1, axis=1)
  ends = ends.at[:, 0].set(False)
  labels = (before % 2 == 0).astype(jnp.float32)
  weights = {'policy': token_mean(ends)}
  return Batch(tokens, valid, ends, weights, {'labels': labels})


LESSONS = {
  'outcomes': (
    outcomes, (1, 'sequence_labels'),
    functools.partial(completion_objective, loss=losses.bradley_terry),
  ),
  'steps': (steps, (2, 'token_labels'), step_objective),
}  # fmt: skip


@pytest.mark.parametrize('lesson', LESSONS)
def test_m10_m61_labels_of_an_oracle_are_learnt(lesson):
  """From a language model to over 95 % of texts that it never saw."""
  draw, (num_labels, head), make = LESSONS[lesson]
  base = jax.jit(transformer(CONFIG).init)(jax.random.key(0))
  config, params = with_labels(CONFIG, base, num_labels=num_labels, head=head)
  objective = make(transformer(config))
  optimizer = optax.adam(optax.cosine_decay_schedule(0.015, 300))
  train_step = make_train_step(objective, optimizer)

  def update(state, number):
    batch = draw(jax.random.fold_in(jax.random.key(1), number))
    return train_step(state, {}, batch)[0], None

  @jax.jit
  def learnt(params):
    start = TrainState(jnp.int32(0), params, optimizer.init(params))
    params = jax.lax.scan(update, start, jnp.arange(300))[0].params
    keys = jax.random.split(jax.random.key(2), 8)
    return jax.lax.map(lambda k: objective(params, {}, draw(k))[1], keys)

  metrics = learnt({'reward_model': params})
  total, count = metrics['reward_model/accuracy']
  assert float(total.sum() / count.sum()) > 0.95
