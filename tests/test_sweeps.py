"""Sweeps: rows, their places, and processes that fail, are killed, go on."""

import functools
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

import pytest
import tiny

from postrain import sweeps, workdir
from postrain.recipe import plain
from postrain.sweeps import Range, Row, local, rows, worker
from postrain.trainer import Trainer

quick_compiler = tiny.quick_compiler

ROOT = pathlib.Path(__file__).parents[1]
# A worker without JAX: ends with the statuses that a row's file lists, one a
# try, and then finishes the row.
STAND_IN = """
import json, os, pathlib, sys
for line in sys.stdin:
  row = pathlib.Path(line.rstrip('\\n'))
  with open(row / 'tries', 'a') as f: f.write('x')
  tries = (row / 'tries').stat().st_size
  listed = row / 'statuses.json'
  statuses = json.loads(listed.read_text()) if listed.exists() else []
  if tries <= len(statuses):
    status = statuses[tries - 1]
    os.kill(os.getpid(), -status) if status < 0 else os._exit(status)
  (row / 'finished.json').write_text('{}')
  os.write(1, b'done\\n')
"""


@functools.cache
def base() -> dict[str, Any]:
  return plain(tiny.sort())


def four() -> list[Row]:
  return sweeps.crossed(
    sweeps.named('loss', {
      'grpo': {'loss': dict(name='ppo_clip', clip_low=0.1, clip_high=0.1)},
      'plain': {'loss': dict(name='reinforce')},
    }),
    sweeps.seeds(2),
  )  # fmt: skip


def run(planned: list, root: pathlib.Path, **more: Any) -> tuple[list, list]:
  """What failed, and what was said, of stand-ins."""
  said: list[str] = []
  path = root / 'worker.py'
  path.write_text(STAND_IN)
  options = dict(num_workers=2, num_retries=1, say=said.append) | more
  with sweeps.claim(planned, str(root)):
    failed = local.run(planned, command=[sys.executable, str(path)], **options)
  return failed, said


def tries(planned: list) -> list[int]:
  paths = [pathlib.Path(each.directory, 'tries') for each in planned]
  return [path.stat().st_size if path.exists() else 0 for path in paths]


def test_rows_of_each_kind():
  axes = {'seed': [1, 2], 'loss.clip_high': [0.1, 0.3]}
  assert [r.overrides for r in sweeps.grid(axes)] == [
    {'seed': 1, 'loss.clip_high': 0.1},
    {'seed': 1, 'loss.clip_high': 0.3},
    {'seed': 2, 'loss.clip_high': 0.1},
    {'seed': 2, 'loss.clip_high': 0.3},
  ]
  assert [[*r.overrides.values()] for r in sweeps.zipped(axes)] == [
    [1, 0.1],
    [2, 0.3],
  ]
  assert [r.name for r in four()] == [
    f'loss={loss} seed={seed}' for loss in ('grpo', 'plain') for seed in (0, 1)
  ]
  assert [r.name for r in sweeps.grid({'loss': [dict(name='gspo')]})] == [
    'loss=gspo'
  ]


def test_draws_are_seeded_and_more_of_them_begin_alike():
  axes = {
    'rl.optimizer.learning_rate': Range(1e-4, 1e-2, log=True),
    'sampling.temperature': Range(0.5, 1.0),
    'rl.num_epochs': Range(1, 3, integer=True),
    'advantage': [dict(name='group_centered'), dict(name='group_normalized')],
  }
  drawn = sweeps.random(axes, number=200, seed=3)
  assert drawn[:20] == sweeps.random(axes, number=20, seed=3)
  assert drawn[:20] != sweeps.random(axes, number=20, seed=4)
  columns = {path: [r.overrides[path] for r in drawn] for path in axes}
  rates, temperatures, epochs, advantages = columns.values()
  assert all(1e-4 <= rate <= 1e-2 for rate in rates)
  assert 60 < sum(rate < 1e-3 for rate in rates) < 140
  assert all(0.5 <= t <= 1 for t in temperatures)
  assert {*epochs} == {1, 2, 3}
  assert {each['name'] for each in advantages} == {
    'group_centered',
    'group_normalized',
  }


def test_a_row_has_the_identity_of_its_config(tmp_path):
  first = sweeps.plan(base(), four(), str(tmp_path))
  again = sweeps.plan(base(), four()[::-1], str(tmp_path / 'elsewhere'))
  ids = [planned.identity for planned in first]
  assert ids == [planned.identity for planned in again][::-1]
  assert len({*ids}) == 4
  loud = dict(base(), logging={**base()['logging'], 'table_every': 7})
  assert ids == [p.identity for p in sweeps.plan(loud, four(), str(tmp_path))]
  assert first[2].config['loss'] == {'name': 'reinforce'}
  assert first[3].config['seed'] == 1
  assert not os.listdir(tmp_path)


