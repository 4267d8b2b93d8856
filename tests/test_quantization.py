"""A base in few bits: how far it is off, what it weighs, and that it trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain import hub, losses, objectives, optimizers
from postrain.adapted import Adapted, trainable
from postrain.models import wrap
from postrain.models.lora import LoRA, lora, merged
from postrain.models.transformer import Config, transformer
from postrain.train_step import make_train_step
from postrain.trainer import Trainer
from postrain.types import Batch, TrainState

pytest.importorskip('qwix', reason='a quantised base needs qwix')
from postrain.quantization import quantized, stored

quick_compiler = tiny.quick_compiler

CONFIG = Config(
  vocab_size=13, num_layers=2, model_dim=64, mlp_dim=128, num_heads=2,
  num_kv_heads=1, head_dim=32, max_length=32,
)  # fmt: skip
SPEC = LoRA(rank=2, alpha=4, targets='layers/(query|down)')
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
KEY = jax.random.key(0)


@functools.cache
def base():
  model = transformer(CONFIG)
  return model, jax.jit(model.init)(KEY)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
  positions = jnp.tile(jnp.arange(3, dtype=jnp.int32), (4, 1))
  hidden, _ = model.hidden(
    params, TOKENS, positions=positions, segment_ids=jnp.ones_like(TOKENS)
  )
  return model.unembed(params, hidden)


def num_bytes(tree):
  """Uint4 arrays count half a byte."""
  return sum(x.size * jnp.iinfo(x.dtype).bits / 8 if x.dtype.kind in 'Viu'
             else x.nbytes for x in jax.tree.leaves(tree))  # fmt: skip


@pytest.mark.parametrize(
  ('qtype', 'bound', 'bits'), [('int8', 1 / 250, 8.5), ('nf4', 0.16, 4.5)]
)
def test_errors_and_sizes(qtype, bound, bits):
  """Half the widest gap of levels, of the largest weight of the block."""
  model, params = base()
  small = stored(model, params, qtype)
  again = merged(Adapted(small, {}), SPEC)
  for path in model.kernels():
    name = path[-1]
    exact, found = params['layers'][name], again['layers'][name]
    last = sum(model.kernels()[path]) - 1
    rows = jnp.moveaxis(jnp.abs(exact), last, -1)
    largest = rows.reshape(*rows.shape[:-1], -1, min(64, rows.shape[-1])).max(
      -1
    )
    error = jnp.moveaxis(jnp.abs(exact - found), last, -1)
    error = error.reshape(*largest.shape, -1).max(-1)
    assert (error / largest).max() <= bound
    assert (error / largest).max() > bound / 4
    expected = exact.size * (
      bits if exact.shape[last] % 64 == 0 else bits + 0.5
    )
    assert num_bytes(small['layers'][name]) * 8 == expected
  np.testing.assert_array_equal(small['embedding'], params['embedding'])


def test_it_computes_what_its_restored_kernels_do():
  model, params = base()
  small = quantized(model, 'int8')
  values = jax.jit(small.init)(KEY)
  np.testing.assert_allclose(
    logits(small, values), logits(model, merged(Adapted(values, {}), SPEC)),
    atol=1e-6,
  )  # fmt: skip
  assert jnp.abs(logits(small, values) - logits(model, params)).max() > 1e-4


def test_adapters_train_on_it():
  model = lora(quantized(base()[0], 'nf4'), SPEC)
  params = {'actor': jax.jit(model.init)(KEY)}
  before = jax.tree.map(np.asarray, params['actor'].base)
  optimizer = optimizers.adamw(learning_rate=0.03)
  state = TrainState(jnp.int32(0), params, optimizer.init(trainable(params)))
  mask = jnp.ones(TOKENS.shape, bool).at[:, 0].set(False)
  batch = Batch(
    TOKENS, jnp.ones_like(mask), mask, {'policy': mask.astype(jnp.float32)}, {}
  )
  objective = objectives.supervised(model, loss=losses.negative_log_likelihood)
  step = jax.jit(make_train_step(objective, optimizer), donate_argnums=0)
  figures = []
  for _ in range(10):
    state, metrics = step(state, {}, batch)
    figures.append(float(metrics['loss'].total))
  assert figures[-1] < 0.9 * figures[0]
  jax.tree.map(
    np.testing.assert_array_equal, state.params['actor'].base, before
  )


def test_a_restored_kernel_lives_for_one_layer():
  """Of the backward pass too: its memory does not hold all kernels."""
  model = lora(quantized(base()[0], 'int8'), SPEC)
  shapes = jax.eval_shape(model.init, KEY)

  def loss(adapters, base):
    return logits(model, Adapted(base, adapters)).sum()

  program = jax.make_jaxpr(jax.grad(loss))(shapes.adapters, shapes.base)
  whole = {(2, *x.shape[1:]) for x in jax.tree.leaves(shapes.base['layers'])
           if x.dtype == jnp.int8}  # fmt: skip
  found = [v.aval for v in variables(program.jaxpr)]
  kept = [a for a in found if a.shape in whole and a.dtype == jnp.float32]
  assert not kept


def variables(jaxpr):
  """What the equations of a program and its parts make."""
  for equation in jaxpr.eqns:
    yield from equation.outvars
    for param in jax.tree.leaves(list(equation.params.values())):
      if hasattr(param, 'jaxpr'):
        yield from variables(param.jaxpr)
      elif hasattr(param, 'eqns'):
        yield from variables(param)


def test_a_stranger_has_no_kernels_to_quantise():
  stranger = wrap.plain(lambda key: {}, lambda *_: TOKENS, lambda *_: TOKENS, 3)
  with pytest.raises(ValueError, match='lists no kernels'):
    quantized(stranger, 'nf4')


def test_a_quantised_run_is_restored_and_exported(tmp_path):
  config = tiny.arithmetic()
  config.model.quantize = 'nf4'
  with pytest.raises(ValueError, match="quantize='nf4' without"):
    Trainer(config, str(tmp_path / 'run'))
  config.model.lora = dict(rank=2, alpha=4.0, targets='layers/query')
  config.evaluation.every = config.rl.num_iterations = 0
  state = Trainer(config, str(tmp_path / 'run')).run()
  again = Trainer(config, str(tmp_path / 'run')).run()
  jax.tree.map(np.testing.assert_array_equal, again, state)
  exported = hub.load(tmp_path / 'run' / 'export').params
  spec = LoRA(**config.model.lora)
  jax.tree.map(
    np.testing.assert_array_equal, exported,
    merged(state.params['actor'], spec),
  )  # fmt: skip
