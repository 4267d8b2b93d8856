"""What the methods promise of masks, corrections and inner layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
import tiny

from postrain import aggregation, importance, kl, logprobs, losses, masks
from postrain.models.transformer import Config, transformer

quick_compiler = tiny.quick_compiler


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def row(*numbers):
  return jnp.asarray([numbers], float)


def gradient(logp, old, a, mask, weights=1.0):
  """Of the clipped surrogate."""

  def total(x):
    return jnp.sum(weights * losses.ppo_clip(x, old, a, mask)[0])

  return jax.grad(total)(logp)


def drawn(seed=0, rows=4, length=5, spread=0.3):
  rng = np.random.default_rng(seed)
  old = jnp.asarray(-rng.random((rows, length)) - 0.1)
  logp = old + spread * jnp.asarray(rng.standard_normal(old.shape))
  a = jnp.asarray(rng.standard_normal(old.shape))
  lengths = jnp.asarray(rng.integers(1, length + 1, (rows, 1)))
  return logp, old, a, jnp.arange(length)[None, :] < lengths


def test_m57_nothing_is_distilled_where_all_is_right():
  right = jnp.ones((2, 3))
  for level in ('response', 'group'):
    assert not np.any(masks.unsolved(right, level=level))
  kept = jnp.zeros((6, 4), bool)
  student = row(*np.linspace(-3, -1, 4)) * jnp.ones((6, 1))
  term = aggregation.token_mean(kept) * kl.k2(student, 2 * student, kept)
  assert jnp.sum(term) == 0


def test_m57_by_response_or_by_group():
  rewards = jnp.asarray([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 9.0, 1.0]])
  where = jnp.asarray([[1, 1, 1], [1, 1, 1], [1, 0, 0]], bool)
  found = masks.unsolved(rewards, where)
  np.testing.assert_array_equal(found, where & (rewards == 0))
  found = masks.unsolved(rewards, where, level='group')
  np.testing.assert_array_equal(found, [[0, 0, 0], [1, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize('level', ['token', 'sequence', 'geometric'])
def test_m65_equal_engines_change_no_bit_of_the_loss(level):
  logp, old, a, mask = drawn()
  values, _ = losses.ppo_clip(logp, old, a, mask)
  weights = importance.truncated(old, old, mask, level=level)
  np.testing.assert_array_equal(weights * values, values)
  normal = importance.self_normalized(weights, mask)
  np.testing.assert_array_equal(normal, mask)


def test_m65_the_parts_of_the_distance_add():
  logp, old, _, mask = drawn()
  sampler = drawn(seed=3)[0]
  found = importance.decomposition(logp, old, sampler, mask)
  parts = found['mismatch'] + found['staleness']
  np.testing.assert_allclose(found['total'], parts, rtol=1e-12)
  fresh = importance.decomposition(old, old, sampler, mask)
  assert fresh['staleness'] == 0
  assert fresh['staleness_sample_size'] == 1
  np.testing.assert_allclose(fresh['total'], fresh['mismatch'], rtol=1e-12)


def test_m65_metrics_estimate_divergences_in_both_directions():
  """Four draws that have exactly the sampler's frequencies 1/4 and 3/4."""
  sampler = jnp.log(jnp.asarray([[0.25], [0.75], [0.75], [0.75]]))
  old = jnp.full_like(sampler, np.log(0.5))
  mask = jnp.ones(old.shape, bool)
  found = importance.mismatch_metrics(old, sampler, mask)
  forward = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
  reverse = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
  np.testing.assert_allclose(found['kl'], forward, rtol=1e-12)
  np.testing.assert_allclose(found['k3'], forward, rtol=1e-12)
  np.testing.assert_allclose(found['reverse_kl'], reverse, rtol=1e-12)
  chi = 0.25 / 0.25 + 0.25 / 0.75 - 1
  for name in ('chi_squared', 'sequence_chi_squared'):
    np.testing.assert_allclose(found[name], chi, rtol=1e-12)
  for name in ('effective_sample_size', 'sequence_effective_sample_size'):
    np.testing.assert_allclose(found[name], 1 / (1 + chi), rtol=1e-12)
  np.testing.assert_allclose(found['perplexity'], 2, rtol=1e-12)
  np.testing.assert_allclose(found['sampler_perplexity'], 2, rtol=1e-12)