LONE = Row({'seed': '1'}, {'seed': 1})
BAD = [
  # What a sweep yields, what the error says.
  ([], 'a sweep without a row'),
  (None, 'rows=None: a sweep yields rows'),
  ({'seed': 1}, "rows={'seed': 1}: a sweep yields rows"),
  ([3], 'row 1 is 3: give a dict of overrides'),
  ([LONE, ['seed', 1]], r"row 2 is \['seed', 1\]: give a dict"),
  ([{1: 2}], 'row 1: {1: 2} is no dict whose keys are texts'),
  ([Row({'seed': 1}, {'seed': 1})], r"labels={'seed': 1}: they must be texts"),
  ([Row('a', {})], "row 1: 'a' is no dict"),
  ([{'sead': 1}], r"'sead': config has no field 'sead' \(did you mean 'seed'"),
  ([{'loss.clip': 1}], "'loss.clip': config.loss has no field 'clip'"),
  ([{'seed.x': 1}], "config.seed has no field 'x'; it has: none"),
  ([{'seed': 'one'}], r"row 1 \(seed=one\): config: seed='one' is not of type"),
  ([{'rl.num_prompts': 0}], 'rl.num_prompts=0: it must be at least 1'),
  ([{'loss': dict(name='ppo_clop')}], "has no 'ppo_clop'"),
  ([{'loss': dict(name='ppo_clip', high=1)}], "no hyperparameter 'high'"),
  ([{'sampling.num_samples': 1}], 'a group of one has nothing to compare'),
  ([{'loss': dict(name=len)}], 'is nothing that a config can hold'),
  ([LONE, {'seed': 1}], r'row 2 .* has the config of the row \(seed=1\)'),
  ([LONE, Row({'seed': '1'}, {'seed': 2})], 'another row has these labels'),
]


@pytest.mark.parametrize(('given', 'message'), BAD)
def test_bad_sweeps_are_named_before_anything_runs(tmp_path, given, message):
  with pytest.raises(ValueError, match=message):
    sweeps.plan(base(), given, str(tmp_path))
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: sweeps.grid({'seed': 3}), "'seed': 3 is no list of values"),
    (lambda: sweeps.grid({'seed': 'abc'}), "'seed': 'abc' is no list"),
    (lambda: sweeps.grid({'seed': []}), "'seed': an empty list"),
    (lambda: sweeps.grid({'seed': Range(0, 1)}), 'is for sweeps.random'),
    (lambda: sweeps.zipped({'a': [1], 'b': [1, 2]}), "{'a': 1, 'b': 2} values"),
    (lambda: sweeps.seeds(0), 'number=0: it must be at least 1'),
    (lambda: sweeps.random({'a': [1]}, number=0, seed=0), 'number=0'),
    (
      lambda: sweeps.random({'a': Range(2, 1)}, number=1, seed=0),
      'low must not exceed high',
    ),
    (
      lambda: sweeps.random({'a': Range(0, 1, log=True)}, number=1, seed=0),
      'be positive where log=True',
    ),
    (
      lambda: sweeps.crossed(sweeps.seeds(1), sweeps.seeds(2)),
      "'seed' stands in two parts",
    ),
  ],
)
def test_bad_axes_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_every_row_runs_once_and_again_only_where_it_must(tmp_path):
  planned = sweeps.plan(base(), four(), str(tmp_path))
  # Killed twice, preempted often, failing always: one retry.
  for each, statuses in zip(
    planned, ([], [-9], [75, 75, 75, 1], [1] * 9), strict=True
  ):
    os.makedirs(each.directory)
    pathlib.Path(each.directory, 'statuses.json').write_text(
      json.dumps(statuses)
    )
  failed, said = run(planned, tmp_path)
  assert failed == planned[3:]
  assert tries(planned) == [1, 2, 5, 2]
  assert sum('FAILED loss=plain seed=1' in line for line in said) == 1
  assert sum('again' in line for line in said) == 6
  assert any('status -9, see ' in line for line in said)
  # The same again repeats nothing that has finished.
  failed, said = run(planned, tmp_path)
  assert failed == planned[3:]
  assert tries(planned) == [1, 2, 5, 4]
  assert 'found  3 rows finished' in said[0]


def test_a_directory_has_what_its_row_is(tmp_path):
  planned = sweeps.plan(base(), four(), str(tmp_path))
  run(planned, tmp_path)
  record = json.loads(
    pathlib.Path(planned[2].directory, 'row.json').read_text()
  )
  assert record['name'] == 'loss=plain seed=0'
  assert record['overrides'] == {'loss': {'name': 'reinforce'}, 'seed': 0}
  assert record['config']['loss'] == {'name': 'reinforce'}
  assert [e['name'] for e in sweeps.recorded(str(tmp_path))] == [
    each.row.name for each in planned
  ]


