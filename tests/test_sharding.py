"""Meshes: where parameters, moments and rows lie."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain import aggregation, losses, objectives, optimizers, sharding
from postrain.models.heads import scalar_head
from postrain.models.transformer import Config, transformer
from postrain.models.wrap import plain
from postrain.sharding import rules
from postrain.train_step import finish, make_train_step
from postrain.types import Batch, TrainState

quick_compiler = tiny.quick_compiler

CONFIG = Config(
  vocab_size=12, num_layers=2, model_dim=8, mlp_dim=16, num_heads=4,
  num_kv_heads=1, head_dim=4, max_length=16, qkv_bias=True, qk_norm=True,
  tie_embeddings=False,
)  # fmt: skip
MODEL = transformer(CONFIG)
OPTIMIZER = optimizers.adamw(learning_rate=1e-2)


def parts(array):
  """Into how many pieces each axis is cut."""
  shard = array.sharding.shard_shape(array.shape)
  return tuple(n // m for n, m in zip(array.shape, shard, strict=True))


def parameters(mesh, model=MODEL):
  shardings = sharding.param_shardings(mesh, model)
  return jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))


def test_parameters_are_cut_by_their_logical_axes():
  """fsdp cuts the width, tensor the heads, the vocabulary and the mlp."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  params = parameters(mesh)
  assert parts(params['embedding']) == (2, 2)
  assert parts(params['unembedding']) == (2, 2)
  assert parts(params['final_norm']) == (2,)
  layers = params['layers']
  assert parts(layers['query']) == (1, 2, 2, 1)
  assert parts(layers['key']) == (1, 2, 1, 1)  # one head cannot be cut
  assert parts(layers['output']) == (1, 2, 1, 2)
  assert parts(layers['gate']) == (1, 2, 2)


def test_every_parameter_is_cut_over_fsdp_but_for_those_of_heads():
  mesh = sharding.make_mesh(fsdp=8)
  for path, leaf in jax.tree.leaves_with_path(parameters(mesh)):
    name = jax.tree_util.keystr(path)
    whole = 'bias' in name or 'query_norm' in name or 'key_norm' in name
    assert np.prod(parts(leaf)) == (1 if whole else 8), name


@pytest.mark.parametrize('model', [MODEL, scalar_head(MODEL)])
def test_the_rules_know_every_logical_axis(model):
  known = {name for name, _ in sharding.RULES} | {None}
  axes = jax.tree.leaves(
    model.logical_axes(), is_leaf=lambda x: isinstance(x, tuple)
  )
  assert axes
  assert set().union(*axes) <= known


def test_models_without_logical_axes_are_replicated():
  model = plain(
    lambda key: {'w': jnp.ones((8, 8))}, lambda *x: x, lambda *x: x, 3
  )
  mesh = sharding.make_mesh(data=2, fsdp=4)
  params = parameters(mesh, model)
  assert params['w'].sharding == sharding.replicated(mesh)


def test_moments_lie_as_their_parameters_do():
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  params = parameters(mesh)
  shardings = sharding.opt_state_shardings(
    mesh, OPTIMIZER, params, sharding.param_shardings(mesh, MODEL)
  )
  state = jax.jit(OPTIMIZER.init, out_shardings=shardings)(params)
  adam = next(s for s in state if hasattr(s, 'mu'))
  for moment in (adam.mu, adam.nu):
    for m, p in zip(
      jax.tree.leaves(moment), jax.tree.leaves(params), strict=True
    ):
      assert m.sharding == p.sharding
  assert adam.count.sharding == sharding.replicated(mesh)


def test_a_step_between_whole_and_cut_changes_nothing(monkeypatch):
  monkeypatch.setattr(rules, 'platform', lambda: 'tpu')
  monkeypatch.setattr(rules, 'MAX_IN_ONE_STEP', 2)
  x, axes = jnp.arange(16.0 * 8).reshape(16, 8), ('width', 'mlp')
  for sizes in ({'fsdp': 8}, {'data': 2, 'fsdp': 4}, {'fsdp': 4, 'tensor': 2}):
    mesh = sharding.make_mesh(**sizes)

    def product(x):
      return sharding.constrained(sharding.halfway(x.T @ x, axes), axes)

    def whole(x):
      return sharding.constrained(sharding.halfway(x, axes), (None, None))

    with sharding.on(mesh):
      half = jax.jit(lambda x: sharding.halfway(x.T @ x, axes))(x)
      found = jax.jit(product)(x)
      again = jax.jit(whole)(found)
    assert parts(half)[0] == 2
    assert parts(found) == (mesh.shape['fsdp'], mesh.shape['tensor'])
    np.testing.assert_array_equal(found, x.T @ x)
    np.testing.assert_array_equal(again, found)


