"""What passes between devices in the gradient of log-probs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import sharding
from postrain.models.transformer import Config, transformer
from postrain.scoring import score
from postrain.traffic import traffic

LENGTH = 8
MODEL = transformer(
  Config(
    vocab_size=64, num_layers=1, model_dim=32, mlp_dim=64, num_heads=8,
    num_kv_heads=8, head_dim=8, max_length=LENGTH, tie_embeddings=False,
  )
)  # fmt: skip
KINDS = {'data': {'all-reduce'}, 'fsdp': {'all-reduce', 'all-gather'}}


def total(params, tokens, *, chunk_size):
  real = jnp.ones_like(tokens, bool)
  mask = real.at[:, 0].set(False)
  found = score(MODEL, params, tokens, real, mask, chunk_size=chunk_size)
  return found.logprobs.mean()


@functools.cache
def passed(axis, number, chunk_size):
  """Collectives of the program that is compiled for so many devices."""
  mesh = sharding.make_mesh(**{axis: number})
  places = sharding.param_shardings(mesh, MODEL)
  params = sharding.abstract(MODEL.shapes, places)
  rows = jax.ShapeDtypeStruct(
    (16, LENGTH), jnp.int32, sharding=sharding.rows(mesh)
  )
  fn = functools.partial(total, chunk_size=chunk_size)
  with sharding.on(mesh):
    step = jax.jit(jax.grad(fn), out_shardings=places)
    return traffic(step.lower(params, rows).compile().as_text())


@pytest.mark.parametrize('axis', KINDS)
def test_kinds_are_the_same_on_any_number_of_devices(axis):
  """No rows exchanged (all-to-all), none passed on (collective-permute)."""
  found = [set(passed(axis, n, 2)) for n in (2, 4, 8)]
  assert found == [KINDS[axis]] * 3


@pytest.mark.parametrize('axis', KINDS)
def test_chunks_of_time_pass_nothing_more(axis):
  """As many in the text, as many runs, as many bytes as of all at once."""
  assert passed(axis, 8, 2) == passed(axis, 8, LENGTH)
