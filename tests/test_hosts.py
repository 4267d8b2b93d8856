"""Several processes make one run: what they share, how they stop and go on."""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import hosts_config
import hosts_program
import jax
import numpy as np
import pytest
import tiny

from postrain import hosts, sharding
from postrain.checkpoints import Checkpoints
from postrain.reporting import Report
from postrain.trainer import Trainer

quick_compiler = tiny.quick_compiler

ROOT = pathlib.Path(__file__).parents[1]
HEARTBEAT = 10
# What the coordinator says of task 1, by whether it was just speaking to it.
LOST = (
  r'Task 1 heartbeat timeout|unhealthy \(stopped sending heartbeats\):\n1\n'
)


def free_port() -> int:
  with socket.create_server(('localhost', 0)) as server:
    return server.getsockname()[1]


def test_nobody_at_the_address() -> None:
  with (
    pytest.raises(ValueError, match='nobody listens at the coordinator local'),
    hosts.joined(
      coordinator=f'localhost:{free_port()}', num_processes=2, process_id=1,
      connect_seconds=0,
    ),
  ):  # fmt: skip
    pass


def test_without_arguments_there_is_one_process() -> None:
  with hosts.joined():
    assert jax.process_count() == 1
  assert hosts.exchanged('a') == ['a']


# A launcher of programs that touch no device.