def test_rows_may_be_added_and_those_of_another_sweep_are_refused(tmp_path):
  both = four()
  run(sweeps.plan(base(), both[:3], str(tmp_path)), tmp_path)
  planned = sweeps.plan(base(), both, str(tmp_path))
  run(planned, tmp_path)
  assert tries(planned) == [1] * 4
  other = sweeps.plan(base(), [LONE], str(tmp_path))
  with pytest.raises(ValueError, match='holds 4 rows that this sweep has not'):
    run(other, tmp_path)


def test_one_process_runs_a_sweep_at_a_time(tmp_path):
  planned = sweeps.plan(base(), four(), str(tmp_path))
  with (
    sweeps.claim(planned, str(tmp_path)),
    pytest.raises(ValueError, match='another process runs the sweep'),
    sweeps.claim(planned, str(tmp_path)),
  ):
    pass


def test_workdirs_of_others_are_refused(tmp_path):
  planned = sweeps.plan(base(), [LONE], str(tmp_path))
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ValueError, match='the workdir of a single run'):
    run(planned, tmp_path)
  (tmp_path / 'config.json').rename(tmp_path / 'sweep.json')
  (tmp_path / 'sweep.json').write_text('[{"a": 1}]')
  with pytest.raises(ValueError, match='was not written by a sweep'):
    run(planned, tmp_path)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot be written'):
    sweeps.claim(planned, str(tmp_path / 'file')).__enter__()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_workers': 0}, 'workers=0'),
    ({'num_workers': 10_000}, 'workers=10000: give 1 to '),
    ({'num_retries': -1}, 'retries=-1'),
  ],
)
def test_bad_numbers_of_processes(tmp_path, options, message):
  planned = sweeps.plan(base(), [LONE], str(tmp_path))
  with pytest.raises(ValueError, match=message):
    run(planned, tmp_path, **options)
  assert tries(planned) == [0]


def test_a_row_is_a_run_of_the_trainer(tmp_path):
  (planned,) = sweeps.plan(base(), [{'seed': 5}], str(tmp_path / 'sweep'))
  with sweeps.claim([planned], str(tmp_path / 'sweep')):
    worker.run_row(planned.directory)
  own = pathlib.Path(planned.directory)
  Trainer(planned.config, str(tmp_path / 'own')).run()
  name = workdir.FILES[0]
  assert (own / name).read_bytes() == (tmp_path / 'own' / name).read_bytes()
  environment = json.loads((own / 'environment.json').read_text())
  assert environment['versions']['jax']
  assert environment['commit'] == workdir.commit()
  assert json.loads((own / 'config.json').read_text())['overrides'] == {
    'seed': 5
  }
  before = (own / name).stat().st_mtime_ns
  worker.run_row(str(own))
  assert (own / name).stat().st_mtime_ns == before
  with pytest.raises(ValueError, match='there is no such file'):
    worker.run_row(str(tmp_path))


def test_labels_and_blocks():
  assert rows.as_row({'loss': dict(name='a', b=1)}, '').labels == {
    'loss': "{'name': 'a', 'b': 1}"
  }
  assert rows.as_row({'x': 0.30000000001}, '').name == 'x=0.3'
  assert Row({}, {}).name == 'base'


# The command.

SWEEP = """
import tiny
from postrain import sweeps

def get_config():
  return tiny.sort()

def get_sweep():
  return sweeps.seeds(3)
"""


