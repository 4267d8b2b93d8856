"""Whose directory it is, and what is written in it whole or not at all."""

import json
import pathlib
import subprocess
import sys

import pytest

from postrain import workdir

CONFIG = {'seed': 0, 'rl': {'rate': 0.1, 'ks': (1, 2)}, 'logging': {'every': 1}}


def test_claim_records_where_a_run_comes_from(tmp_path: pathlib.Path) -> None:
  workdir.claim(str(tmp_path / 'a' / 'b'), CONFIG, {'seed': 0})
  record = json.loads((tmp_path / 'a' / 'b' / 'config.json').read_text())
  assert record['config'] == json.loads(json.dumps(CONFIG))
  assert record['overrides'] == {'seed': 0}
  assert record['versions'].keys() == {*workdir.PACKAGES, 'python'}
  assert record['commit'] is None or len(record['commit']) == 40


def test_claim_again_keeps_the_first_record(tmp_path: pathlib.Path) -> None:
  workdir.claim(str(tmp_path), CONFIG)
  before = (tmp_path / 'config.json').read_bytes()
  workdir.claim(str(tmp_path), {**CONFIG, 'logging': {'every': 9}})
  assert (tmp_path / 'config.json').read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_differences_name_fields() -> None:
  ours = {'a': 1, 'b': {'c': 2, 'd': [1, 2]}, 'logging': 1, 'gone': None}
  theirs = {'a': 1, 'b': {'c': 3, 'd': [1, 2]}, 'logging': 2, 'new': 5}
  assert workdir.differences(ours, theirs) == [
    'b.c: 2 there, 3 here',
    "gone: None there, 'absent' here",
    "new: 'absent' there, 5 here",
  ]
  assert workdir.differences(ours, ours) == []


def test_differences_leave_out_what_changes_no_bit() -> None:
  ours = {'machine': {'memory_limit': None}, 'environment': {'train': 'a'}}
  theirs = {
    'machine': {'memory_limit': 1},
    'environment': {'train': 'b', 'num_workers': 4, 'timeout': 5.0},
  }
  differing = ["environment.train: 'a' there, 'b' here"]
  assert workdir.differences(ours, theirs) == differing


@pytest.mark.parametrize('content', ['{"model": 1}', '[]', 'not JSON', ''])
def test_config_file_of_others(content: str, tmp_path: pathlib.Path) -> None:
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(ValueError, match='was not written by a run'):
    workdir.claim(str(tmp_path), CONFIG)
  assert (tmp_path / 'config.json').read_text() == content


def test_release_removes_what_claim_made(tmp_path: pathlib.Path) -> None:
  directory = tmp_path / 'run'
  workdir.claim(str(directory), CONFIG)
  (directory / 'checkpoints').mkdir()
  (directory / 'metrics.jsonl').touch()
  workdir.release(str(directory))
  assert not directory.exists()
  workdir.release(str(directory))


@pytest.mark.parametrize('kept', ['metrics.jsonl', 'checkpoints/1'])
def test_release_leaves_a_run_that_has_begun(
  kept: str, tmp_path: pathlib.Path
) -> None:
  workdir.claim(str(tmp_path), CONFIG)
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / kept).write_text('{"step": 0}\n')
  workdir.release(str(tmp_path))
  assert (tmp_path / 'config.json').exists()
  assert (tmp_path / kept).exists()


def test_release_leaves_files_of_others(tmp_path: pathlib.Path) -> None:
  workdir.claim(str(tmp_path), CONFIG)
  (tmp_path / 'notes.txt').write_text('mine')
  workdir.release(str(tmp_path))
  assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']


def test_write_json_replaces_whole_files(tmp_path: pathlib.Path) -> None:
  path = tmp_path / 'a.json'
  workdir.write_json(str(path), {'a': 1})
  circle: dict = {}
  circle['circle'] = circle
  with pytest.raises(ValueError, match='Circular'):
    workdir.write_json(str(path), circle)
  assert json.loads(path.read_text()) == {'a': 1}


def test_die_at_ends_the_process_at_its_point_alone() -> None:
  code = (
    'from postrain.workdir import die_at\n'
    "die_at('here', 2); die_at('there', 3); print('alive', flush=True)\n"
    "die_at('here', 3); print('not reached')"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], env={'POSTRAIN_FAULT': 'here:3'},
    cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == -9
  assert done.stdout == 'alive\n'
