"""Rows that a study draws: one after another, and on where it was stopped."""

import functools
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import time
import types
from typing import Any

import pytest
from test_sweeps import started
import tiny

from postrain.recipe import plain
from postrain.sweeps import Range, Search, claim, searching

RATE = 'rl.optimizer.learning_rate'
AXES = {
  RATE: Range(1e-3, 1e-1, log=True),
  'loss': [
    dict(name='reinforce'),
    dict(name='ppo_clip', clip_low=0.2, clip_high=0.2),
  ],
}
CHOICES = Search(AXES, figure='reward', number=5, seed=3)


class Study:
  """The part of Optuna's study that a search asks, kept in one file."""

  def __init__(self, path: str):
    self.path, self.trials, self.user_attrs = path, [], {}
    if os.path.exists(path):
      self.trials, self.user_attrs = pickle.loads(
        pathlib.Path(path).read_bytes()
      )

  def save(self) -> None:
    kept = self.trials, self.user_attrs
    pathlib.Path(self.path).write_bytes(pickle.dumps(kept))

  def set_user_attr(self, name: str, value: Any) -> None:
    self.user_attrs[name] = value
    self.save()

  def ask(self, axes: dict[str, Any]) -> None:
    draws = random.Random(self.sampler)
    params = {path: draw(draws) for path, draw in axes.items()}
    trial = types.SimpleNamespace(params=params, state='running', value=None)
    self.trials.append(trial)
    self.save()

  def tell(self, number: int, value: Any = None, state: Any = None) -> None:
    self.trials[number].value, self.trials[number].state = value, state
    self.save()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
  """An optuna that draws at random."""
  name = types.SimpleNamespace
  module: Any = types.ModuleType('optuna')
  module.samplers = name(TPESampler=lambda seed: seed)
  module.trial = name(
    TrialState=name(RUNNING='running', COMPLETE='complete', FAIL='fail')
  )
  module.distributions = name(
    CategoricalDistribution=lambda values: lambda d: d.choice(values),
    FloatDistribution=lambda low, high, log: lambda d: d.uniform(low, high),
    IntDistribution=lambda low, high, log: lambda d: d.randint(low, high),
  )
  module.storages = name(
    JournalStorage=lambda path: path,
    journal=name(JournalFileBackend=lambda path: path),
  )
  module.logging = name(set_verbosity=lambda level: None, WARNING=0)
  module.create_study = lambda storage, **_: Study(storage)
  monkeypatch.setitem(sys.modules, 'optuna', module)


def finish(rows: list) -> list:
  """Run the last row: its reward is its learning rate."""
  planned = rows[-1]
  directory = pathlib.Path(planned.directory)
  with claim(rows, str(directory.parents[1])):
    assert not planned.finished
    reward = {'step': 0, 'reward': planned.config['rl']['optimizer'][RATE[13:]]}
    (directory / 'metrics.jsonl').write_text(json.dumps(reward) + '\n')
    (directory / 'finished.json').write_text('{}')
  return []


@functools.cache
def base() -> dict[str, Any]:
  return plain(tiny.sort())


def searched(root: pathlib.Path, run: Any, choices: Search = CHOICES) -> list:
  return searching.search(base(), choices, str(root), run)


def test_a_search_that_was_stopped_draws_what_it_would_have(stand_in, tmp_path):
  whole = searched(tmp_path / 'whole', finish)
  assert len({t.planned.identity for t in whole}) == 5
  assert [t.value for t in whole] == [
    t.planned.row.overrides[RATE] for t in whole
  ]

  class Stopped(Exception):
    pass

  def stop_at(number: int) -> Any:
    def run(rows: list) -> list:
      if len(rows) == number:
        raise Stopped
      return finish(rows)

    return run

  for number in (2, 4):
    with pytest.raises(Stopped):
      searched(tmp_path / 'cut', stop_at(number))
  cut = searched(tmp_path / 'cut', stop_at(0))
  assert [t.planned.identity for t in cut] == [
    t.planned.identity for t in whole
  ]
  assert searching.best(cut, CHOICES).value == max(t.value for t in whole)
  less = CHOICES._replace(maximize=False)
  assert searching.best(cut, less).value == min(t.value for t in whole)