@pytest.fixture(scope='module')
def command() -> ModuleType:
  spec = importlib.util.spec_from_file_location(
    'sweep', ROOT / 'experiments' / 'sweep.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def call(command: ModuleType, monkeypatch: Any, *flags: object) -> Any:
  """The status or message that the command ends with."""
  monkeypatch.setattr(sys, 'argv', ['sweep.py', *map(str, flags)])
  with pytest.raises(SystemExit) as stopped:
    command.main()
  return stopped.value.code


def test_dry_run_says_what_would_run_and_writes_nothing(
  command, monkeypatch, tmp_path, capsys
):
  path = tmp_path / 'sweep.py'
  path.write_text(SWEEP)
  flags = path, '--workdir', tmp_path / 'out', '--dry-run'
  assert call(command, monkeypatch, *flags) == 0
  said = capsys.readouterr().out.splitlines()
  assert [line.split('  ')[1:] for line in said] == [
    ['to run', f'seed={seed}'] for seed in range(3)
  ]
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('file', 'flags', 'message'),
  [
    (None, [], 'there is no such file'),
    ('x = 1', [], 'has no function get_config()'),
    ('def get_config(): ...', [], 'has no function get_sweep()'),
    (SWEEP, ['--workers=0'], 'workers=0'),
    (SWEEP, ['--backend=slurm'], 'SLURM=None: write SLURM = dict(...)'),
    (SWEEP, ['--backend=xpk'], 'XPK=None: write XPK = dict(...)'),
    (
      SWEEP + 'SLURM = {}',
      ['--backend=slurm'],
      'SLURM needs a value for: time',
    ),
    (
      SWEEP + 'SLURM = dict(time="1", qeue="a")',
      ['--backend=slurm'],
      "SLURM has no hyperparameter 'qeue'",
    ),
  ],
)
def test_bad_environments_are_named(
  command, monkeypatch, tmp_path, file, flags, message
):
  path = tmp_path / 'sweep.py'
  if file is not None:
    path.write_text(file)
  found = call(
    command, monkeypatch, path, '--workdir', tmp_path / 'out', *flags
  )
  assert found.startswith('error: ')
  assert message in found
  assert not (tmp_path / 'out').exists()


def test_an_unknown_backend_is_named(command, monkeypatch, capsys):
  flags = 'a.py', '--workdir=b', '--backend=cloud'
  assert call(command, monkeypatch, *flags) == 2
  assert "invalid choice: 'cloud'" in capsys.readouterr().err


def started(tmp_path: pathlib.Path) -> dict[str, str]:
  """An environment in which processes start soon."""
  others = os.environ.get('PYTHONPATH', '')
  found = {
    **os.environ,
    'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}:{others}',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'xla'),
  }
  found.pop('JAX_NUM_CPU_DEVICES', None)
  return found


@pytest.mark.slow
def test_a_process_that_is_asked_to_stop_says_so_and_goes_on(tmp_path):
  changes = {'seed': 5, 'rl.num_iterations': 600, 'checkpoint.every': 100}
  (planned,) = sweeps.plan(base(), [changes], str(tmp_path))
  directory = pathlib.Path(planned.directory)
  program = [sys.executable, '-m', 'postrain.sweeps.worker', str(directory)]
  with sweeps.claim([planned], str(tmp_path)):
    first = subprocess.Popen(program, env=started(tmp_path))
    while not list(directory.glob('checkpoints/*')):
      assert first.poll() is None
      time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == worker.PREEMPTED
    assert not planned.finished
    subprocess.run(program, env=started(tmp_path), check=True)
    assert planned.finished


@pytest.mark.slow
def test_the_tasks_of_a_step_of_slurm_run_a_row_together(tmp_path):
  """With the variables of srun, which JAX makes its port of."""
  (planned,) = sweeps.plan(base(), [{'mesh.data': 4}], str(tmp_path))
  with socket.create_server(('localhost', 0)) as server:
    job = server.getsockname()[1] % 2**12
  step = {
    'SLURM_JOB_ID': str(job), 'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '1',
    'JAX_NUM_CPU_DEVICES': '2', 'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
  }  # fmt: skip
  program = [sys.executable, '-m', 'postrain.sweeps.worker', '--distributed']
  with sweeps.claim([planned], str(tmp_path)):
    tasks = [
      subprocess.Popen(
        [*program, planned.directory],
        env={
          **started(tmp_path), **step,
          'SLURM_PROCID': str(task), 'SLURM_LOCALID': str(task),
        },
      )
      for task in range(2)
    ]  # fmt: skip
    try:
      assert [task.wait(timeout=300) for task in tasks] == [0, 0]
    finally:
      for task in tasks:
        task.kill()
  assert planned.finished


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path):
  path, out = tmp_path / 'sweep.py', tmp_path / 'out'
  path.write_text(SWEEP)
  environment = started(tmp_path)
  program = [
    sys.executable, ROOT / 'experiments' / 'sweep.py', path,
    f'--workdir={out}',
  ]  # fmt: skip
  first = subprocess.Popen(program, env=environment)
  while not list(out.glob('rows/*/finished.json')):
    assert first.poll() is None
    time.sleep(0.02)
  first.send_signal(signal.SIGKILL)
  first.wait()
  finished = list(out.glob('rows/*/finished.json'))
  assert len(finished) < 3
  before = {
    path: path.stat().st_mtime_ns
    for directory in finished
    for path in directory.parent.rglob('*')
  }
  done = subprocess.run(
    program, env=environment, capture_output=True, text=True, check=True
  )
  assert '3 of 3 rows finished' in done.stdout
  assert before == {path: path.stat().st_mtime_ns for path in before}