def test_m65_a_bound_of_k1_is_a_bound_of_the_ratio():
  old, sampler = drawn(spread=1.0)[:2]
  mask = jnp.ones(old.shape, bool)
  bounds = {'low': -np.log(2.5), 'high': -np.log(0.5)}
  for level, name in (('token', 'token'), ('sum', 'sequence')):
    kept = masks.matched(
      old, sampler, mask, estimator='k1', level=level, **bounds
    )
    band = importance.masked(old, sampler, mask, low=0.5, high=2.5, level=name)
    np.testing.assert_array_equal(kept, band > 0)
    assert 0 < np.sum(kept) < kept.size


def test_m66_length_normalised_surrogates_point_elsewhere():
  """The first token 0 ends the response; then lengths vary."""
  policy = tabular.random_policy(0)
  ended = tabular.SEQUENCES[:, 0] == 0
  mask = jnp.asarray(np.stack([np.ones_like(ended), ~ended], axis=1))
  rewards = jnp.where(ended, 0.7, tabular.rewards())
  old = tabular.logprobs(policy)

  def slope(scale):
    def loss(x):
      a = jnp.broadcast_to(rewards[:, None], x.shape)
      return scale * losses.ppo_clip(x, old, a, mask)[0]

    found = tabular.expected_gradient(loss, policy)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

  truth = jax.grad(lambda p: -jnp.sum(tabular.probabilities(p) * rewards))
  truth = np.concatenate([np.ravel(x) for x in jax.tree.leaves(truth(policy))])
  np.testing.assert_allclose(slope(1.0), truth, atol=1e-12)
  normed = slope(1 / jnp.sum(mask, axis=1, keepdims=True))
  cosine = normed @ truth / np.linalg.norm(normed) / np.linalg.norm(truth)
  assert cosine < 0.99


def test_m67_products_spread_with_length_and_means_gather():
  rng, size = np.random.default_rng(0), 0.05
  for length, product in ((100, 0.284), (1000, 11.2)):
    assert abs(np.exp(length * size**2) - 1 - product) < 0.05
    d = size * rng.standard_normal((4000, length)) - size**2 / 2
    old = jnp.zeros(d.shape)
    mask = jnp.ones(d.shape, bool)
    mean = importance.sequence_ratio(jnp.asarray(d), old, mask)
    np.testing.assert_allclose(np.var(mean), size**2 / length, rtol=0.1)
    if length == 100:  # at 1000 the samples miss the tail that makes it
      whole = importance.product_ratio(jnp.asarray(d), old, mask)
      np.testing.assert_allclose(np.var(whole), product, rtol=0.2)
      every = jnp.ones(len(d), bool)
      share = importance.effective_sample_size(whole, every)
      np.testing.assert_allclose(share, 1 / (1 + product), rtol=0.05)


def test_m68_only_sequences_of_negative_advantage_go():
  logp, sampler, a, mask = drawn(rows=12, spread=0.5)
  a = jnp.sign(a[:, :1]).at[0].set(0.0) * jnp.ones_like(a)
  delta = 0.05
  found = masks.off_policy_sequences(logp, sampler, a, mask, threshold=delta)
  s = importance.sequence_ratio(logp, sampler, mask)[:, None]
  expected = mask & ~((a < 0) & (s < np.exp(-delta)))
  np.testing.assert_array_equal(found, expected)
  gone = np.any(mask & ~found, axis=1)
  assert 0 < gone.sum() < (a[:, 0] < 0).sum()
  kept = masks.off_policy_sequences(logp, sampler, a, mask, threshold=jnp.inf)
  np.testing.assert_array_equal(kept, mask)


