"""Scores against a plain softmax, alignment, and what must never be built."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import losses, objectives
from postrain.batches import pack
from postrain.models.transformer import Config, transformer
from postrain.scoring import hidden_states, in_slices, score, token_positions
from postrain.train_step import accumulate
from postrain.types import Batch

ROWS, LENGTH, VOCAB = 4, 9, 11


@functools.cache
def network(vocab_size=VOCAB):
  model = transformer(
    Config(
      vocab_size=vocab_size, num_layers=1, model_dim=8, mlp_dim=8, num_heads=1,
      num_kv_heads=1, head_dim=8, max_length=256,
    )
  )  # fmt: skip
  params = jax.jit(model.init)(jax.random.key(0))
  draw = np.random.default_rng(1)  # initial logits are close to uniform
  return model, jax.tree.map(
    lambda x: x + 0.3 * jnp.asarray(draw.standard_normal(x.shape), x.dtype),
    params,
  )


def inputs():
  slots = jnp.arange(LENGTH)[None]
  starts, stops = (
    jnp.array([[0], [2], [1], [3]]),
    jnp.array([[9], [6], [8], [7]]),
  )
  valid = (slots >= starts) & (slots < stops)
  tokens = jax.random.randint(jax.random.key(2), valid.shape, 0, VOCAB)
  return tokens, valid, valid & (slots >= 4)


scored = jax.jit(
  score,
  static_argnums=0,
  static_argnames=('chunk_size', 'num_slices'),
  compiler_options={'xla_backend_optimization_level': 0},  # compiles faster
)


@functools.cache
def by_hand(temperature):
  """Each sequence alone, unpadded, through a softmax in NumPy."""
  model, params = network()
  tokens, valid, mask = map(np.asarray, inputs())
  out = np.zeros((3, ROWS, LENGTH))
  for b in range(ROWS):
    (real,) = np.nonzero(valid[b])
    row = jnp.asarray(tokens[b][real])[None]
    hidden, _ = jax.jit(model.hidden)(
      params, row, positions=jnp.arange(row.size)[None],
      segment_ids=jnp.ones(row.shape, jnp.int32),
    )  # fmt: skip
    logits = np.asarray(model.unembed(params, hidden), float)[0]
    for i, t in enumerate(real):
      if mask[b, t]:
        figures = []
        for tau in (temperature, 1.0):
          scaled = logits[i - 1] / tau
          figures.append(scaled - np.log(np.exp(scaled).sum()))
        entropy = -np.sum(np.exp(figures[0]) * figures[0])
        token = tokens[b, t]
        out[:, b, t] = figures[0][token], entropy, figures[1][token]
  return out


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize(
  'options',
  [{}, {'chunk_size': 2}, {'num_slices': 2}, {'num_slices': 4}],
  ids=str,
)
def test_scores_are_those_of_each_sequence_alone(temperature, options):
  model, params = network()
  scores = scored(model, params, *inputs(), temperature=temperature, **options)
  np.testing.assert_allclose(
    scores[:3], by_hand(temperature), rtol=0, atol=2e-6
  )


@pytest.mark.parametrize('num_slices', [1, 2])
def test_packing_is_a_layout_of_the_call_alone(num_slices):
  model, params = network()
  tokens, valid, mask = inputs()
  packing = pack(np.asarray(valid), width=13, num_slices=num_slices)
  scores = scored(
    model, params, tokens, valid, mask, packing=packing, num_slices=num_slices
  )
  np.testing.assert_allclose(scores[:3], by_hand(1.0), rtol=0, atol=2e-6)


def test_what_stands_in_padding_changes_no_bit():
  model, params = network()
  tokens, valid, mask = inputs()
  other = jnp.where(valid, tokens, VOCAB - 1 - tokens)
  scores = scored(model, params, tokens, valid, mask)
  again = scored(model, params, other, valid, mask)
  for a, b in zip(scores[:3], again[:3], strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[~mask], 0)


def test_hidden_states_stand_at_the_token_that_they_predict():
  model, params = network()
  tokens, valid, mask = inputs()
  shifted = hidden_states(model, params, tokens, valid, mask)
  plain, _ = model.hidden(
    params, tokens, positions=token_positions(valid),
    segment_ids=valid.astype(jnp.int32),
  )  # fmt: skip
  expected = jnp.where(mask[:, 1:, None], plain[:, :-1], 0)
  np.testing.assert_array_equal(shifted[:, 1:], expected)
  np.testing.assert_array_equal(shifted[:, 0], 0)


def test_a_token_is_scored_without_seeing_itself():
  """The log-prob of token t moves with tokens before t, never with later."""
  model, params = network()
  tokens, valid, mask = inputs()
  before = scored(model, params, tokens, valid, mask).entropy
  changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % VOCAB)
  after = scored(model, params, changed, valid, mask).entropy
  np.testing.assert_array_equal(before[:, :6], after[:, :6])
  assert (before[:, 6] != after[:, 6])[mask[:, 6]].all()


def test_positions_count_real_tokens():
  valid = jnp.array([[False, False, True, True, False]])
  np.testing.assert_array_equal(token_positions(valid), [[0, 0, 0, 1, 1]])


def test_slices_keep_the_order_of_rows():
  rows = jnp.arange(12.0).reshape(6, 2)
  found = in_slices(lambda x: {'twice': 2 * x[0]}, (rows,), 3)
  np.testing.assert_array_equal(found['twice'], 2 * rows)


def test_slices_must_divide_the_rows():
  model, params = network()
  with pytest.raises(ValueError, match='4 rows do not divide into 3 slices'):
    scored(model, params, *inputs(), num_slices=3)


# Logits of all positions must never exist at once.


def shapes(jaxpr):
  """Shapes of all intermediates, those of inner programs included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield getattr(variable.aval, 'shape', ())
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'),
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from shapes(inner)


