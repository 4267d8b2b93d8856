"""Log-probs, entropy, and that the whole logits never exist."""

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import logprob as benchmark
from postrain import importance, losses
from postrain.logprobs import (
  kept_token_logprobs,
  map_time_chunks,
  token_entropy,
  token_logprobs,
)


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def test_m01_uniform_logits():
  logits, tokens = jnp.zeros((2, 3, 8)), jnp.zeros((2, 3), int)
  found = token_logprobs(logits, tokens)
  np.testing.assert_allclose(found, -np.log(8), rtol=1e-15)


def test_m71_uniform_and_certain_entropy():
  np.testing.assert_allclose(token_entropy(jnp.zeros(7)), np.log(7), rtol=1e-15)
  sure = jnp.asarray([0.0, -jnp.inf, -jnp.inf])
  value, gradient = jax.value_and_grad(token_entropy)(sure)
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)


def test_m71_sampled_entropy_is_unbiased():
  logits = jnp.asarray([0.3, -1.0, 2.0, 0.0])
  logp = token_logprobs(jnp.tile(logits, (4, 1)), jnp.arange(4))
  np.testing.assert_allclose(
    jnp.sum(jnp.exp(logp) * -logp), token_entropy(logits), rtol=1e-12
  )


def test_large_logits_do_not_overflow():
  logits = jnp.asarray([[30000.0, 29999.0]], jnp.float32)
  found = token_logprobs(logits, jnp.asarray([0]))
  np.testing.assert_allclose(found, -np.log1p(np.exp(-1)), rtol=1e-6)


def test_m70_kept_set_brings_the_ratio_back_to_one():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.standard_normal((1, 4, 6)))
  kept = jnp.asarray([[[0, 3, -1], [1, 2, 5], [4, -1, -1], [0, 1, 2]]])
  tokens = jnp.asarray([[3, 5, 4, 0]])
  mask = jnp.ones((1, 4), bool)
  sampler = kept_token_logprobs(logits, tokens, kept)
  again = importance.ratio(
    kept_token_logprobs(logits, tokens, kept), sampler, mask
  )
  np.testing.assert_array_equal(again, 1)
  plain = importance.ratio(token_logprobs(logits, tokens), sampler, mask)
  probs = np.asarray(jax.nn.softmax(logits))[0]
  mass = [sum(probs[t, v] for v in kept[0, t] if v >= 0) for t in range(4)]
  np.testing.assert_allclose(plain[0], mass, rtol=1e-12)


def test_m70_gradient_reaches_kept_logits_only():
  logits = jnp.asarray([1.0, 0.0, -1.0, 2.0])
  gradient = jax.grad(kept_token_logprobs)(
    logits, jnp.asarray(1), jnp.asarray([1, 2, -1])
  )
  assert np.all(np.asarray(gradient)[[1, 2]] != 0)
  np.testing.assert_array_equal(np.asarray(gradient)[[0, 3]], 0)


def test_m70_tokens_outside_the_kept_set_are_impossible():
  found = kept_token_logprobs(
    jnp.zeros((1, 3)), jnp.asarray([2]), jnp.asarray([[0, 1]])
  )
  assert np.isneginf(found[0])


def shapes(jaxpr):
  """Shapes of every intermediate, inner programs included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield tuple(variable.aval.shape)
    for inner in jaxprs_in_params(equation.params):
      yield from shapes(inner)


def test_chunked_gradient_never_holds_all_logits():
  batch, length, vocab = 2, 10, 13
  hidden = jnp.ones((batch, length, 3))
  table = jnp.ones((3, vocab))
  tokens = jnp.zeros((batch, length), int)

  def loss(table, hidden):
    logp = map_time_chunks(
      token_logprobs,
      lambda h: jnp.einsum('btd,dv->btv', h, table),
      hidden,
      tokens,
      chunk_size=4,
    )
    mask = jnp.ones((batch, length), bool)
    return jnp.sum(losses.negative_log_likelihood(logp, mask)[0])

  program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(table, hidden)
  largest = max(
    int(np.prod(s)) for s in shapes(program.jaxpr) if s and s[-1] == vocab
  )
  assert largest == batch * 4 * vocab


def test_chunks_map_trees_and_extra_axes():
  hidden = jnp.arange(20.0).reshape(2, 5, 2)
  extra = jnp.arange(30).reshape(2, 5, 3)

  def fn(logits, extra):
    return {'sum': jnp.sum(logits, -1), 'extra': 2 * extra}

  found = map_time_chunks(fn, lambda h: 3 * h, hidden, extra, chunk_size=2)
  np.testing.assert_array_equal(found['sum'], 3 * jnp.sum(hidden, -1))
  np.testing.assert_array_equal(found['extra'], 2 * extra)


def test_chunk_size_must_be_positive():
  with pytest.raises(ValueError, match='chunk_size is 0'):
    map_time_chunks(
      lambda z: z, lambda h: h, jnp.zeros((1, 2, 3)), chunk_size=0
    )


def test_a_gradient_in_chunks_needs_one_copy_of_a_chunk_of_logits():
  """Beside the gradient of the head, as `benchmarks/logprob.py` shows it."""
  with jax.enable_x64(False):
    whole = benchmark.temporaries(benchmark.program(None, False))
    for chunk, share in ((16, 0.08), (8, 0.04)):
      found = benchmark.temporaries(benchmark.program(chunk, True))
      assert 0 < found < share * whole
