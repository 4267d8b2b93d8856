"""Values and gradients equal those of other libraries.

`experiments/peers/values.py` made them by calling the functions of TRL and
verl; the handlers of `experiments/golden` show how ours compose to the same.
"""

import pathlib
import runpy

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHECK = runpy.run_path(str(ROOT / 'experiments' / 'golden' / 'check.py'))
CASES = CHECK['read'](ROOT / 'tests' / 'reference' / 'values')


@pytest.fixture(autouse=True)
def quick():
  """Each operation is compiled alone: few are new to the next case."""
  unoptimised = 'jax_disable_most_optimizations'
  jax.config.update(unoptimised, True)
  with jax.enable_x64(True), jax.disable_jit():
    yield
  jax.config.update(unoptimised, False)


@pytest.mark.parametrize(
  ('case', 'inputs', 'expected'),
  CASES,
  ids=[case['name'] for case, *_ in CASES],
)
def test_equals_the_peer(case, inputs, expected):
  fn = CHECK['handler_of'](case)
  assert not CHECK['differences'](case, inputs, expected, fn)
