"""Strangers' networks are models like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain.models.wrap import from_nnx, plain

VOCAB, WIDTH = 11, 6


def linear_attention(params, tokens, positions, segment_ids):
  """The mean over the visible past of embeddings, and a position."""
  num = tokens.shape[1]
  states = params['embedding'][tokens] + params['position'][positions]
  causal = jnp.tril(jnp.ones((1, num, num), bool))
  visible = causal & (segment_ids[:, :, None] == segment_ids[:, None])
  weights = visible.astype(jnp.float32)
  weights /= weights.sum(-1, keepdims=True)
  return jnp.einsum('bts,bsd->btd', weights, states)


def stranger():
  def init(key):
    normal = jax.random.normal
    return {
      'embedding': normal(key, (VOCAB, WIDTH)),
      'position': normal(key, (20, WIDTH)),
      'head': normal(key, (WIDTH, VOCAB)),
    }

  return plain(
    init, linear_attention, lambda params, h: h @ params['head'], VOCAB
  )


def inputs(rows, slots, pad):
  tokens = jax.random.randint(jax.random.key(0), (rows, slots), 0, VOCAB)
  ids = (jnp.arange(slots)[None] >= jnp.array(pad)[:, None]).astype(jnp.int32)
  return tokens, jnp.maximum(jnp.cumsum(ids, -1) - 1, 0), ids


def run(model, params, tokens, positions, ids, cache=None):
  return model.hidden(
    params, tokens, positions=positions, segment_ids=ids, cache=cache
  )


def check_cached(model):
  """Decoding behind shared prompts equals the whole sequence."""
  params = model.init(jax.random.key(1))
  prompts = inputs(2, 4, [0, 2])
  new = inputs(6, 3, [0] * 6)
  new = (new[0], jnp.repeat(prompts[1][:, -1:], 3, 0) + new[1] + 1, new[2])
  _, prefix = run(model, params, *prompts, model.empty_cache(2, 4))
  cache = model.empty_cache(6, 3, prefix)
  found = []
  for at in (slice(0, 1), slice(1, 3)):
    hidden, cache = run(model, params, *(x[:, at] for x in new), cache)
    found.append(hidden)
  whole = [
    jnp.concatenate([jnp.repeat(a, 3, 0), b], axis=1)
    for a, b in zip(prompts, new, strict=True)
  ]
  expected, cache = run(model, params, *whole)
  assert cache is None
  np.testing.assert_allclose(
    jnp.concatenate(found, 1), expected[:, 4:], atol=1e-6
  )
  assert model.unembed(params, expected).shape == (6, 7, VOCAB)


def test_plain_functions_decode_exactly():
  check_cached(stranger())


def test_plain_functions_decode_under_jit():
  model = stranger()
  params = model.init(jax.random.key(1))
  tokens, positions, ids = inputs(2, 5, [0, 1])
  expected, _ = run(model, params, tokens, positions, ids)

  def body(i, carry):
    cache, out = carry
    column = (
      jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)
      for x in (tokens, positions, ids)
    )
    hidden, cache = run(model, params, *column, cache)
    return cache, jax.lax.dynamic_update_slice_in_dim(out, hidden, i, axis=1)

  start = (model.empty_cache(2, 5), jnp.zeros_like(expected))
  _, found = jax.jit(lambda s: jax.lax.fori_loop(0, 5, body, s))(start)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_wrong_sizes_are_refused():
  model = stranger()
  prefix = model.empty_cache(4, 2)
  with pytest.raises(ValueError, match='batch_size=6'):
    model.empty_cache(6, 2, prefix)
  with pytest.raises(ValueError, match='2 slots'):
    run(model, model.init(jax.random.key(0)), *inputs(4, 3, [0] * 4), prefix)


def nnx_or_skip():
  try:
    from flax import nnx
  except AttributeError as error:  # flax before 0.12.10 on jax from 0.11.1
    pytest.skip(f'this flax has no nnx on this jax: {error}')
  return nnx


def test_an_nnx_module_is_a_model():
  nnx = nnx_or_skip()

  class Stranger(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
      self.position = nnx.Embed(20, WIDTH, rngs=rngs)
      self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens, positions, segment_ids):
      tables = {
        'embedding': self.embed.embedding[...],
        'position': self.position.embedding[...],
      }
      return linear_attention(tables, tokens, positions, segment_ids)

    def unembed(self, hidden):
      return self.head(hidden)

  model = from_nnx(Stranger, VOCAB)
  check_cached(model)
  params = model.init(jax.random.key(2))
  assert params['head']['kernel'].shape == (WIDTH, VOCAB)
  other = jax.jit(model.init)(jax.random.key(3))
  assert not np.allclose(params['head']['kernel'], other['head']['kernel'])

  tokens, positions, ids = inputs(2, 5, [0, 1])

  def loss(params):
    hidden, _ = run(model, params, tokens, positions, ids)
    return jnp.square(model.unembed(params, hidden)).mean()

  gradient = jax.jit(jax.grad(loss))(params)
  after = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
  assert loss(after) < loss(params)


def test_nnx_state_besides_parameters_is_refused():
  nnx = nnx_or_skip()

  class Counting(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

  with pytest.raises(ValueError, match=r'besides nnx\.Param'):
    from_nnx(Counting, VOCAB)