def test_m70_all_candidates_kept_is_no_filter():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.standard_normal((2, 3, 4)))
  tokens = jnp.asarray(rng.integers(0, 4, (2, 3)))
  kept = jnp.broadcast_to(jnp.arange(4), logits.shape)
  plain = logprobs.token_logprobs(logits, tokens)
  np.testing.assert_allclose(
    logprobs.kept_token_logprobs(logits, tokens, kept), plain, rtol=1e-12
  )


def test_m70_without_the_mask_a_fresh_policy_is_clipped():
  """At equal weights the ratio is the kept mass, and 0.7 is below 1 − ε."""
  probs = jnp.asarray([[[0.5, 0.2, 0.3]]])
  tokens, kept = jnp.asarray([[0]]), jnp.asarray([[[0, 1, -1]]])
  sampler = logprobs.kept_token_logprobs(jnp.log(probs), tokens, kept)
  mask, a = jnp.ones((1, 1), bool), row(-1.0)
  plain = logprobs.token_logprobs(jnp.log(probs), tokens)
  _, metrics = losses.ppo_clip(plain, sampler, a, mask)
  np.testing.assert_allclose(metrics['ratio'], 0.7, rtol=1e-12)
  assert metrics['clip_low'] == 1
  np.testing.assert_array_equal(gradient(plain, sampler, a, mask), 0)
  _, metrics = losses.ppo_clip(sampler, sampler, a, mask)
  assert metrics['ratio'] == 1
  assert metrics['clip_low'] == 0


def test_m73_counts_are_exact_and_other_gradients_stay():
  logp, old, a, mask = drawn(rows=20, length=10)
  options = {'low': 0.01, 'high': 9.0, 'clip_low': 0.2, 'clip_high': 0.2}
  args = (logp, old, a, mask)
  n = int(np.sum(mask))
  before = np.asarray(gradient(*args))
  for fraction in (0.1, 0.03, 1e-6):
    kept = masks.covariance(
      *args, jax.random.key(0), fraction=fraction, **options
    )
    dropped = np.asarray(mask & ~kept)
    assert dropped.sum() == max(int(fraction * n), 1)
    weights = jnp.where(kept, 1.0, 0)
    after = np.asarray(gradient(*args, weights))
    np.testing.assert_array_equal(after[~dropped], before[~dropped])
    np.testing.assert_array_equal(after[dropped], 0)
    assert np.all(before[dropped] != 0)  # the clipped are not eligible
  none = masks.covariance(*args, jax.random.key(0), low=1e3, high=1e4)
  np.testing.assert_array_equal(none, mask)
  every = masks.covariance(*args, jax.random.key(0), fraction=1.0, **options)
  other = masks.covariance(*args, jax.random.key(1), fraction=1.0, **options)
  np.testing.assert_array_equal(every, other)


def test_m73_the_draw_depends_on_the_key():
  logp, old, a, mask = drawn(rows=20, length=10)
  found = [
    masks.covariance(
      logp, old, a, mask, jax.random.key(i), fraction=0.1, low=0.0
    )
    for i in (0, 0, 1)
  ]
  np.testing.assert_array_equal(found[0], found[1])
  assert np.any(found[0] != found[2])


def test_m74_the_share_is_no_percentage():
  logp, _, a, _ = drawn(rows=10, length=10)
  mask = jnp.ones(logp.shape, bool)
  for fraction, count in ((0.0, 0), (1e-9, 1), (0.07, 7), (0.29, 29), (1, 100)):
    found = masks.top_covariance(logp, a, mask, fraction=fraction)
    assert np.sum(found) == count
  scores = np.asarray((logp - jnp.mean(logp)) * (a - jnp.mean(a)))
  found = np.asarray(masks.top_covariance(logp, a, mask, fraction=0.1))
  assert scores[found].min() > scores[~found].max()


