"""The table of methods is that of the tests and functions that exist."""

import importlib
import pathlib
import runpy

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE = runpy.run_path(str(ROOT / 'experiments' / 'methods' / 'table.py'))
METHODS, TESTS = TABLE['METHODS'], TABLE['tests']()
REMEDY = 'run: python experiments/methods/table.py'


def test_the_committed_page_is_the_generated_one():
  page = (ROOT / 'docs' / 'methods.md').read_text(encoding='utf-8')
  assert page == TABLE['page'](), REMEDY


@pytest.mark.parametrize('number', METHODS)
def test_a_method_has_tests_and_its_functions_exist(number):
  assert TESTS.get(number), f'no test is named test_m{number:02}_...'
  for function in METHODS[number][1].split():
    module, name = function.rsplit('.', 1)
    module = importlib.import_module(f'postrain.{module}')
    assert callable(getattr(module, name)), function


def test_a_test_names_methods_of_the_table():
  assert TESTS.keys() <= METHODS.keys()


@pytest.mark.parametrize(
  ('name', 'numbers'),
  [
    ('test_m46_to_m48_table', [46, 47, 48]),
    ('test_m13_m49_optimum', [13, 49]),
    ('test_m102_best', [102]),
    ('test_majority', []),
  ],
)
def test_names_hold_numbers(name, numbers):
  assert TABLE['numbers'](name) == numbers
