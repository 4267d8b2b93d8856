"""Tables of a sweep: from files alone, by hand where that can be."""

import importlib.util
import json
import math
import pathlib
import sys
from types import ModuleType

import numpy as np
import pytest

from postrain.sweeps import tables

ROOT = pathlib.Path(__file__).parents[1]
# By clip and seed; the advantage adds 1 to every one.
FINALS = {('low', 0): 1.0, ('low', 1): 3.0, ('high', 0): 5.0, ('high', 1): 6.0}


def workdir(root: pathlib.Path) -> str:
  """Eight rows that have finished, one that has not."""
  entries = []
  for gain, advantage in enumerate(('a', 'b')):
    for (clip, seed), final in FINALS.items():
      labels = {'advantage': advantage, 'clip': clip, 'seed': str(seed)}
      add(root, entries, labels, final + gain)
  add(root, entries, {'advantage': 'a', 'clip': 'new', 'seed': '0'}, 9.0)
  (root / entries[-1]['directory'] / 'finished.json').unlink()
  (root / 'sweep.json').write_text(json.dumps(entries))
  return str(root)


def add(
  root: pathlib.Path, entries: list, labels: dict[str, str], final: float
) -> None:
  number = len(entries)
  directory = root / 'rows' / str(number)
  directory.mkdir(parents=True)
  # Of the last two the mean is the final one.
  values = [0.0, final - 1, final + 1]
  rows = [{'step': i, 'reward': x} for i, x in enumerate(values)]
  rows.append({'step': 3, 'eval': 0.5})
  (directory / 'metrics.jsonl').write_text(
    ''.join(json.dumps(row) + '\n' for row in rows)
  )
  (directory / 'finished.json').write_text('{}')
  entries.append({
    'identity': str(number), 'name': ' '.join(labels.values()),
    'labels': labels, 'directory': f'rows/{number}',
  })  # fmt: skip


def test_cells_and_their_summaries(tmp_path):
  found = tables.results(workdir(tmp_path), 'reward', last=2)
  assert len(found) == 8
  assert tables.results(str(tmp_path), 'reward')[0].final == 2.0
  cells = tables.cells(found)
  cell = (('advantage', 'a'), ('clip', 'low'))
  first = tables.summary(result.final for result in cells[cell])
  assert first[:3] == (2, 2.0, pytest.approx(1.0))
  assert (first.low, first.high) == (1.0, 3.0)
  lone = tables.summary([4.0])
  assert lone[:2] == (1, 4.0)
  assert all(map(math.isnan, lone[2:]))


def test_effects_are_paired_and_their_units_are_seeds(tmp_path):
  found = tables.results(workdir(tmp_path), 'reward', last=2)
  advantage, clip = tables.effects(found)
  assert advantage[:3] == ('advantage', 'b', 'a')
  assert advantage.difference == (2, 1.0, 0.0, 1.0, 1.0)
  assert advantage.exceeds
  # Seed 0 adds 4, seed 1 adds 3, with either advantage.
  assert clip[:3] == ('clip', 'high', 'low')
  assert clip.difference[:3] == (2, 3.5, pytest.approx(0.5))
  assert (clip.difference.low, clip.difference.high) == (3.0, 4.0)


def test_an_effect_of_nothing_exceeds_nothing():
  found = [
    tables.Result({'x': x, 'seed': str(seed)}, *[np.zeros(1)] * 2, float(final))
    for x, finals in (('a', (1, 2, 3)), ('b', (2, 1, 3)))
    for seed, final in enumerate(finals)
  ]
  (effect,) = tables.effects(found)
  assert effect.difference.mean == 0
  assert not effect.exceeds


@pytest.mark.parametrize(
  ('figure', 'last', 'message'),
  [
    ('rewart', 1, "has no figure 'rewart'; it has: eval, reward"),
    ('reward', 0, 'last=0: it must be at least 1'),
  ],
)
def test_mistakes_are_named(tmp_path, figure, last, message):
  with pytest.raises(ValueError, match=message):
    tables.results(workdir(tmp_path), figure, last=last)


def test_workdirs_without_results_are_named(tmp_path):
  with pytest.raises(ValueError, match='holds no sweep'):
    tables.results(str(tmp_path), 'reward')
  for finished in pathlib.Path(workdir(tmp_path)).glob('rows/*/finished.json'):
    finished.unlink()
  with pytest.raises(ValueError, match='none of the 9 rows'):
    tables.results(str(tmp_path), 'reward')


@pytest.fixture(scope='module')
def command() -> ModuleType:
  spec = importlib.util.spec_from_file_location(
    'report', ROOT / 'experiments' / 'report.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_command_prints_tables_and_draws(
  command, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(
    sys, 'argv', ['report.py', workdir(tmp_path), '--last=2', '--split=clip']
  )
  command.main()
  said = capsys.readouterr().out
  assert said.startswith('8 of 9 rows have finished')
  assert '## low: `reward`, mean of the last 2' in said
  assert '| a | 2 | 2.000 | 1.000 | 1.000 to 3.000 |' in said
  assert (
    '| advantage | b | a | 2 | 1.000 | 0.000 | 1.000 to 1.000 | yes |' in said
  )
  assert (tmp_path / 'report.md').read_text() in said
  for name in ('curves.png', 'sensitivity.png'):
    assert (tmp_path / name).stat().st_size > 5000
  record = json.loads((tmp_path / 'report.json').read_text())
  assert len(record['finals']) == 8


def test_an_axis_that_is_none_is_named(command, tmp_path, monkeypatch):
  monkeypatch.setattr(
    sys, 'argv', ['report.py', workdir(tmp_path), '--split=task']
  )
  with pytest.raises(SystemExit, match='--split=task: the axes with several'):
    command.main()


def test_smoothing_is_a_mean_of_what_was(command):
  smooth = command.smooth(np.array([1.0, 2.0, 3.0, 4.0]), 2)
  np.testing.assert_allclose(smooth, [1.0, 1.5, 2.5, 3.5])
