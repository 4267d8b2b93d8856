"""What every public function of the mathematics must withstand."""

import inspect
import pathlib
import subprocess
import sys

from cases import MODULES, Case, cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

ROOT = pathlib.Path(__file__).parents[1]
CASES = cases()
PUBLIC = [(m, name) for m in MODULES for name in m.__all__]
each = pytest.mark.parametrize('case', CASES, ids=str)
smooth = pytest.mark.parametrize(
  'case',
  [
    c
    for c in CASES
    if any(v.dtype == float for v in c.inputs.values()) and not c.decides
  ],
  ids=str,
)
each_name = pytest.mark.parametrize(
  ('module', 'name'), PUBLIC, ids=[name for _, name in PUBLIC]
)


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def call(case: Case, inputs: dict, fn=None):
  inputs = {k: jnp.asarray(v) for k, v in inputs.items()}
  return (fn or case.fn)(*inputs.values(), **case.options)


def primary(output):
  """The values of a loss, or the output itself."""
  return output[0] if isinstance(output, tuple) else output


def floats(inputs: dict) -> list[str]:
  return [k for k, v in inputs.items() if v.dtype.kind == 'f']


def gradients(case: Case, inputs: dict, *, with_metrics: bool) -> dict:
  """Of a fixed contraction of the output, for every float input."""
  inputs = {k: jnp.asarray(v) for k, v in inputs.items()}
  names = floats(inputs)

  def total(*args):
    output = case.fn(
      *(inputs | dict(zip(names, args, strict=True))).values(), **case.options
    )
    leaves = jax.tree.leaves(output if with_metrics else primary(output))
    return sum(
      jnp.sum(leaf * jnp.asarray(direction(leaf.shape)))
      for leaf in leaves
      if leaf.dtype != bool
    )

  argnums = tuple(range(len(names)))
  grads = jax.grad(total, argnums)(*(inputs[k] for k in names))
  return dict(zip(names, map(np.asarray, grads), strict=True))


def direction(shape: tuple) -> np.ndarray:
  return np.cos(np.arange(1, 1 + int(np.prod(shape)))).reshape(shape)


def assert_trees_close(actual, expected, **tolerance):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


@each
def test_equals_its_oracle(case):
  expected = case.oracle(*case.inputs.values(), **case.options)
  actual = call(case, case.inputs)
  assert_trees_close(actual, expected, rtol=1e-10, atol=1e-12)


@smooth
def test_gradient_is_that_of_its_oracle(case):
  actual = gradients(case, case.inputs, with_metrics=False)
  options = dict(case.options)
  if case.stopped is not None:
    options['stopped'] = case.inputs[case.stopped]
  step = 1e-6
  for name in case.gradients:
    expected = np.zeros(case.inputs[name].shape)
    for i in np.ndindex(expected.shape):
      ends = []
      for sign in (1, -1):
        moved = case.inputs[name].copy()
        moved[i] += sign * step
        output = case.oracle(*(case.inputs | {name: moved}).values(), **options)
        ends.append(np.sum(primary(output) * direction(primary(output).shape)))
      expected[i] = (ends[0] - ends[1]) / (2 * step)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual[name], expected, atol=2e-8 * scale)
    assert np.any(expected != 0)


@smooth
def test_constants_and_metrics_have_no_gradient(case):
  alone = gradients(case, case.inputs, with_metrics=False)
  together = gradients(case, case.inputs, with_metrics=True)
  for name, gradient in alone.items():
    if name not in case.gradients:
      np.testing.assert_array_equal(gradient, 0)
    if isinstance(call(case, case.inputs), tuple):
      np.testing.assert_array_equal(together[name], gradient)


def poisoned(case: Case) -> dict:
  key = 'mask' if 'mask' in case.inputs else 'where'
  shown = case.inputs[key]
  inputs = dict(case.inputs)
  for name in floats(inputs):
    if inputs[name].shape == shown.shape:
      inputs[name] = np.where(shown, inputs[name], np.nan)
  return inputs


MASKED = [c for c in CASES if {'mask', 'where'} & set(c.inputs)]


@pytest.mark.parametrize('case', MASKED, ids=str)
def test_nan_off_the_mask_changes_nothing(case):
  inputs = poisoned(case)
  if case.name == 'importance_weighted':  # documented: an estimate is 0 there
    inputs['estimate'] = np.nan_to_num(inputs['estimate'])
  clean = {k: np.nan_to_num(v) for k, v in inputs.items()}
  assert_trees_close(call(case, inputs), call(case, clean), rtol=0)
  if not floats(inputs) or case.decides:
    return
  with_nan = gradients(case, inputs, with_metrics=True)
  without = gradients(case, clean, with_metrics=True)
  assert_trees_close(with_nan, without, rtol=0)
  assert all(np.all(np.isfinite(g)) for g in with_nan.values())


@pytest.mark.parametrize('case', MASKED, ids=str)
def test_all_masked_is_finite_with_zero_gradient(case):
  key = 'mask' if 'mask' in case.inputs else 'where'
  inputs = case.inputs | {key: np.zeros_like(case.inputs[key])}
  for leaf in jax.tree.leaves(call(case, inputs)):
    assert np.all(np.isfinite(leaf))
  if not floats(inputs) or case.decides:
    return
  for name, gradient in gradients(case, inputs, with_metrics=True).items():
    if name != 'estimate':
      np.testing.assert_array_equal(gradient, 0)


