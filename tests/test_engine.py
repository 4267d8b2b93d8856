"""Sampling in slots: what the plain loop gives, whatever the slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling import (
  GROUP,
  NEW,
  PAD,
  QUICKLY,
  STOP,
  assert_same,
  jitted,
  network,
  prompts,
)

from postrain.models.wrap import plain
from postrain.sampling import sample_in_slots

STOPS = (STOP, 3, 7)


@functools.partial(
  jax.jit, static_argnames=('model', 'options'), compiler_options=QUICKLY
)
def in_slots(model, params, tokens, mask, key, prompt_ids, options):
  choices = {'num_samples': GROUP, 'max_new_tokens': NEW, **dict(options)}
  return sample_in_slots(
    model, params, tokens, mask, key, stop_ids=STOPS, pad_id=PAD,
    prompt_ids=prompt_ids, **choices,
  )  # fmt: skip


def both(seed=0, *, num_slots, num_halvings=0, prompt_ids=None, **options):
  """The same samples in slots and in the plain loop."""
  model, params = network()
  tokens, mask = prompts()
  key, shared = jax.random.key(seed), tuple(sorted(options.items()))
  found = in_slots(
    model, params, tokens, mask, key, prompt_ids,
    (*shared, ('num_slots', num_slots), ('num_halvings', num_halvings)),
  )  # fmt: skip
  expected = jitted(
    model, params, tokens, mask, key, STOPS, shared, prompt_ids, 1.0
  )
  return found, expected


@pytest.mark.parametrize('num_slots', [1, 4, 8, 99])
def test_slots_give_what_the_plain_loop_gives(num_slots):
  for seed in range(3):
    found, expected = both(seed, num_slots=num_slots, num_halvings=2)
    assert_same(found, expected)
    assert 0 < expected.truncated.sum() < len(expected.truncated)
    assert len(np.unique(expected.mask.sum(1))) > 3
