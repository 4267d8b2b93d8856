"""Completions that go on: cut anywhere, they are those of one call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain.data.buckets import padded
from postrain.models.transformer import Config, transformer
from postrain.models.wrap import plain
from postrain.sampling import ended, extend, sample
from postrain.scoring import score
from postrain.types import Samples

quick_compiler = tiny.quick_compiler

VOCAB, PAD, STOPS, GROUP, NEW, STEPS = 13, 0, (3, 4), 3, 7, 3


CHOICES = {
  'greedy': {'temperature': 0.0},
  'sampled': {'temperature': 0.8, 'top_k': 8, 'top_p': 0.9},
}


@functools.cache
def policy(caches):
  """A transformer with a window, and without a position to spare."""
  network = transformer(
    Config(
      vocab_size=VOCAB, num_layers=1, model_dim=16, mlp_dim=16, num_heads=2,
      num_kv_heads=1, head_dim=8, max_length=5 + NEW, sliding_window=4,
      layer_types=('sliding',),
    )
  )  # fmt: skip
  params = jax.jit(network.init)(jax.random.key(0))
  draw = np.random.default_rng(1)  # initial logits are close to uniform
  params = jax.tree.map(
    lambda x: x + 0.5 * jnp.asarray(draw.standard_normal(x.shape), x.dtype),
    params,
  )

  def hidden(params, tokens, positions, segment_ids):
    where = dict(positions=positions, segment_ids=segment_ids)
    return network.hidden(params, tokens, **where)[0]

  if caches:
    return network, params
  return plain(network.init, hidden, network.unembed, VOCAB), params


def prompts():
  """Three prompts of 5, 2 and 4 tokens, of other numbers than their places."""
  rows = [[3, 1, 4, 1, 9], [2, 6], [8, 7, 10, 12]]
  tokens, mask = padded(rows, length=5, pad_id=PAD, side='left')
  return tokens, mask, jax.random.key(3), np.array([7, 2, 4])


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(model, choice, params, tokens, mask, key, ids):
  return sample(
    model, params, tokens, mask, key, num_samples=GROUP, max_new_tokens=NEW,
    stop_ids=STOPS, pad_id=PAD, prompt_ids=ids, **CHOICES[choice],
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def extended(model, choice, params, so_far, version, *where):
  tokens, mask, key, ids = where
  return extend(
    model, params, tokens, mask, so_far, key, max_steps=STEPS,
    stop_ids=STOPS, version=version, prompt_ids=ids, **CHOICES[choice],
  )  # fmt: skip


@functools.cache
def whole(choice: str) -> Samples:
  """What one call of the sampler gives."""
  model, params = policy(True)
  samples = jax.device_get(drawn(model, choice, params, *prompts()))
  lengths = samples.mask.sum(-1)
  assert 1 <= lengths.min() < NEW  # some end on their own, some do not
  assert samples.truncated.any()
  return samples


def cut(samples: Samples, lengths: np.ndarray) -> Samples:
  """The first tokens of each row, as they were before it went on."""
  mask = samples.mask & (np.arange(NEW) < lengths[:, None])
  return Samples(
    np.where(mask, samples.tokens, PAD),
    mask,
    np.where(mask, samples.sampler_logprobs, 0),
    np.where(mask, samples.model_logprobs, 0),
    samples.truncated & mask.all(-1),
    version=np.zeros(mask.shape, np.int32),
  )


def check_same(found: Samples, expected: Samples) -> None:
  for name in ('tokens', 'mask', 'truncated'):
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
  for name in ('sampler_logprobs', 'model_logprobs'):
    np.testing.assert_allclose(
      getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
  ('choice', 'caches'),
  [('greedy', True), ('sampled', True), ('sampled', False)],
  ids=['greedy', 'sampled', 'sampled-buffer'],
)
@pytest.mark.parametrize('begun', [True, False], ids=['begun', 'empty'])
def test_rows_cut_anywhere_end_as_they_would_have(begun, choice, caches):
  model, params = policy(caches)
  expected = whole(choice)
  limits = expected.mask.sum(-1)
  counts = np.array([0, 3, 1, 6, 2, 7, 5, 4, 0]) * begun
  samples = cut(expected, counts)
  for call in range(1, 4):
    before = samples
    samples = jax.device_get(
      extended(model, choice, params, samples, call, *prompts())
    )
    mask, counts = samples.mask, np.minimum(limits, counts + STEPS)
    check_same(samples, cut(expected, counts))
    np.testing.assert_array_equal(ended(samples, STOPS), counts == limits)
    stamped = np.where(mask & ~before.mask, call, before.version)
    np.testing.assert_array_equal(samples.version, stamped)
  check_same(samples, expected)


def test_new_tokens_are_of_the_new_parameters():
  model, params = policy(True)
  before = cut(whole('sampled'), np.full(3 * GROUP, 3))
  moved = jax.tree.map(lambda x: 1.1 * x, params)
  where = prompts()
  found = jax.device_get(extended(model, 'sampled', moved, before, 1, *where))
  tokens, mask = (np.repeat(x, GROUP, axis=0) for x in where[:2])
  scored = jax.jit(score, static_argnums=0)(
    model,
    moved,
    np.concatenate([tokens, found.tokens], axis=1),
    np.concatenate([mask, found.mask], axis=1),
    np.concatenate([np.zeros_like(mask), found.mask], axis=1),
  )
  scores = np.asarray(scored.model_logprobs[:, 5:])
  expected = np.where(before.mask, before.model_logprobs, scores)
  assert (found.mask & ~before.mask).any()
  np.testing.assert_allclose(found.model_logprobs, expected, rtol=0, atol=1e-5)
  gap = np.abs(scores - before.model_logprobs)
  assert gap[before.mask].max() > 1e-2


def test_without_a_stop_token_rows_end_when_they_are_full():
  samples = cut(whole('sampled'), np.arange(3 * GROUP))
  np.testing.assert_array_equal(ended(samples, ()), samples.mask.all(-1))


@pytest.mark.parametrize(
  ('steps', 'changes', 'message'),
  [
    (0, {}, 'max_steps=0: it must be at least 1'),
    (1, {'kept': np.zeros((9, NEW, 2), int)}, 'samples.kept is recorded'),
  ],
)
def test_what_cannot_go_on(steps, changes, message):
  model, params = policy(True)
  before = cut(whole('greedy'), np.full(3 * GROUP, 2))
  with pytest.raises(ValueError, match=message):
    extend(
      model, params, *map(jnp.asarray, prompts()[:2]),
      before._replace(**changes), jax.random.key(0), max_steps=steps,
      stop_ids=STOPS,
    )  # fmt: skip