@each
def test_jit_equals_eager_and_traces_once(case):
  traces = []

  def fn(*args, **options):
    traces.append(None)
    return case.fn(*args, **options)

  static = [
    k for k, v in case.options.items() if v is None or isinstance(v, str | int)
  ]
  jitted = jax.jit(fn, static_argnames=static)
  for _ in range(2):
    actual = call(case, case.inputs, jitted)
  assert len(traces) == 1
  eager = call(case, case.inputs)
  assert_trees_close(actual, eager, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize('case', [c for c in CASES if not c.by_place], ids=str)
def test_rows_permute(case):
  rows = next(iter(case.inputs.values())).shape[0]
  order = np.random.default_rng(1).permutation(rows)

  def permute(leaf):
    leaf = np.asarray(leaf)
    return leaf[order] if leaf.ndim and len(leaf) == rows else leaf

  inputs = {k: permute(v) for k, v in case.inputs.items()}
  expected = jax.tree.map(permute, call(case, case.inputs))
  actual = call(case, inputs)
  assert_trees_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
  'case',
  [c for c in MASKED if c.padded and not c.options.get('count_empty')],
  ids=str,
)
def test_padding_changes_nothing(case):
  """Two columns and a row of NaN, off the mask."""
  key = 'mask' if 'mask' in case.inputs else 'where'
  corner = tuple(map(slice, case.inputs[key].shape))

  def pad(array):
    widths = [(0, 1)] + [(0, 2)] * (array.ndim - 1)
    fill = {'f': np.nan, 'b': False}.get(array.dtype.kind, -5)
    return np.pad(array, widths, constant_values=fill)

  def cut(leaf):
    leaf = np.asarray(leaf)
    return leaf[corner[: leaf.ndim]]

  inputs = {k: pad(v) for k, v in case.inputs.items()}
  output = call(case, inputs)
  if not isinstance(output, dict):
    output = jax.tree.map(cut, output)
  if case.name == 'importance_weighted':  # an estimate is 0 off the mask
    output = jnp.where(case.inputs['mask'], output, 0)
    expected = jnp.where(case.inputs['mask'], call(case, case.inputs), 0)
  else:
    expected = call(case, case.inputs)
  assert_trees_close(output, expected, rtol=1e-12, atol=1e-13)


@each
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_narrow_inputs_give_float32(case, dtype):
  with jax.enable_x64(False):
    inputs = {
      k: jnp.asarray(v, dtype) if v.dtype.kind == 'f' else jnp.asarray(v)
      for k, v in case.inputs.items()
    }
    actual = case.fn(*inputs.values(), **case.options)
  exact = [
    np.asarray(v.astype(jnp.float32), float) if k in floats(case.inputs) else v
    for k, v in zip(case.inputs, inputs.values(), strict=True)
  ]
  expected = case.oracle(*map(np.asarray, exact), **case.options)
  for leaf in jax.tree.leaves(actual):
    assert leaf.dtype in (jnp.float32, bool)
  # Logits that a test unembeds itself are rounded before the library sees them.
  if case.name != 'map_time_chunks' or dtype == 'float32':
    assert_trees_close(actual, expected, rtol=2e-4, atol=2e-4)


def traced_options(case: Case) -> list[str]:
  return [k for k, v in case.options.items() if isinstance(v, float)]


@pytest.mark.parametrize(
  'case', [c for c in CASES if traced_options(c)], ids=str
)
def test_hyperparameters_may_be_traced(case):
  inputs = [jnp.asarray(v) for v in case.inputs.values()]
  for name in traced_options(case):
    pair = (case.options[name], case.options[name] / 2)

    def run(value, name=name):
      return case.fn(*inputs, **(case.options | {name: value}))

    stacked = jax.vmap(run)(jnp.asarray(pair))
    for i, value in enumerate(pair):
      row = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
      assert_trees_close(row, run(value), rtol=1e-12, atol=1e-13)


@each_name
def test_public_name_is_complete(module, name):
  fn = getattr(module, name)
  assert callable(getattr(oracles, name, None)), 'no oracle in tests/oracles.py'
  assert name in {c.name for c in CASES}, 'no case in tests/cases.py'
  doc = inspect.getdoc(fn)
  lines = doc.splitlines()
  equation = any(line.startswith('    ') for line in lines[1:5])
  assert equation or 'References:' in doc, 'no equation and no reference'
  for section in ('Args:', 'Returns:'):
    assert section in doc
  raises = 'raise ValueError' in inspect.getsource(fn)
  assert not raises or 'Raises:' in doc
  rows = (ROOT / 'PAPERS.md').read_text()
  assert f'`{name}`' in rows, 'no row in PAPERS.md'


@each_name
def test_public_signature_is_arrays_then_keywords(module, name):
  parameters = inspect.signature(getattr(module, name)).parameters.values()
  for p in parameters:
    assert p.kind is not p.VAR_KEYWORD
    if p.kind is p.POSITIONAL_OR_KEYWORD and name != 'map_time_chunks':
      assert p.default in (p.empty, None), 'a hyperparameter is positional'


def test_importing_the_mathematics_is_light():
  heavy = ('flax', 'optax', 'orbax', 'transformers', 'ml_collections', 'chex')
  names = ', '.join(m.__name__ for m in MODULES)
  program = (
    f'import sys, {names}\nprint([m for m in {heavy!r} if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == '[]'
