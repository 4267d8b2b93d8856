"""One network, many ways to run it: they must all be the same function."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain.models.heads import scalar_head
from postrain.models.transformer import Config, transformer

TINY = Config(
  vocab_size=29, num_layers=3, model_dim=16, mlp_dim=24, num_heads=4,
  num_kv_heads=2, head_dim=6, max_length=64,
)  # fmt: skip
KINDS = {
  'llama': {},
  'qwen2': {'qkv_bias': True, 'tie_embeddings': False},
  'qwen3': {'qk_norm': True, 'num_kv_heads': 1},
}
TOLERANCE = {'float32': 1e-5, 'float64': 1e-10}


@pytest.fixture(params=['float32', 'float64'])
def precision(request):
  with jax.enable_x64(request.param == 'float64'):
    yield request.param


@functools.cache
def make(precision='float32', **changes):
  config = dataclasses.replace(
    TINY, dtype=precision, param_dtype=precision, **changes
  )
  model = transformer(config)

  def noisy(key):  # so that no bias is 0 and no scale is 1
    return jax.tree.map(
      lambda x: x + 0.1 * jax.random.normal(key, x.shape, x.dtype),
      model.init(key),
    )

  return model, jax.jit(noisy)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, tokens, valid):
  positions = jnp.maximum(jnp.cumsum(valid, -1, dtype=jnp.int32) - 1, 0)
  hidden, cache = model.hidden(
    params, tokens, positions=positions, segment_ids=valid.astype(jnp.int32)
  )
  assert cache is None
  return model.unembed(params, hidden)


def draw(shape, seed=2):
  return jax.random.randint(jax.random.key(seed), shape, 0, 29, jnp.int32)


@pytest.mark.parametrize('kind', KINDS)
def test_cached_decoding_equals_the_whole_sequence(precision, kind):
  """Shared prompts, G = 3, left padding of three lengths, one ended row."""
  model, params = make(precision, **KINDS[kind])
  prompts, num_samples, slots, new = 3, 3, 5, 4
  rows = prompts * num_samples
  pad = jnp.array([0, 2, 4])[:, None]
  prompt_valid = jnp.arange(slots)[None] >= pad
  tokens = jnp.concatenate(
    [jnp.repeat(draw((prompts, slots)), num_samples, 0), draw((rows, new), 3)],
    axis=1,
  )
  live = jnp.ones((rows, new), bool).at[4, 2:].set(False)
  valid = jnp.concatenate(
    [jnp.repeat(prompt_valid, num_samples, 0), live], axis=1
  )
  positions = jnp.maximum(jnp.cumsum(valid, -1, dtype=jnp.int32) - 1, 0)
  ids = valid.astype(jnp.int32)
  expected = whole(model, params, tokens, valid)

  @jax.jit
  def decoded(params, tokens, positions, ids):
    hidden, prefix = model.hidden(
      params,
      tokens[::num_samples, :slots],
      positions=positions[::num_samples, :slots],
      segment_ids=ids[::num_samples, :slots],
      cache=model.empty_cache(prompts, slots),
    )
    parts = [jnp.repeat(hidden, num_samples, axis=0)]
    cache = model.empty_cache(rows, new, prefix)
    for start, stop in ((0, 1), (1, 3), (3, 4)):  # an append of two as well
      at = slice(slots + start, slots + stop)
      hidden, cache = model.hidden(
        params, tokens[:, at], positions=positions[:, at],
        segment_ids=ids[:, at], cache=cache,
      )  # fmt: skip
      parts.append(hidden)
    return model.unembed(params, jnp.concatenate(parts, axis=1))

  found = decoded(params, tokens, positions, ids)
  assert found.dtype == precision
  assert bool(jnp.isfinite(found).all())
  np.testing.assert_allclose(
    found[valid], expected[valid], rtol=0, atol=TOLERANCE[precision]
  )


def test_a_partly_filled_cache_and_a_prefix_of_a_prefix(precision):
  model, params = make(precision)
  tokens = draw((4, 9))
  positions = jnp.tile(jnp.arange(9), (4, 1))
  ids = jnp.ones((4, 9), jnp.int32)
  tokens = tokens.at[1, :4].set(tokens[0, :4])
  tokens = tokens.at[2:, :7].set(tokens[:1, :7]).at[1, :7].set(tokens[0, :7])
  expected = whole(model, params, tokens, ids > 0)

  @functools.partial(jax.jit, static_argnums=1)
  def step(cache, span):
    at, rows = slice(*span), cache.segment_ids.shape[0]
    hidden, cache = model.hidden(
      params, tokens[:rows, at], positions=positions[:rows, at],
      segment_ids=ids[:rows, at], cache=cache,
    )  # fmt: skip
    return model.unembed(params, hidden), cache

  first, cache = step(model.empty_cache(1, 6), (0, 4))  # 2 slots stay free
  second, cache = step(model.empty_cache(2, 4, cache), (4, 7))
  third, cache = step(model.empty_cache(4, 2, cache), (7, 9))
  atol = TOLERANCE[precision]
  np.testing.assert_allclose(first, expected[:1, :4], rtol=0, atol=atol)
  np.testing.assert_allclose(second, expected[:2, 4:7], rtol=0, atol=atol)
  np.testing.assert_allclose(third, expected[:, 7:], rtol=0, atol=atol)


@pytest.mark.parametrize('kind', KINDS)
def test_packing_changes_nothing(precision, kind):
  model, params = make(precision, **KINDS[kind])
  tokens, lengths = draw((3, 6)), (6, 3, 4)
  packed = jnp.concatenate([tokens[i, :n] for i, n in enumerate(lengths)])
  packed = jnp.pad(packed, (0, 3))[None]
  ids = jnp.array([[1] * 6 + [2] * 3 + [3] * 4 + [0] * 3])
  positions = jnp.array([[*range(6), *range(3), *range(4), 0, 0, 0]])
  hidden, _ = model.hidden(params, packed, positions=positions, segment_ids=ids)
  found = model.unembed(params, hidden)[0]
  start = 0
  for i, n in enumerate(lengths):
    row = tokens[i : i + 1, :n]
    expected = whole(model, params, row, jnp.ones((1, n), bool))[0]
    np.testing.assert_allclose(
      found[start : start + n], expected, rtol=0, atol=TOLERANCE[precision]
    )
    start += n


def test_left_padding_changes_nothing(precision):
  model, params = make(precision, qkv_bias=True)
  tokens = draw((2, 5))
  expected = whole(model, params, tokens, jnp.ones((2, 5), bool))
  for filler in (0, 7, -1, 999):  # also ids that are none
    padded = jnp.pad(tokens, ((0, 0), (3, 0)), constant_values=filler)
    valid = jnp.pad(jnp.ones((2, 5), bool), ((0, 0), (3, 0)))
    found = whole(model, params, padded, valid)
    assert bool(jnp.isfinite(found).all())
    np.testing.assert_allclose(
      found[:, 3:], expected, rtol=0, atol=TOLERANCE[precision]
    )


def test_the_past_does_not_see_the_future():
  model, params = make()
  tokens = draw((1, 8))
  changed = tokens.at[0, 5].add(1) % 29
  ones = jnp.ones((1, 8), bool)
  before, after = (whole(model, params, t, ones) for t in (tokens, changed))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert bool((jnp.abs(before - after)[:, 5:].max(-1) > 1e-4).all())


def test_unknown_tokens_are_loud():
  model, params = make()
  tokens = jnp.array([[1, 28], [1, 29]])
  logits = whole(model, params, tokens, jnp.ones((2, 2), bool))
  assert bool(jnp.isfinite(logits[0]).all())
  assert bool(jnp.isnan(logits[1, 1]).all())


def test_rematerialisation_changes_nothing():
  tokens, valid = draw((2, 6)), jnp.ones((2, 6), bool)
  _, params = make()

  def gradients(remat):
    model = transformer(dataclasses.replace(TINY, remat=remat))
    return jax.jit(
      jax.value_and_grad(
        lambda params: jnp.square(whole(model, params, tokens, valid)).mean()
      )
    )(params)

  expected = gradients(None)
  for remat in ('nothing_saveable', 'dots_with_no_batch_dims_saveable'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
      gradients(remat),
      expected,
    )


def test_layers_are_stacked_and_named():
  model, params = make(qkv_bias=True, qk_norm=True, tie_embeddings=False)
  axes = model.logical_axes()
  assert type(params) is dict
  jax.tree.map(
    lambda x, names: x.ndim == len(names) or pytest.fail(str(names)),
    params,
    axes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  assert axes['layers']['query'] == ('layers', 'width', 'heads', 'head_dim')
  assert axes['embedding'] == ('vocab', 'width')
  assert all(x.shape[0] == 3 for x in jax.tree.leaves(params['layers']))
  assert not np.allclose(*params['layers']['gate'][:2])


def test_reduced_precision_keeps_logits_in_float32():
  config = dataclasses.replace(TINY, dtype='bfloat16')
  model = transformer(config)
  params = jax.jit(model.init)(jax.random.key(0))
  exact = transformer(TINY)
  tokens, valid = draw((2, 6)), jnp.ones((2, 6), bool)
  found = whole(model, params, tokens, valid)
  assert params['embedding'].dtype == found.dtype == jnp.float32
  assert model.empty_cache(2, 3).keys[0].dtype == jnp.bfloat16
  expected = whole(exact, params, tokens, valid)
  np.testing.assert_allclose(found, expected, atol=0.03)


def test_reduced_precision_decodes_behind_a_cache():
  """XLA's CPU backend lacks some products of bfloat16 summed in float32."""
  model = transformer(dataclasses.replace(TINY, dtype='bfloat16'))
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = draw((2, 6))
  positions, ids = jnp.tile(jnp.arange(6), (2, 1)), jnp.ones((2, 6), jnp.int32)

  @jax.jit
  def decoded(params):
    cache, out = None, []
    for at in (slice(0, 5), slice(5, 6)):
      cache = model.empty_cache(2, at.stop - at.start, cache)
      hidden, cache = model.hidden(
        params, tokens[:, at], positions=positions[:, at],
        segment_ids=ids[:, at], cache=cache,
      )  # fmt: skip
      out.append(hidden)
    return model.unembed(params, jnp.concatenate(out, axis=1))

  expected = whole(model, params, tokens, ids > 0)
  np.testing.assert_allclose(decoded(params), expected, atol=0.03)