def launched(code: str, *, count: int = 2) -> subprocess.Popen:
  return subprocess.Popen(
    [
      *(sys.executable, ROOT / 'experiments' / 'launch.py'),
      *(f'--num_processes={count}', '--patience=0', '--', '-c', code),
    ],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def test_the_launcher_numbers_processes() -> None:
  done = launched(
    "import os, sys; os.write(1, f'{sys.argv[2:]}\\n'.encode())", count=3
  )
  out, _ = done.communicate(timeout=60)
  assert sorted(out.splitlines()) == [
    str(['--num_processes=3', f'--process_id={number}']) for number in range(3)
  ]
  assert done.returncode == 0


def test_the_launcher_ends_all_when_one_fails() -> None:
  code = (
    "import sys, time; sys.argv[3].endswith('1') and sys.exit(3);"
    ' time.sleep(600)'
  )
  done = launched(code)
  _, said = done.communicate(timeout=60)
  assert done.returncode == 3
  assert 'process 1 ended with 3' in said


def test_the_launcher_passes_sigterm_on() -> None:
  code = (
    'import os, signal, sys, time; signal.signal(signal.SIGTERM,'
    " lambda *_: sys.exit(75)); os.write(1, b'ready\\n'); time.sleep(600)"
  )
  done = launched(code)
  assert [done.stdout.readline() for _ in range(2)] == ['ready\n'] * 2
  done.terminate()
  done.communicate(timeout=60)
  assert done.returncode == 75


# One process.


def contents(directory: pathlib.Path) -> dict[str, str]:
  """Digests of all that a run must reproduce."""
  files = ['metrics.jsonl', 'samples.jsonl']
  if (directory / 'export').exists():
    files += ['export/model.safetensors']
  found = {
    name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
    for name in files
  }
  # The digest of every leaf is in the checkpoint, and held by every restore.
  folder = directory / 'checkpoints'
  newest = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  with contextlib.closing(Checkpoints(str(folder), keep=None)) as opened:
    found |= opened.digests(newest)
  return {'step': str(newest), **found}


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = tiny.sort()
  Trainer(config, str(tmp_path / 'whole')).run()
  before, defer = signal.getsignal(signal.SIGTERM), Report.defer

  def asked(self: Report, step: int, tell: Callable) -> None:
    defer(self, step, tell)
    if step == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patched:
    patched.setattr(Report, 'defer', asked)
    with pytest.raises(hosts.Stopped) as stopped:
      Trainer(config, str(tmp_path / 'stopped')).run()
  assert stopped.value.code == 75
  assert signal.getsignal(signal.SIGTERM) is before
  assert (tmp_path / 'stopped' / 'checkpoints' / '2').is_dir()
  Trainer(config, str(tmp_path / 'stopped')).run()
  assert contents(tmp_path / 'stopped') == contents(tmp_path / 'whole')


# Two processes of four devices.


def test_two_processes_share_values_errors_and_checkpoints(
  tmp_path: pathlib.Path,
) -> None:
  port, saved = str(free_port()), str(tmp_path / 'saved')
  program = [sys.executable, str(ROOT / 'tests' / 'hosts_program.py'), port]
  both = [
    subprocess.Popen(
      [*program, str(index), saved],
      env={**os.environ, 'JAX_NUM_CPU_DEVICES': '4'},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for index in range(2)
  ]  # fmt: skip
  said = [process.communicate(timeout=300)[0] for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  assert said[0].endswith('done\n')
  expected = jax.jit(hosts_program.state)()
  for sizes in ((2, 4), (4, 1), (1, 2), (1, 1)):
    mesh = sharding.make_mesh(data=sizes[0], fsdp=sizes[1])
    like = sharding.abstract(expected, hosts_program.placed(mesh))
    with contextlib.closing(Checkpoints(saved, keep=1)) as opened:
      found = opened.restore(hosts_program.STEP, like)
    assert len(found['cut'].sharding.device_set) == sizes[0] * sizes[1]
    for name, array in expected.items():
      assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(('dying', 'message'), [(0, 'leader'), (1, LOST)])
def test_a_death_ends_the_other(
  dying: int, message: str, tmp_path: pathlib.Path
) -> None:
  port, logs = str(free_port()), [tmp_path / '0', tmp_path / '1']
  both = []
  for index in range(2):
    with logs[index].open('w') as log:
      both.append(
        subprocess.Popen(
          [
            sys.executable, ROOT / 'tests' / 'hosts_death.py',
            port, str(index), '5', str(dying),
          ],
          env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'},
          stdout=log, stderr=subprocess.STDOUT,
        )
      )  # fmt: skip
  statuses = [process.wait(timeout=300) for process in both]
  assert statuses[dying] == -signal.SIGKILL
  assert statuses[1 - dying] not in (0, -signal.SIGKILL)
  assert re.search(message, logs[1 - dying].read_text())


class Outcome(NamedTuple):
  """How both processes ended, what they said, and seconds between the ends."""

  statuses: list[int]
  said: list[str]
  apart: float


def program(directory: pathlib.Path, *more: str) -> list[str]:
  return [
    str(ROOT / 'experiments' / 'train.py'),
    f'--config={hosts_config.__file__}:{directory.parent}',
    f'--workdir={directory}', *more,
  ]  # fmt: skip


def run(
  directory: pathlib.Path, faults: tuple[str, str] = ('', ''),
  asked: tuple[int, ...] = (),
) -> Outcome:  # fmt: skip
  """Both processes until they end.

  Each dies at its fault; those that are asked to stop get a SIGTERM before
  their first step.
  """
  port, both = free_port(), []
  logs = [directory.parent / f'{directory.name}-{i}.log' for i in range(2)]
  for index, fault in enumerate(faults):
    more = {'POSTRAIN_FAULT': fault, 'HOSTS_WAIT': '1' if asked else '0'}
    flags = (
      f'--heartbeat_seconds={HEARTBEAT}', f'--coordinator=localhost:{port}',
      '--num_processes=2', f'--process_id={index}',
    )  # fmt: skip
    with logs[index].open('w') as log:
      both.append(
        subprocess.Popen(
          [sys.executable, *program(directory, *flags)],
          env=environment(directory.parent, 4) | more,
          stdout=log, stderr=subprocess.STDOUT,
        )
      )  # fmt: skip
  try:
    while asked and 'programs in' not in logs[0].read_text():
      assert both[0].poll() is None, logs[0].read_text()
      time.sleep(0.1)
    for index in asked:
      both[index].terminate()
    ends = list(ended(both, time.monotonic() + 600))
  finally:
    for process in both:
      process.kill()
      process.wait()
  said = [log.read_text() for log in logs]
  return Outcome([p.returncode for p in both], said, ends[1] - ends[0])


def ended(processes: list, last: float) -> Iterator[float]:
  """When each of the processes ends, in the order of their ends."""
  under_way = [*processes]
  while under_way:
    assert time.monotonic() < last, 'a process hangs'
    for process in [p for p in under_way if p.poll() is not None]:
      under_way.remove(process)
      yield time.monotonic()
    time.sleep(0.05)


def environment(folder: pathlib.Path, devices: int) -> dict[str, str]:
  return {
    **os.environ,
    'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}',
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
  }


def launched_run(directory: pathlib.Path) -> None:
  """To the end, by the command of the README."""
  done = subprocess.run(
    [
      sys.executable, ROOT / 'experiments' / 'launch.py', '--num_processes=2',
      '--devices=4', '--', *program(directory),
    ],
    env=environment(directory.parent, 1), timeout=600, capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A run of two processes from begin to end."""
  folder = tmp_path_factory.mktemp('hosts')
  hosts_config.write(folder)
  launched_run(folder / 'whole')
  return folder / 'whole'


def rows(directory: pathlib.Path, name: str) -> list[dict[str, Any]]:
  lines = (directory / name).read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_do_what_one_does(whole: pathlib.Path) -> None:
  alone = whole.parent / 'alone'
  subprocess.run(
    [sys.executable, *program(alone)], env=environment(whole.parent, 8),
    check=True,
  )  # fmt: skip
  for ours, theirs in zip(
    rows(whole, 'metrics.jsonl'), rows(alone, 'metrics.jsonl'), strict=True
  ):
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
  told = [
    [row['completion'] for row in rows(each, 'samples.jsonl')]
    for each in (whole, alone)
  ]
  assert told[0] == told[1]


@pytest.mark.slow
def test_processes_that_are_stopped_go_on_with_the_same_bits(
  whole: pathlib.Path,
) -> None:
  stopped = whole.parent / 'stopped'
  for asked in ((1,), (0, 1)):
    end = run(stopped, asked=asked)
    assert end.statuses == [75, 75], end.said
    assert 'stopped at step' in end.said[0]
  launched_run(stopped)
  assert contents(stopped) == contents(whole)


@pytest.mark.slow
def test_processes_that_are_killed_go_on_with_the_same_bits(
  whole: pathlib.Path,
) -> None:
  killed, last = whole.parent / 'killed', hosts_config.NUM_STEPS
  end = run(killed, ('', f'in_rollout:{last - 2}'))
  assert end.statuses[1] == -signal.SIGKILL, end.said
  assert end.statuses[0] not in (0, -signal.SIGKILL), end.said
  assert re.search(LOST, end.said[0]), end.said[0]
  assert end.apart < 2 * HEARTBEAT
  end = run(killed, (f'in_checkpoint:{last - 1}',) * 2)
  assert end.statuses[0] == -signal.SIGKILL, end.said
  # The second may learn of the first's death before its own.
  assert end.statuses[1] in (-signal.SIGKILL, -signal.SIGABRT), end.said
  assert not (killed / 'finished.json').exists()
  launched_run(killed)
  assert contents(killed) == contents(whole)