def test_rows_are_cut_over_data_and_fsdp():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  tree = sharding.put_rows(mesh, {'a': jnp.arange(8), 'b': np.ones((4, 3))})
  assert parts(tree['a']) == (4,)
  assert parts(tree['b']) == (4, 1)
  np.testing.assert_array_equal(tree['a'], range(8))


def test_rows_that_do_not_divide_are_an_error():
  mesh = sharding.make_mesh(data=4)
  with pytest.raises(ValueError, match='6 rows do not divide over 4 devices'):
    sharding.put_rows(mesh, jnp.zeros((6, 2)))


def test_a_mesh_larger_than_the_machine_is_an_error():
  with pytest.raises(ValueError, match='needs 12 devices, there are 8'):
    sharding.make_mesh(data=3, fsdp=4)


def minibatch():
  draw = np.random.default_rng(0)
  shape = (8, 6)
  mask = jnp.asarray(np.arange(6)[None] >= draw.integers(1, 4, (8, 1)))
  return Batch(
    tokens=jnp.asarray(draw.integers(12, size=shape), jnp.int32),
    valid=jnp.ones(shape, bool),
    mask=mask,
    weights={'policy': aggregation.token_mean(mask)},
    arrays={
      k: jnp.asarray(draw.standard_normal(shape), jnp.float32)
      for k in ('advantages', 'old_logprobs')
    },
  )


def train(mesh, num_steps=3):
  objective = objectives.policy_gradient(MODEL, loss=losses.ppo_clip)
  step = jax.jit(
    make_train_step(objective, OPTIMIZER, num_micro_batches=2), donate_argnums=0
  )
  shardings = {'actor': sharding.param_shardings(mesh, MODEL)}
  with sharding.on(mesh):
    params = {'actor': parameters(mesh)}
    init = jax.jit(
      OPTIMIZER.init,
      out_shardings=sharding.opt_state_shardings(
        mesh, OPTIMIZER, params, shardings
      ),
    )
    number = jax.device_put(jnp.int32(0), sharding.replicated(mesh))
    state = TrainState(number, params, init(params))
    layouts = [jax.tree.map(lambda x: x.sharding, state.params)]
    before = len(tiny.compilations)
    for _ in range(num_steps):
      state, metrics = step(state, {}, sharding.put_rows(mesh, minibatch()))
      layouts.append(jax.tree.map(lambda x: x.sharding, state.params))
  # Later steps meet what the first one left.
  assert tiny.compilations[before:].count('jit(train_step)') == 1
  return jax.device_get(state.params), finish(jax.device_get(metrics)), layouts


def test_training_on_eight_devices_is_training_on_one():
  """Parameters and figures agree, and the parameters stay where they are."""
  expected, figures, _ = train(sharding.make_mesh())
  found, metrics, layouts = train(sharding.make_mesh(data=2, fsdp=2, tensor=2))
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-5)
  for name, figure in figures.items():
    assert metrics[name] == pytest.approx(figure, rel=1e-4, abs=1e-5), name
  assert all(layout == layouts[0] for layout in layouts)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip that is not here."""

  id: int
  coords: tuple[int, int, int]
  platform: str = 'tpu'
  device_kind: str = 'TPU v5'
  core_on_chip: int = 0
  process_index: int = 0


@pytest.mark.parametrize('axis', ['expert', 'tensor'])
def test_an_axis_may_take_a_part_of_a_side_of_the_torus(axis):
  """Eight chips are no side of 4 x 4 x 4 and no plane of it."""
  places = itertools.product(range(4), repeat=3)
  chips = [Chip(i, place) for i, place in enumerate(places)]
  mesh = sharding.make_mesh(**{'fsdp': -1, axis: 8}, devices=chips)
  assert {chip.id for chip in mesh.devices.flat} == set(range(64))
  assert mesh.shape[axis] == mesh.shape['fsdp'] == 8