def test_decoding_compiles_once_and_copies_no_prefix():
  model, params = make()
  prompt = draw((2, 8))
  positions, ids = jnp.tile(jnp.arange(8), (2, 1)), jnp.ones((2, 8), jnp.int32)
  _, prefix = model.hidden(
    params, prompt, positions=positions, segment_ids=ids,
    cache=model.empty_cache(2, 8),
  )  # fmt: skip
  cache = model.empty_cache(6, 4, prefix)
  assert [k.shape for k in cache.keys] == 3 * [(6, 2, 6, 4)]
  assert [k.shape for k in cache.prefix.keys] == 3 * [(2, 2, 6, 8)]
  traces = []

  @jax.jit
  def step(tokens, position, cache):
    traces.append(1)
    return model.hidden(
      params, tokens, positions=jnp.full((6, 1), 8) + position,
      segment_ids=jnp.ones((6, 1), jnp.int32), cache=cache,
    )  # fmt: skip

  for i in range(4):
    _, cache = step(draw((6, 1), i), jnp.int32(i), cache)
  assert len(traces) == 1
  assert int(cache.length) == 4


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'num_kv_heads': 3}, 'num_kv_heads=3'),
    ({'head_dim': 5}, 'head_dim=5'),
    ({'num_layers': 0}, 'num_layers=0'),
    ({'dtype': 'int8'}, 'bfloat16'),
    ({'param_dtype': 'float64'}, 'jax_enable_x64'),
    ({'remat': 'full'}, 'nothing_saveable'),
  ],
)
def test_a_wrong_config_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(TINY, **changes)