def test_top_entropy_keeps_the_upper_quantile():
  entropy = jnp.asarray(
    np.random.default_rng(0).permutation(100.0 * np.arange(101))
  )
  entropy, mask = entropy[None], jnp.ones((1, 101), bool)
  for fraction in (0.2, 0.05, 0.01, 1.0):
    found = masks.top_entropy(entropy, mask, fraction=fraction)
    bound = np.quantile(entropy, 1 - fraction)
    np.testing.assert_array_equal(found, entropy >= bound - 1e-6)


TINY = {
  'vocab_size': 11, 'num_layers': 3, 'model_dim': 8, 'mlp_dim': 12,
  'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 4, 'max_length': 8,
  'dtype': 'float64', 'param_dtype': 'float64', 'tie_embeddings': False,
}  # fmt: skip


def layer_logprobs(params, tokens, depth):
  """Of the policy after some layers: a model that ends there."""
  model = transformer(Config(**TINY | {'num_layers': depth}))
  short = params | {
    'layers': jax.tree.map(lambda x: x[:depth], params['layers'])
  }
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = model.hidden(
    short, tokens, positions=positions, segment_ids=jnp.ones_like(tokens)
  )
  return logprobs.map_time_chunks(
    logprobs.token_logprobs,
    lambda h: model.unembed(short, h),
    hidden,
    tokens,
    chunk_size=2,
  )


def test_m77_the_last_layer_is_the_model_and_later_layers_have_no_gradient():
  model = transformer(Config(**TINY))
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)
  mask = jnp.ones(tokens.shape, bool)

  def model_logprobs(params):
    positions = jnp.broadcast_to(jnp.arange(5), tokens.shape)
    hidden, _ = model.hidden(
      params, tokens, positions=positions, segment_ids=jnp.ones_like(tokens)
    )
    return logprobs.token_logprobs(model.unembed(params, hidden), tokens)

  def loss(params):
    logp = layer_logprobs(params, tokens, 2)
    old = jax.lax.stop_gradient(logp)
    values, _ = losses.ppo_clip(logp, old, jnp.ones_like(old), mask)
    return jnp.sum(values), logp

  @jax.jit
  def everything(params):
    whole, last = model_logprobs(params), layer_logprobs(params, tokens, 3)
    return whole, last, *jax.grad(loss, has_aux=True)(params)

  whole, last, gradient, inner = everything(params)
  np.testing.assert_allclose(last, whole, rtol=1e-12)
  assert np.max(np.abs(inner - whole)) > 1e-6
  for leaf in jax.tree.leaves(gradient['layers']):
    np.testing.assert_array_equal(leaf[2], 0)
    assert np.any(np.asarray(leaf[:2]) != 0)


def test_m77_logits_of_the_residual_stream_are_those_of_its_parts():
  rng = np.random.default_rng(0)
  parts = jnp.asarray(rng.standard_normal((4, 2, 3, 6)))  # what each layer adds
  table = jnp.asarray(rng.standard_normal((6, 11)))
  tokens = jnp.asarray(rng.integers(0, 11, (2, 3)))
  stream = jnp.cumsum(parts, axis=0)
  logits = sum(part @ table for part in parts)
  found = logprobs.token_logprobs(stream[-1] @ table, tokens)
  expected = logprobs.token_logprobs(logits, tokens)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  heat = jnp.stack([logprobs.token_entropy(h @ table) for h in stream])
  change = jnp.sum(jnp.diff(heat, axis=0), axis=0)
  np.testing.assert_allclose(change, heat[-1] - heat[0], atol=1e-12)


def test_unknown_choices_name_the_remedy():
  x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
  for fn, args, options in (
    (losses.dppo, (x, x, x, mask), {'divergence': 'js'}),
    (masks.matched, (x, x, mask), {'estimator': 'k4'}),
    (masks.matched, (x, x, mask), {'level': 'word'}),
    (masks.unsolved, (x, mask), {'level': 'word'}),
    (importance.self_normalized, (x, mask), {'level': 'word'}),
  ):
    with pytest.raises(Exception, match=next(iter(options))):
      fn(*args, **options)