def large_batch(length):
  shape = (2, length)
  mask = jnp.ones(shape, bool).at[:, 0].set(False)
  figures = jnp.zeros(shape)
  arrays = {'old_logprobs': figures, 'advantages': figures + 1}
  weights = dict.fromkeys(('policy', 'entropy'), mask.astype(float))
  tokens = jnp.zeros(shape, jnp.int32)
  return Batch(tokens, jnp.ones(shape, bool), mask, weights, arrays)


def scoring(chunk_size):
  model, params = network(997)
  batch = large_batch(64)
  return lambda: score(
    model, params, batch.tokens, batch.valid, batch.mask, chunk_size=chunk_size
  )


def gradient(chunk_size):
  model, params = network(997)
  objective = objectives.policy_gradient(
    model, loss=losses.ppo_clip, entropy_coef=0.1, chunk_size=chunk_size
  )
  return lambda: accumulate(
    objective, {'actor': params}, {}, large_batch(64), 1
  )


@pytest.mark.parametrize('program', [scoring, gradient])
def test_no_logits_of_the_whole_batch_exist(program):
  """Neither in the traced program nor, by its memory, in the compiled one."""
  positions, vocab = 2 * 64, 997
  sizes = {
    chunk: max(
      int(np.prod(s)) for s in shapes(jax.make_jaxpr(program(chunk))().jaxpr)
      if vocab in s
    )
    for chunk in (8, 64)
  }  # fmt: skip
  assert sizes[64] == positions * vocab  # the walk sees what it looks for
  assert sizes[8] == max(2 * 8 * vocab, 8 * vocab)
  memory = {
    chunk: jax.jit(program(chunk)).lower().compile().memory_analysis()
    for chunk in (8, 64)
  }
  saved = memory[64].temp_size_in_bytes - memory[8].temp_size_in_bytes
  assert saved > positions * vocab * 4 / 2
