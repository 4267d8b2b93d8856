"""One model on any mesh: equal gradients, and no needless traffic."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import sharding
from postrain.models.transformer import Config, transformer

MODEL = transformer(
  Config(
    vocab_size=64, num_layers=2, model_dim=32, mlp_dim=64, num_heads=8,
    num_kv_heads=8, head_dim=8, max_length=16,
  )
)  # fmt: skip


def loss(params, tokens):
  positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)
  hidden, _ = MODEL.hidden(
    params, tokens, positions=positions, segment_ids=jnp.ones_like(tokens)
  )
  return jnp.square(MODEL.unembed(params, hidden)).mean()


@pytest.mark.parametrize(
  ('sizes', 'allowed'),
  [
    ({'data': 8}, {'all-reduce'}),
    ({'tensor': 8}, {'all-reduce'}),
    ({'fsdp': 8}, {'all-reduce', 'all-gather', 'reduce-scatter'}),
    (
      {'data': 2, 'fsdp': 2, 'tensor': 2},
      {'all-reduce', 'all-gather', 'reduce-scatter'},
    ),
  ],
)
def test_gradients_on_a_mesh(sizes, allowed):
  params = jax.jit(MODEL.init)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (16, 6), 0, 64)
  expected = jax.jit(jax.value_and_grad(loss))(params, tokens)
  mesh = sharding.make_mesh(**sizes)
  with sharding.on(mesh):
    shardings = sharding.param_shardings(mesh, MODEL)
    placed = jax.device_put(params, shardings)
    rows = sharding.put_rows(mesh, tokens)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
    compiled = step.lower(placed, rows).compile()
    found = compiled(placed, rows)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    found,
    expected,
  )
  traffic = re.findall(
    r' (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)'
    r'(?:-start)?\(',
    compiled.as_text(),
  )
  assert set(traffic) <= allowed
  assert 'all-reduce' in traffic