def test_what_fails_has_no_value_and_is_not_run_again(stand_in, tmp_path):
  trials = searched(tmp_path, lambda rows: rows[-1:])
  assert [t.value for t in trials] == [None] * 5
  assert searching.best(trials, CHOICES) is None

  def run(rows: list) -> list:
    raise AssertionError(rows)

  searched(tmp_path, run)


def test_what_is_drawn_twice_is_run_once(stand_in, tmp_path):
  choices = Search({'seed': [1, 2]}, figure='reward', number=8)
  runs = []

  def run(rows: list) -> list:
    runs.append(rows[-1].row.name)
    return finish(rows)

  trials = searched(tmp_path, run, choices)
  assert len(trials) == 8
  assert len(runs) == 2


@pytest.mark.parametrize(
  ('choices', 'message'),
  [
    (CHOICES._replace(number=0), 'number=0'),
    (CHOICES._replace(seed=-1), 'seed=-1'),
    (CHOICES._replace(axes={'seed': 3}), "'seed': 3 is no Range"),
    (CHOICES._replace(axes={'sead': [3]}), "no field 'sead'"),
  ],
)
def test_mistakes_are_named(stand_in, tmp_path, choices, message):
  with pytest.raises(ValueError, match=message):
    searched(tmp_path, finish, choices)


def test_another_search_is_refused_and_a_longer_one_is_not(stand_in, tmp_path):
  searched(tmp_path, finish, CHOICES._replace(number=2))
  assert len(searched(tmp_path, finish)) == 5
  with pytest.raises(ValueError, match='holds another search'):
    searched(tmp_path, finish, CHOICES._replace(seed=4))


def test_without_optuna_the_error_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'optuna', None)
  with pytest.raises(ValueError, match=r"pip install 'postrain\[search\]'"):
    searched(tmp_path, finish)


def test_optuna_itself(tmp_path):
  """Its first ten draws are random, the rest follow from what they reached."""
  pytest.importorskip('optuna')
  choices = CHOICES._replace(number=14)
  short = searched(tmp_path / 'cut', finish, choices._replace(number=2))
  searched(tmp_path / 'cut', finish, choices._replace(number=12))
  whole = searched(tmp_path / 'whole', finish, choices)
  cut = searched(tmp_path / 'cut', finish, choices)
  assert [t.planned.identity for t in cut] == [
    t.planned.identity for t in whole
  ]
  assert [t.value for t in cut[:2]] == [t.value for t in short]


SEARCH = """
import tiny
from postrain import sweeps

def get_config():
  return tiny.sort()

def get_search():
  rates = sweeps.Range(1e-3, 1e-1, log=True)
  return sweeps.Search(
    {'rl.optimizer.learning_rate': rates}, figure='reward', number=3
  )
"""


@pytest.mark.slow
def test_a_search_that_is_killed_ends_as_one_that_is_not(tmp_path):
  pytest.importorskip('optuna')
  (tmp_path / 'search.py').write_text(SEARCH)
  program = [
    sys.executable, tiny.ROOT / 'experiments' / 'sweep.py',
    tmp_path / 'search.py',
  ]  # fmt: skip
  environment = started(tmp_path)
  first = subprocess.Popen(
    [*program, f'--workdir={tmp_path / "killed"}'], env=environment
  )
  while not list(tmp_path.glob('killed/rows/*/finished.json')):
    assert first.poll() is None
    time.sleep(0.02)
  first.kill()
  first.wait()
  said = [
    subprocess.run(
      [*program, f'--workdir={tmp_path / name}'], env=environment, check=True,
      capture_output=True, text=True,
    ).stdout.splitlines()[-1]
    for name in ('killed', 'whole')
  ]  # fmt: skip
  assert said[0] == said[1]
  assert said[0].startswith('best reward ')
  names = [
    sorted(path.name for path in (tmp_path / name / 'rows').iterdir())
    for name in ('killed', 'whole')
  ]
  assert names[0] == names[1]
  assert len(names[0]) == 3
