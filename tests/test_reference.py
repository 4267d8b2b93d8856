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
CATEGORIES = sorted({case['category'] for case, *_ in CASES})


@pytest.mark.parametrize('category', CATEGORIES)
def test_equals_the_peers(category):
  members = [item for item in CASES if item[0]['category'] == category]
  with jax.enable_x64(True):
    outputs = CHECK['outputs'](members)
  failed = {}
  for item, actual in zip(members, outputs, strict=True):
    case, _, expected = item
    assert actual.keys() == expected.keys(), case['name']
    if found := CHECK['differences'](*item, actual):
      failed[case['name']] = found
  assert not failed


def test_a_wrong_value_is_found():
  case, inputs, expected = CASES[0]
  wrong = {name: 1.000001 * value for name, value in expected.items()}
  assert not CHECK['differences'](case, inputs, expected, expected)
  assert len(CHECK['differences'](case, inputs, expected, wrong)) == len(wrong)
