"""Every notebook runs from top to bottom, and is committed without outputs."""

import json
import pathlib

import pytest

plt = pytest.importorskip('matplotlib.pyplot')

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
SLOW = {'meshes'}  # five compilations; tests/test_meshes.py has the like
each_notebook = pytest.mark.parametrize(
  'path',
  [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW))
    for path in NOTEBOOKS
  ],
  ids=lambda path: path.stem,
)


def code_cells(path: pathlib.Path) -> list[dict]:
  cells = json.loads(path.read_text())['cells']
  return [cell for cell in cells if cell['cell_type'] == 'code']


@each_notebook
def test_cells_run(path, monkeypatch):
  plt.switch_backend('Agg')
  # Where a reader opens it; the library is found as it is installed.
  monkeypatch.chdir(path.parent)
  namespace = {'__name__': '__main__'}
  try:
    for number, cell in enumerate(code_cells(path)):
      source = ''.join(cell['source'])
      exec(compile(source, f'{path.stem}[{number}]', 'exec'), namespace)
  finally:
    plt.close('all')


@each_notebook
def test_outputs_are_stripped(path):
  for cell in code_cells(path):
    assert cell['outputs'] == []
    assert cell['execution_count'] is None


def test_there_are_notebooks():
  assert NOTEBOOKS
