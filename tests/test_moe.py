"""Mixtures of experts: three forms of one function, replay, meshes."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain import aggregation, losses, sharding
from postrain.models import moe

quick_compiler = tiny.quick_compiler
FORMS = (moe.dense_mlp, moe.grouped_mlp, moe.blocked_mlp)


def draw(num_tokens, num_experts, dtype=float, width=8, inner=16):
  """Tokens, a router and weights."""
  rng = np.random.default_rng(0)

  def noise(*shape):
    return rng.standard_normal(shape).astype(dtype)

  return {
    'x': noise(num_tokens, width),
    'router': noise(width, num_experts),
    'gate': noise(num_experts, width, inner),
    'up': noise(num_experts, width, inner),
    'down': noise(num_experts, inner, width) / 3,
  }


def layer(arrays, experts, form=None, *, normalize=True):
  routing = moe.route(
    arrays['x'] @ arrays['router'],
    num_selected=experts.shape[1],
    normalize=normalize,
    experts=experts,
  )
  return moe.experts_mlp(
    arrays['x'], routing, arrays['gate'], arrays['up'], arrays['down'],
    activation=jax.nn.silu, form=form,
  )  # fmt: skip


def value_and_gradients(arrays, experts, form=None):
  def total(arrays):
    out = layer(arrays, experts, form)
    direction = jnp.cos(jnp.arange(out.size, dtype=out.dtype))
    return jnp.sum(out * direction.reshape(out.shape)), out

  grads, out = jax.grad(total, has_aux=True)(arrays)
  return out, grads


@jax.jit
def of_each_form(arrays, experts):
  return [value_and_gradients(arrays, experts, form) for form in FORMS]


def oracle(arrays, experts, normalize=True):
  """Token by token, expert by expert; the most probable where none is given."""
  out = np.zeros_like(arrays['x'])
  for n, x in enumerate(arrays['x']):
    odds = np.exp(x @ arrays['router'])
    chosen = experts[n]
    if chosen[0] < 0:
      chosen = np.argsort(-odds)[: len(chosen)]
    total = odds[chosen].sum() if normalize else odds.sum()
    for e in chosen:
      gate = x @ arrays['gate'][e]
      hidden = gate / (1 + np.exp(-gate)) * (x @ arrays['up'][e])
      out[n] += odds[e] / total * (hidden @ arrays['down'][e])
  return out


def natural(num_tokens, num_selected):
  """Nothing recorded."""
  return np.full((num_tokens, num_selected), -1, np.int32)


def assert_close(found, expected, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected
  )


def check(arrays, experts, tolerance):
  """Values are those of the oracle, gradients those of the dense form."""
  expected = oracle({k: v.astype(float) for k, v in arrays.items()}, experts)
  (_, grads), *others = found = of_each_form(arrays, experts)
  for out, _ in found:
    assert out.dtype == arrays['x'].dtype
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)
  for _, other in others:
    assert_close(other, grads, rtol=tolerance, atol=10 * tolerance)
  return grads


# One token; one selected; all selected; padded blocks; more experts than pairs.
SIZES = [(1, 4, 2), (7, 4, 1), (5, 3, 3), (40, 4, 2), (4, 16, 3)]


@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_every_form_is_the_sum_over_the_experts_of_each_token(sizes):
  with jax.enable_x64(True):
    check(draw(*sizes[:2]), natural(sizes[0], sizes[2]), 1e-10)


def test_forms_agree_in_float32():
  check(draw(40, 4, np.float32), natural(40, 2), 1e-5)


def test_forms_agree_whatever_the_load():
  """All tokens with one expert, and experts that have none."""
  with jax.enable_x64(True):
    arrays = draw(40, 4)
    for pair in ([2, 2], [3, 1], [0, 3]):
      grads = check(arrays, np.tile(np.int32(pair), (40, 1)), 1e-10)
      idle = [e for e in range(4) if e not in pair]
      for name in ('gate', 'up', 'down'):
        assert np.all(grads[name][np.array(idle)] == 0)
        assert np.all(np.any(grads[name][np.array(pair)] != 0, axis=(1, 2)))


def test_tokens_do_not_meet():
  """Padding, zeros in the stream, moves no other token and stays finite."""
  with jax.enable_x64(True):
    arrays = draw(40, 4)
    cleared = arrays | {'x': arrays['x'] * (np.arange(40) % 3 > 0)[:, None]}
    real = cleared['x'].any(axis=1)
    for (before, _), (after, grads) in zip(
      of_each_form(arrays, natural(40, 2)),
      of_each_form(cleared, natural(40, 2)),
      strict=True,
    ):
      np.testing.assert_allclose(after[real], before[real], rtol=1e-12)
      assert np.all(after[~real] == 0)
      assert all(np.all(np.isfinite(g)) for g in grads.values())


def test_narrow_tokens_stay_narrow_and_gates_do_not():
  arrays = {k: v.astype(jnp.bfloat16) for k, v in draw(40, 4).items()}
  wide = {k: v.astype(float) for k, v in arrays.items()}
  # Rounded logits may be equal, so that the experts are given.
  experts = np.argsort(-(wide['x'] @ wide['router']))[:, :2].astype(np.int32)
  logits = jnp.asarray(arrays['x'] @ arrays['router'])
  routing = moe.route(logits, num_selected=2, normalize=True)
  assert routing.gates.dtype == jnp.float32
  for out, _ in of_each_form(arrays, experts):
    assert out.dtype == jnp.bfloat16
    gap = np.abs(out.astype(float) - oracle(wide, experts))
    assert gap.mean() < 0.02


@functools.partial(jax.jit, static_argnames=('num_selected', 'normalize'))
def gates_and_gradient(logits, experts=None, *, num_selected, normalize):
  def first_gates(logits):
    routing = moe.route(
      logits, num_selected=num_selected, normalize=normalize, experts=experts
    )
    return jnp.sum(routing.gates[:, 0]), routing

  gradient, routing = jax.grad(first_gates, has_aux=True)(logits)
  return routing, gradient


@pytest.mark.parametrize('normalize', [True, False])
def test_replay_of_natural_experts_is_natural_routing(normalize):
  """Bit for bit, with its gradient."""
  logits = jnp.asarray(draw(40, 4, np.float32)['x'][:, :6])
  run = functools.partial(gates_and_gradient, num_selected=2,
                          normalize=normalize)  # fmt: skip
  (routing, gradient), again = run(logits), run(logits)
  jax.tree.map(np.testing.assert_array_equal, again, (routing, gradient))
  for recorded in (
    routing.experts,
    routing.experts.at[::3].set(-1),  # a part was not recorded
    natural(40, 2),
  ):
    replayed = run(logits, recorded)
    jax.tree.map(np.testing.assert_array_equal, replayed, (routing, gradient))


@pytest.mark.parametrize('normalize', [True, False])
def test_replayed_experts_have_live_gates(normalize):
  """The router learns from experts that it would not have selected."""
  logits = jnp.asarray(draw(40, 4, np.float32)['x'][:, :6])
  last = np.argsort(logits)[:, :2].astype(np.int32)
  routing, gradient = gates_and_gradient(
    logits, last, num_selected=2, normalize=normalize
  )
  np.testing.assert_array_equal(routing.experts, last)
  odds = np.exp(logits)
  selected = np.take_along_axis(odds, last, 1)
  total = (selected if normalize else odds).sum(1, keepdims=True)
  np.testing.assert_allclose(routing.gates, selected / total, rtol=1e-6)
  assert np.all(np.take_along_axis(gradient, last, 1)[:, 0] > 0)
  stale, gradient = gates_and_gradient(
    logits.at[:, :2].add(300.0), last * 0 + [4, 5], num_selected=2,
    normalize=normalize,
  )  # fmt: skip
  assert np.all(np.isfinite(stale.gates))
  assert np.all(np.isfinite(gradient))
  assert np.allclose(stale.gates.sum(1), float(normalize))


def test_an_expert_that_does_not_exist_is_not_another():
  logits = jnp.zeros((3, 4))
  routing, _ = gates_and_gradient(
    logits, natural(3, 1) + 5, num_selected=1, normalize=False
  )
  assert np.all(np.isnan(routing.gates))


def test_bad_selections_are_errors():
  logits = jnp.zeros((3, 4))
  for number in (0, 5):
    with pytest.raises(ValueError, match=f'num_selected={number} of 4 experts'):
      moe.route(logits, num_selected=number, normalize=True)
  with pytest.raises(ValueError, match=r'shape \(3, 1\) for 3 tokens: give 2'):
    moe.route(
      logits, num_selected=2, normalize=True, experts=jnp.zeros((3, 1), int)
    )


FAMILIES = {'Mixtral': 'mixtral', 'Qwen2Moe': 'qwen2_moe',
            'Qwen3Moe': 'qwen3_moe'}  # fmt: skip


@pytest.mark.parametrize('family', FAMILIES)
def test_routing_and_experts_equal_those_of_transformers(family):
  torch = pytest.importorskip('torch', reason='parity needs torch')
  pytest.importorskip('transformers')
  name = f'transformers.models.{FAMILIES[family]}'
  arrays, normalize = draw(40, 4, np.float32), family != 'Qwen2Moe'
  width, inner = arrays['gate'].shape[1:]
  config = getattr(importlib.import_module(name), f'{family}Config')(
    hidden_size=width, num_experts=4, num_local_experts=4,
    num_experts_per_tok=2, intermediate_size=inner,
    moe_intermediate_size=inner, norm_topk_prob=normalize,
  )  # fmt: skip
  theirs = importlib.import_module(f'{name}.modeling_{FAMILIES[family]}')
  router = getattr(theirs, f'{family}TopKRouter')(config)
  experts = getattr(theirs, f'{family}Experts')(config)
  halves = np.concatenate([arrays['gate'], arrays['up']], axis=2)
  with torch.no_grad():
    router.weight.copy_(torch.as_tensor(arrays['router'].T))
    experts.gate_up_proj.copy_(torch.as_tensor(halves.swapaxes(1, 2)))
    experts.down_proj.copy_(torch.as_tensor(arrays['down'].swapaxes(1, 2)))
    x = torch.as_tensor(arrays['x'])
    logits, gates, indices = router(x)
    out = experts(x, indices, gates)
  routing, _ = gates_and_gradient(
    jnp.asarray(logits.numpy()), num_selected=2, normalize=normalize
  )
  np.testing.assert_array_equal(routing.experts, indices)
  np.testing.assert_allclose(routing.gates, gates, rtol=1e-6)
  found = jax.jit(functools.partial(layer, normalize=normalize))(
    arrays, natural(40, 2)
  )
  np.testing.assert_allclose(found, out, rtol=1e-5, atol=1e-5)


AXES = {
  'x': ('batch', 'embed'),
  'router': ('embed', None),
  'gate': ('experts', 'embed', 'mlp'),
  'up': ('experts', 'embed', 'mlp'),
  'down': ('experts', 'mlp', 'embed'),
}


@functools.cache
def expected_on_one_device(num_experts):
  found = of_each_form(draw(32, num_experts, np.float32), natural(32, 2))
  return jax.device_get(found)


def shapes_moved(program):
  """Shapes of what devices tell each other, by the kind of message."""
  moved = re.findall(
    r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|'
    r'collective-permute)(?:-start)?\(',
    program,
  )
  return [
    (kind, tuple(map(int, filter(None, shape.split(',')))))
    for shapes, kind in moved
    for shape in re.findall(r'\w\d+\[([\d,]*)\]', shapes)
  ]


@pytest.mark.parametrize(
  'sizes',
  [
    {'expert': 2},
    {'expert': 8},
    {'data': 2, 'expert': 4},
    {'fsdp': 2, 'expert': 2, 'tensor': 2},
    {'data': 8},
  ],
  ids=str,
)
def test_devices_multiply_with_the_experts_that_they_hold(sizes):
  """Values and gradients are those of one device, and no weight moves."""
  arrays, mesh = draw(32, 8, np.float32), sharding.make_mesh(**sizes)
  with sharding.on(mesh):
    places = sharding.shardings(mesh, jax.tree.map(jnp.asarray, arrays), AXES)
    placed = jax.device_put(arrays, places)
    for name in ('gate', 'up', 'down'):
      shard = placed[name].sharding.shard_shape(arrays[name].shape)
      assert shard[0] == 8 // sizes.get('expert', 1)
    step = jax.jit(
      of_each_form, out_shardings=[(places['x'], places)] * len(FORMS)
    )
    compiled = step.lower(placed, natural(32, 2)).compile()
    found = compiled(placed, natural(32, 2))
  assert_close(found, expected_on_one_device(8), rtol=1e-5, atol=5e-5)
  moved = shapes_moved(compiled.as_text())
  assert moved
  gathered = [shape for kind, shape in moved if kind != 'all-reduce']
  assert all(len(shape) < 3 for shape in gathered), gathered
  if set(sizes) == {'expert'}:  # nor any gradient of a weight
    assert all(len(shape) < 3 for _, shape in moved), moved


def test_experts_that_a_mesh_does_not_divide_are_on_every_device():
  arrays = draw(32, 3, np.float32)
  with sharding.on(sharding.make_mesh(expert=2)):
    found = jax.jit(layer)(arrays, natural(32, 2))
  expected = of_each_form(arrays, natural(32, 2))[0][0]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def forms_of(num_tokens, num_experts, num_selected):
  """Names of the products in the program that is chosen."""
  arrays = draw(num_tokens, num_experts, np.float32)
  experts = natural(num_tokens, num_selected)
  return str(jax.make_jaxpr(lambda *x: layer(*x))(arrays, experts))


def test_the_form_is_that_of_the_backend_and_the_shape(monkeypatch):
  grouped, sorted_ = ' ragged_dot_general[', ' sort['
  assert sorted_ in forms_of(1, 4, 2)  # two experts are read, not four
  assert sorted_ not in forms_of(16, 4, 2)
  assert sorted_ in forms_of(32, 4, 2)
  assert sorted_ not in forms_of(64, 2, 2)  # every token sees every expert
  assert grouped not in forms_of(32, 4, 2)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert grouped in forms_of(16, 4, 2)


def unit_balance(logits, experts, mask, shares, weights):
  values, _ = losses.load_balance(logits, experts, mask, shares)
  return jnp.sum(weights * values)


@pytest.mark.parametrize('given', [True, False])
def test_load_balance_is_additive_over_units(given):
  """With shares of a pass before, and with those of each sequence."""
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.standard_normal((4, 6, 8)), jnp.float32)
  mask = jnp.asarray(rng.random((4, 6)) < 0.7)
  experts = jax.lax.top_k(logits, 2)[1]
  shares = losses.expert_shares(experts, mask, num_experts=8) if given else None
  weights = aggregation.token_mean(mask)
  grad = jax.jit(jax.value_and_grad(unit_balance))
  whole, gradient = grad(logits, experts, mask, shares, weights)
  for rows in (slice(0, 2), slice(2, 4)):
    # Padding holds anything.
    padded = jnp.where(mask[rows][..., None], logits[rows], jnp.nan)
    value, part = grad(padded, experts[rows], mask[rows], shares, weights[rows])
    whole -= value
    np.testing.assert_allclose(part, gradient[rows], atol=1e-7)
  assert abs(whole) < 1e-6


def test_load_balance_is_that_of_transformers():
  """But for K: its shares sum to the number of selected experts."""
  torch = pytest.importorskip('torch', reason='parity needs torch')
  pytest.importorskip('transformers')
  from transformers.models.mixtral import modeling_mixtral as mixtral

  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.standard_normal((4, 6, 8)), jnp.float32)
  mask = jnp.asarray(np.arange(6) < [[6], [2], [5], [1]])
  theirs = mixtral.load_balancing_loss_func(
    (torch.tensor(np.asarray(logits)).reshape(-1, 8),), 8, 2,
    torch.tensor(np.asarray(mask, int)),
  )  # fmt: skip
  experts = jax.lax.top_k(logits, 2)[1]
  shares = losses.expert_shares(experts, mask, num_experts=8)
  values, metrics = losses.load_balance(logits, experts, mask, shares)
  found = jnp.sum(aggregation.token_mean(mask) * values)
  assert 2 * found == pytest.approx(theirs.item(), rel=1e-5)
  assert metrics['peak_load'].max() == pytest.approx(8 * shares.max())


def test_an_even_load_has_balance_one_and_a_hotspot_the_number_of_experts():
  mask = jnp.ones((1, 4), bool)
  even = jnp.arange(4, dtype=jnp.int32)[None, :, None]
  values, _ = losses.load_balance(jnp.zeros((1, 4, 4)), even, mask)
  np.testing.assert_allclose(values, 1.0)
  hot = jnp.zeros((1, 4, 4)).at[..., 2].set(50.0)
  values, _ = losses.load_balance(hot, even * 0 + 2, mask)
  np.testing.assert_allclose(values, 4.0)
