"""The sampler against repeated full forwards and enumerated distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain.data.buckets import bucket, bucket_sizes, padded
from postrain.logprobs import kept_token_logprobs, token_logprobs
from postrain.models.transformer import Config, transformer
from postrain.models.wrap import plain
from postrain.sampling import sample
from postrain.scoring import hidden_states, score
from postrain.tasks.tabular import enumeration, tabular_policy

VOCAB, PAD, STOP = 13, 0, 10
GROUP, NEW = 3, 6
FILTERS = {
  'none': {},
  'top-k': {'top_k': 4},
  'top-p': {'top_k': VOCAB, 'top_p': 0.6},
  'min-p': {'top_k': VOCAB, 'min_p': 0.15},
  'all': {'top_k': 6, 'top_p': 0.8, 'min_p': 0.1},
}
QUICKLY = {'xla_backend_optimization_level': 0}  # for the compiler
TEMPERATURES = (0.7, 1.0, 1.3)
each_filter = pytest.mark.parametrize('name', FILTERS)
each_temperature = pytest.mark.parametrize('temperature', TEMPERATURES)


@functools.cache
def network():
  model = transformer(
    Config(
      vocab_size=VOCAB, num_layers=1, model_dim=16, mlp_dim=16, num_heads=2,
      num_kv_heads=1, head_dim=8, max_length=80,
    )
  )  # fmt: skip
  params = jax.jit(model.init)(jax.random.key(0))
  draw = np.random.default_rng(1)  # initial logits are close to uniform
  return model, jax.tree.map(
    lambda x: x + 0.5 * jnp.asarray(draw.standard_normal(x.shape), x.dtype),
    params,
  )


def prompts():
  """Three prompts of 5, 2 and 4 tokens, padded on the left with a real id."""
  rows = [[3, 1, 4, 1, 9], [2, 6], [8, 7, 10, 12]]
  tokens, mask = padded(rows, length=6, pad_id=PAD, side='left')
  return jnp.asarray(tokens), jnp.asarray(mask)


@functools.partial(
  jax.jit,
  static_argnames=('model', 'stop_ids', 'options'),
  compiler_options=QUICKLY,
)
def jitted(
  model, params, tokens, mask, key, stop_ids, options, prompt_ids, temperature
):
  choices = {'num_samples': GROUP, 'max_new_tokens': NEW, **dict(options)}
  return sample(
    model, params, tokens, mask, key, stop_ids=stop_ids, pad_id=PAD,
    prompt_ids=prompt_ids, **{'temperature': temperature, **choices},
  )  # fmt: skip


def greedy(**options):
  """Temperature 0 is a choice of the program, not a number that it takes."""
  return draw(stop_ids=(), **options, temperature=None)


def draw(
  *, seed=0, stop_ids=(STOP,), only=None, prompt_ids=None, temperature=1.0,
  **options,
):  # fmt: skip
  """Sample completions of the three prompts, or of those chosen."""
  model, params = network()
  tokens, mask = prompts()
  if only is not None:
    only = jnp.asarray(only)
    tokens, mask = tokens[only], mask[only]
  if temperature is None:
    options |= {'temperature': 0.0}
  options = tuple(sorted(options.items()))
  key = jax.random.key(seed)
  return jitted(
    model, params, tokens, mask, key, stop_ids, options, prompt_ids, temperature
  )


def joined(samples):
  tokens, mask = (jnp.repeat(x, GROUP, axis=0) for x in prompts())
  blank = jnp.zeros(mask.shape, bool)
  return (
    jnp.concatenate([tokens, samples.tokens], axis=1),
    jnp.concatenate([mask, samples.mask], axis=1),
    jnp.concatenate([blank, samples.mask], axis=1),
  )


scored = jax.jit(score, static_argnums=0, compiler_options=QUICKLY)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def next_logits(model, params, tokens, valid):
  """Logits of every completion slot from one forward without a cache."""
  hidden = hidden_states(model, params, tokens, valid, jnp.ones_like(valid))
  return model.unembed(params, hidden[:, prompts()[0].shape[1] :])


def test_greedy_decode_is_the_argmax_of_repeated_full_forwards():
  model, params = network()
  samples = greedy()
  tokens, mask = (jnp.repeat(x, GROUP, axis=0) for x in prompts())
  tokens = jnp.pad(tokens, ((0, 0), (0, NEW)))
  for t in range(NEW):
    valid = jnp.pad(mask, ((0, 0), (0, t)), constant_values=True)
    valid = jnp.pad(valid, ((0, 0), (0, NEW - t)))
    best = jnp.argmax(next_logits(model, params, tokens, valid)[:, t], axis=-1)
    tokens = tokens.at[:, -NEW + t].set(best)
  np.testing.assert_array_equal(samples.tokens, tokens[:, -NEW:])
  assert len(np.unique(samples.tokens)) > 2  # not a model of one word
  np.testing.assert_array_equal(samples.sampler_logprobs, 0)


@each_filter
@each_temperature
def test_logprobs_are_those_of_the_learner(temperature, name):
  model, params = network()
  options = FILTERS[name]
  samples = draw(temperature=temperature, record_kept=name != 'none', **options)
  tokens, valid, mask = joined(samples)
  slots = samples.tokens.shape[1]
  scores = scored(model, params, tokens, valid, mask, temperature=temperature)
  scores = jax.tree.map(lambda x: x[:, -slots:], scores)
  np.testing.assert_allclose(
    samples.model_logprobs, scores.model_logprobs, rtol=0, atol=1e-5
  )
  if name == 'none':
    assert samples.kept is None
    expected = scores.logprobs
  else:
    logits = next_logits(model, params, tokens, valid)
    expected = kept_token_logprobs(
      logits, samples.tokens, samples.kept, temperature=temperature
    )
    expected = jnp.where(samples.mask, expected, 0)
    sizes = (samples.kept >= 0).sum(-1)[samples.mask]
    assert sizes.max() <= options['top_k']
    assert sizes.min() < VOCAB
    assert (samples.kept[~samples.mask] == -1).all()
  np.testing.assert_allclose(
    samples.sampler_logprobs, expected, rtol=0, atol=1e-5
  )
  assert (samples.sampler_logprobs < 0).any()


def filtered(logits, temperature, *, top_k=None, top_p=None, min_p=None):
  """The distribution of the next token, by the definitions, one at a time."""
  scaled = np.asarray(logits, float) / temperature
  probs = np.exp(scaled - scaled.max())
  order = np.argsort(-probs, kind='stable')[: top_k or len(probs)]
  among = probs[order] / probs[order].sum()
  kept = []
  for rank, token in enumerate(order):
    enough = top_p is not None and among[:rank].sum() >= top_p
    unlikely = min_p is not None and among[rank] < min_p * among[0]
    if rank == 0 or not (enough or unlikely):
      kept.append(token)
  out = np.zeros(len(probs))
  out[kept] = probs[kept] / probs[kept].sum()
  return out


@each_filter
@each_temperature
def test_frequencies_are_those_of_the_filtered_distribution(temperature, name):
  """20,000 samples, all positions, all sequences: chi squared below 6 sigma."""
  vocab, length, count = 3, 3, 20_000
  options = {
    k: min(v, 2 if name in ('top-k', 'all') else vocab) if k == 'top_k' else v
    for k, v in FILTERS[name].items()
  }
  if name == 'min-p':
    options['min_p'] = 0.7
  model = tabular_policy(vocab_size=vocab, length=length)
  params = model.init(jax.random.key(3))
  sizes = {'num_samples': count, 'max_new_tokens': length}
  samples = jitted(
    model, params, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool),
    jax.random.key(7), (), tuple(sorted((options | sizes).items())), None,
    temperature,
  )  # fmt: skip
  table = {
    'logits': jnp.log(
      jnp.array(
        [filtered(row, temperature, **options) for row in params['logits']]
      )
    )
  }
  every = enumeration(table, length=length)
  probs = np.exp(np.asarray(every.logprobs, float).sum(-1))
  assert probs.sum() == pytest.approx(1, abs=1e-5)
  if name != 'none':
    assert (probs == 0).any()
  places = vocab ** np.arange(length - 1, -1, -1)
  drawn = np.bincount(samples.tokens @ places, minlength=vocab**length)
  assert not drawn[probs == 0].any()
  bound_chi_squared(drawn, probs * count)
  for t in range(length):  # marginals are stricter on each token
    marginal = np.bincount(every.tokens[:, t], probs * count)
    bound_chi_squared(np.bincount(samples.tokens[:, t], minlength=3), marginal)
  found = np.exp(np.asarray(samples.sampler_logprobs, float).sum(-1))
  np.testing.assert_allclose(found, probs[samples.tokens @ places], rtol=1e-4)


def bound_chi_squared(drawn, wanted):
  drawn, wanted = drawn[wanted > 0], wanted[wanted > 0]
  freedom = max(len(wanted) - 1, 1)
  statistic = np.sum((drawn - wanted) ** 2 / wanted)
  assert statistic < freedom + 6 * np.sqrt(2 * freedom)


def test_two_calls_of_one_shape_trace_once():
  model, params = network()
  tokens, mask = prompts()
  traced = []

  def once(params, tokens, mask, key, temperature):
    traced.append(tokens.shape)
    return sample(
      model, params, tokens, mask, key, num_samples=2, max_new_tokens=3,
      stop_ids=(STOP,), pad_id=PAD, temperature=temperature,
    )  # fmt: skip

  compiled = jax.jit(once, compiler_options=QUICKLY)
  first = compiled(params, tokens, mask, jax.random.key(0), 1.0)
  second = compiled(params, tokens + 1, ~mask, jax.random.key(1), 0.7)
  assert traced == [tokens.shape]
  assert not jnp.array_equal(first.tokens, second.tokens)


def test_fifty_prompt_lengths_are_six_shapes_at_most():
  sizes = bucket_sizes(50)
  model = tabular_policy(vocab_size=2, length=2)
  params = model.init(jax.random.key(0))
  traced = []

  def once(tokens, mask, key):
    traced.append(tokens.shape)
    return sample(
      model, params, tokens, mask, key, num_samples=2, max_new_tokens=2,
      stop_ids=(), pad_id=0,
    )  # fmt: skip

  compiled = jax.jit(once, compiler_options=QUICKLY)
  before = len(tiny.compilations)
  for length in range(1, 51):
    tokens, mask = padded(
      [[1] * length], length=bucket(length, sizes), pad_id=0, side='left'
    )
    compiled(jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(length))
  assert len(traced) == len(set(traced)) <= 6
  assert tiny.compilations[before:].count('jit(once)') == len(traced)


def test_the_stop_token_is_kept_and_nothing_after_it():
  samples = draw(seed=4)
  tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
  ended = 0
  for row, chosen, truncated in zip(
    tokens, mask, samples.truncated, strict=True
  ):
    stops = np.flatnonzero(row == STOP)
    length = stops[0] + 1 if stops.size else NEW
    np.testing.assert_array_equal(chosen, np.arange(NEW) < length)
    np.testing.assert_array_equal(row[length:], PAD)
    assert truncated == (stops.size == 0)
    ended += stops.size > 0
  assert 0 < ended < len(tokens)
  for figures in (samples.sampler_logprobs, samples.model_logprobs):
    np.testing.assert_array_equal(np.asarray(figures)[~mask], 0)
    assert (np.asarray(figures)[mask] < 0).all()


def test_a_stop_in_the_last_slot_is_no_truncation():
  tokens = np.asarray(greedy().tokens)[::GROUP]
  row, last = next(
    (row, t)
    for row in range(3)
    for t in range(1, NEW)
    if tokens[row, t] not in tokens[row, :t]
  )
  ended = draw(
    temperature=None,
    stop_ids=(int(tokens[row, last]),),
    max_new_tokens=last + 1,
    num_samples=1,
  )
  np.testing.assert_array_equal(ended.tokens[row], tokens[row, : last + 1])
  assert ended.mask[row].all()
  assert not ended.truncated[row]


def assert_same(found, expected):
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    if a.dtype == jnp.float32:
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    else:
      np.testing.assert_array_equal(a, b)


def of(samples, prompt, number=GROUP):
  size = len(samples.tokens) // 3
  return jax.tree.map(
    lambda x: x[prompt * size : prompt * size + number], samples
  )


def test_samples_depend_on_no_neighbour():
  """Neither on other prompts, nor their order, nor the number of samples."""
  ids = jnp.array([40, 41, 42])
  samples = draw(prompt_ids=ids)
  alone = draw(prompt_ids=ids[1:2], only=[1])
  assert_same(of(samples, 1), alone)
  swapped = draw(prompt_ids=ids[::-1], only=[2, 1, 0])
  for prompt in range(3):
    assert_same(of(swapped, 2 - prompt), of(samples, prompt))
  more = draw(prompt_ids=ids, num_samples=5, max_new_tokens=4)
  for prompt in range(3):
    np.testing.assert_array_equal(
      of(more, prompt, GROUP).tokens, of(samples, prompt).tokens[:, :4]
    )


def test_samples_depend_on_the_identity_of_the_prompt_and_on_the_key():
  same = draw(only=[1, 1, 1], prompt_ids=jnp.array([3, 3, 4]))
  first, second, other = same.tokens.reshape(3, GROUP, NEW)
  np.testing.assert_array_equal(first, second)
  assert not jnp.array_equal(first, other)
  assert len(np.unique(first, axis=0)) == GROUP
  assert not jnp.array_equal(draw(seed=1).tokens, draw(seed=2).tokens)
  default = draw()
  np.testing.assert_array_equal(
    default.tokens, draw(prompt_ids=jnp.arange(3)).tokens
  )


@pytest.mark.parametrize(('stop_at', 'calls'), [(0, 0), (2, 2), (9, 5)])
def test_the_loop_ends_with_the_last_sequence(stop_at, calls):
  """A model that stops at position ``stop_at`` is called no further."""
  counted = []

  def hidden(params, tokens, positions, segment_ids):
    jax.debug.callback(lambda _: counted.append(1), positions[0, 0])
    return (positions >= 3 + stop_at).astype(float)[..., None]

  def unembed(params, h):
    stops = jax.nn.one_hot(jnp.full(h.shape[:-1], STOP), VOCAB)
    goes = jax.nn.one_hot(jnp.full(h.shape[:-1], STOP + 1), VOCAB)
    return 99 * jnp.where(h > 0, stops, goes)

  model = plain(lambda key: jnp.zeros(1), hidden, unembed, VOCAB)
  samples = jax.jit(
    lambda: sample(
      model, jnp.zeros(1), jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), bool),
      jax.random.key(0), num_samples=2, max_new_tokens=6, stop_ids=(STOP,),
      pad_id=PAD,
    )
  )()  # fmt: skip
  jax.effects_barrier()
  assert len(counted) == 1 + calls  # the prefill and the decoding steps
  lengths = samples.mask.sum(-1)
  assert (lengths == min(stop_at + 1, 6)).all()
  assert (samples.truncated == (stop_at == 9)).all()
  assert (samples.tokens[:, stop_at + 1 :] == PAD).all()


def test_kept_sets_need_a_bound():
  with pytest.raises(ValueError, match='needs top_k'):
    draw(record_kept=True, top_p=0.9)


def test_the_model_logprob_is_that_of_the_plain_model():
  """Whatever the filters: also where only one candidate is kept."""
  samples = draw(temperature=0.7, top_k=1)
  np.testing.assert_array_equal(samples.sampler_logprobs, 0)
  tokens, valid, _ = joined(samples)
  logits = next_logits(*network(), tokens, valid)
  expected = token_logprobs(logits, samples.tokens)
  np.testing.assert_allclose(
    samples.model_logprobs, jnp.where(samples.mask, expected, 0), atol=1e-5
  )
