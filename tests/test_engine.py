"""Sampling in slots: what the plain loop gives, whatever the slots."""

import dataclasses
import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling import (
  GROUP,
  NEW,
  PAD,
  QUICKLY,
  assert_same,
  jitted,
  network,
  prompts,
)

from postrain import sharding
from postrain.models.transformer import Config, transformer
from postrain.models.wrap import plain
from postrain.sampling import sample, sample_in_slots

STOPS = (10, 3, 7)
NUM = 3 * GROUP


@functools.partial(
  jax.jit, static_argnames=('model', 'options'), compiler_options=QUICKLY
)
def in_slots(model, params, tokens, mask, key, prompt_ids, options):
  choices = {'num_samples': GROUP, 'max_new_tokens': NEW, **dict(options)}
  return sample_in_slots(
    model, params, tokens, mask, key, stop_ids=STOPS, pad_id=PAD,
    prompt_ids=prompt_ids, **choices,
  )  # fmt: skip


def slots(seed=0, *, num_slots=4, num_halvings=1, only=None, **options):
  """Completions of the three prompts, or of those chosen, by their numbers."""
  model, params = network()
  only = jnp.arange(3) if only is None else jnp.asarray(only)
  tokens, mask = (x[only] for x in prompts())
  options |= dict(num_slots=num_slots, num_halvings=num_halvings)
  options = tuple(sorted(options.items()))
  key = jax.random.key(seed)
  return in_slots(model, params, tokens, mask, key, only, options)


def loop(seed=0, **options):
  model, params = network()
  options = tuple(sorted(options.items()))
  key = jax.random.key(seed)
  return jitted(
    model, params, *prompts(), key, STOPS, options, jnp.arange(3), 1.0
  )


def test_slots_give_what_the_plain_loop_gives():
  for seed in range(4):
    expected = loop(seed)
    assert_same(slots(seed), expected)
    assert 0 < expected.truncated.sum() < NUM
    assert len(np.unique(expected.mask.sum(1))) > 3


@pytest.mark.parametrize('number', [2, 3, 99])
def test_a_cache_that_grows_changes_no_token(number):
  for seed in range(4):
    assert_same(loop(seed, num_cache_sizes=number), loop(seed))


def test_more_slots_than_sequences_and_what_filters_kept():
  options = dict(top_k=6, top_p=0.8, min_p=0.1, record_kept=True)
  assert_same(slots(num_slots=99, num_halvings=0, **options), loop(**options))
  with pytest.raises(ValueError, match='needs top_k'):
    slots(record_kept=True)


def test_one_token_fills_no_slot():
  found, longer = slots(num_halvings=0, max_new_tokens=1), loop()
  np.testing.assert_array_equal(found.tokens, longer.tokens[:, :1])
  assert found.mask.all()
  np.testing.assert_array_equal(
    found.truncated, ~np.isin(found.tokens[:, 0], STOPS)
  )


def test_the_queue_may_be_in_any_order_and_in_several_calls():
  expected = loop()
  for order in ([2, 0, 1], [1]):
    found = slots(only=order)
    for place, prompt in enumerate(order):
      assert_same(group(found, place), group(expected, prompt))


def group(samples, prompt):
  return jax.tree.map(
    lambda x: x[prompt * GROUP : (prompt + 1) * GROUP], samples
  )


def test_no_slot_waits_while_a_sequence_does():
  """As many steps as it takes to hand each sequence to the first free slot."""
  model, params = network()
  calls = []

  def hidden(params, tokens, **where):
    jax.debug.callback(lambda _: calls.append(1), tokens[0, 0])
    return model.hidden(params, tokens, **where)

  counted = dataclasses.replace(model, hidden=hidden)
  samples = jax.jit(
    lambda: sample_in_slots(
      counted, params, *prompts(), jax.random.key(0), num_slots=4,
      num_halvings=1, num_samples=GROUP, max_new_tokens=NEW, stop_ids=STOPS,
      pad_id=PAD,
    ), compiler_options=QUICKLY,
  )()  # fmt: skip
  jax.effects_barrier()
  free_at = [0] * 4
  for length in np.asarray(samples.mask.sum(1)):
    if length > 1:  # first tokens come from the prompts
      heapq.heapreplace(free_at, free_at[0] + length - 1)
  assert len(calls) == 1 + max(free_at)


def test_routing_is_recorded_and_windows_slide():
  model = transformer(
    Config(
      vocab_size=13, num_layers=1, model_dim=8, mlp_dim=8, num_heads=1,
      num_kv_heads=1, head_dim=8, max_length=32, num_experts=16,
      experts_per_token=2, layer_types=('sliding',), sliding_window=3,
    )
  )  # fmt: skip
  params = jax.jit(model.init)(jax.random.key(0))
  options = dict(
    num_samples=2, max_new_tokens=8, stop_ids=STOPS, pad_id=PAD,
    record_routing=True,
  )  # fmt: skip

  def run(fn, **more):
    inputs = (params, *prompts(), jax.random.key(1))
    return jax.jit(
      functools.partial(fn, model, **options, **more), compiler_options=QUICKLY
    )(*inputs)

  assert_same(run(sample_in_slots, num_slots=1), run(sample))


def test_rows_on_several_devices():
  model, params = network()
  mesh = sharding.make_mesh(data=2)
  options = (('num_halvings', 1), ('num_slots', 4))
  with sharding.on(mesh):
    rows = sharding.put_rows(mesh, tuple(x[:2] for x in prompts()))
    found = in_slots(
      model, params, *rows, jax.random.key(0), jnp.arange(2), options
    )
  expected = loop()
  for prompt in range(2):
    assert_same(group(found, prompt), group(expected, prompt))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (dict(num_slots=0), 'num_slots=0: it must be at least 1'),
    (dict(num_halvings=-1), 'num_halvings=-1'),
    (
      dict(model=plain(dict, lambda *_: 0, lambda *_: 0, 13)),
      'is a Buffer, whose rows cannot be refilled: sample without slots',
    ),
  ],
  ids=['slots', 'halvings', 'cache'],
)
def test_errors_name_the_value_and_the_remedy(change, said):
  model, params = network()
  given = dict(
    model=model, params=params, prompts=prompts()[0], prompt_mask=prompts()[1],
    key=jax.random.key(0), num_slots=4, num_halvings=1, num_samples=2,
    max_new_tokens=2, stop_ids=(), pad_id=PAD,
  )  # fmt: skip
  with pytest.raises(ValueError, match=said):
    sample_in_slots(**{**given, **change})