def test_a_wrong_cache_is_refused():
  model, params = make()
  prefix = model.empty_cache(4, 8)
  with pytest.raises(ValueError, match='batch_size=6'):
    model.empty_cache(6, 8, prefix)
  with pytest.raises(ValueError, match='max_length=64'):
    model.empty_cache(8, 57, prefix)
  blank = jnp.ones((4, 9), jnp.int32)
  with pytest.raises(ValueError, match='8 slots'):
    model.hidden(
      params, blank, positions=blank, segment_ids=blank, cache=prefix
    )


def test_scalar_head_starts_at_zero_and_learns(precision):
  model, backbone = make(precision)
  critic = scalar_head(model)
  params = jax.jit(critic.init)(jax.random.key(3))
  assert set(params) == {'backbone', 'head'}
  assert critic.logical_axes()['head'] == ('width', None)
  tokens, valid = draw((2, 5)), jnp.ones((2, 5), bool)
  values = whole(critic, params, tokens, valid)
  np.testing.assert_array_equal(values, jnp.zeros((2, 5, 1)))

  head = jax.random.normal(jax.random.key(4), (16, 1), params['head'].dtype)
  params = {'backbone': backbone, 'head': head}
  positions = jnp.tile(jnp.arange(5), (2, 1))
  hidden, _ = model.hidden(
    backbone, tokens, positions=positions, segment_ids=jnp.ones_like(tokens)
  )
  np.testing.assert_allclose(
    whole(critic, params, tokens, valid), hidden @ head, atol=1e-5
  )
