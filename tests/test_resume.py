"""A run that was killed ends with the bits of one that was not."""

import importlib.util
import json
import pathlib
import subprocess
import sys
from types import ModuleType

import pytest

PROGRAM = pathlib.Path(__file__).parents[1] / 'experiments/resume/kill.py'


@pytest.fixture(scope='module')
def kill() -> ModuleType:
  spec = importlib.util.spec_from_file_location('kill', PROGRAM)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_dying_in_rollout_and_in_a_save_changes_no_bit(
  kill: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  # Started sooner.
  monkeypatch.delenv('JAX_NUM_CPU_DEVICES')
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  variant, cache = 'refresh', str(tmp_path / 'cache')
  whole, killed = str(tmp_path / 'whole'), tmp_path / 'killed'
  kill.killed_run(whole, variant, cache, [])
  rollout = kill.Fault('in_rollout', kill.SFT_STEPS[variant] + 1)
  save = kill.Fault('in_checkpoint', 3 * kill.SAVE_EVERY)

  status, _ = kill.start(str(killed), variant, cache, rollout)
  assert status == -9
  assert not (killed / 'finished.json').exists()
  assert steps(killed) == list(range(rollout.step))
  status, _ = kill.start(str(killed), variant, cache, save)
  assert status == -9
  assert str(save.step) not in committed(killed)
  status, _ = kill.start(str(killed), variant, cache)
  assert status == 0
  assert steps(killed) == list(range(kill.num_steps(variant) + 1))
  found = kill.fingerprints(str(killed))
  assert found == kill.fingerprints(whole)

  status, said = kill.start(str(killed), variant, cache)
  assert status == 0
  assert f'finished ({kill.num_steps(variant)} steps)' in said
  assert kill.fingerprints(str(killed)) == found


@pytest.mark.slow
def test_ten_runs_killed_at_random_moments() -> None:
  done = subprocess.run(
    [sys.executable, PROGRAM, '--kills=10'], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert '0 of 10 killed runs differ' in done.stdout


def steps(directory: pathlib.Path) -> list[int]:
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


def committed(directory: pathlib.Path) -> list[str]:
  return [p.name for p in (directory / 'checkpoints').iterdir()]
