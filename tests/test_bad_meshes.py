"""Bad meshes, topologies, sweeps and processes: each is one clear error.

A message names the value and says what would do; nothing is compiled.
"""

from collections.abc import Callable
import importlib.util
import pathlib
import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from test_bad_input import changed
import tiny

from postrain import hosts, sharding, topologies
from postrain.assembly import assemble

DENSE = {'name': 'transformer', **tiny.transformer()}
MOE = {**DENSE, 'family': 'mixtral', 'num_experts': 4, 'experts_per_token': 2}
SLURM = {
  'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[01-02]',
  'SLURM_NTASKS': '2', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '0',
}  # fmt: skip


def mesh(**sizes: int) -> Callable:
  return lambda: sharding.make_mesh(**sizes)


def config(base: str = 'arithmetic', **changes: Any) -> Callable:
  """Assemble a config; names of fields with __ for dots."""
  paths = {path.replace('__', '.'): value for path, value in changes.items()}
  return lambda: assemble(changed(base, paths, pathlib.Path()))


def devices(*processes: int) -> list:
  """Stand-ins for the devices of these processes."""
  return [SimpleNamespace(process_index=p, slice_index=p) for p in processes]


def joined(**arguments: Any) -> Callable:
  def join() -> None:
    with hosts.joined(**arguments):
      pass

  return join


def slurm(given: dict[str, Any] | None = None, **changes: str | None) -> Any:
  """Join from a step of Slurm whose variables are changed, or None: absent."""
  return joined(environment=True, **given or {}), {**SLURM, **changes}


MESHES = [
  (mesh(data=16), 'data=16 .* needs 16 devices, there are 8: change config.m'),
  (mesh(data=-1, fsdp=-1), 'data=-1 x fsdp=-1 .* and one may be -1'),
  (mesh(data=-1, tensor=3), '8 devices do not divide by 3.*: change them'),
  (mesh(tensor=0), 'tensor=0: sizes are 1 or more, and one may be -1'),
  (mesh(context=-2), 'context=-2 .*sizes are 1 or more, and one may be -1'),
  (mesh(slices=2, data=8), 'slices=2 with mesh.data=8: there are 1 slices'),
  (
    lambda: sharding.make_mesh(slices=2, data=3, devices=devices(0, 0, 1)),
    'slices=2 with mesh.data=3: .* data must be a multiple of their number',
  ),
  (
    lambda: sharding.make_mesh(data=2, devices=devices(0, 0, 1, 1)),
    '2 of the 4 devices of 2 processes: change config.mesh so that it has all',
  ),
  (config(mesh__slices=0), 'mesh.slices=0: it must be at least 1'),
  (config(mesh__pipeline=2), "mesh has no hyperparameter 'pipeline'.* has: sl"),
  (config(mesh__data='8'), "mesh: data='8' is not of type int"),
  (config(mesh={'data': 8}), 'config.mesh needs a value for: slices, fsdp, ex'),
  (config(mesh__data=3), 'rollout: 4 do not divide over 3 .*: change the mesh'),
  (
    config(mesh__data=4, sft__batch_size=6),
    'sft micro-batch: 6 do not divide over 4 devices .*: change the mesh or',
  ),
  (
    config(mesh__context=2),
    'context=2 does not divide the 3 tokens of sampling.max_new_tokens: take a',
  ),
  (
    config(mesh__context=2, rl__share_prompts=False),
    'context=2 does not divide the 7 tokens of a prompt with sampling.max_new',
  ),
  (
    config('preference', mesh__context=2),
    'context=2 does not divide the 5 tokens of preferences: take a divisor',
  ),
  (config(model__num_heads=3, model__num_kv_heads=3, mesh__tensor=2),
   r'tensor=2 does not divide the 3 heads \(model.num_heads\): .* take a div'),
  (config(model__num_heads=8, model__num_kv_heads=4, mesh__tensor=8,
          model__mlp_dim=20),
   r'tensor=8 does not divide the 20 inner units \(model.mlp_dim\): .* take'),
  (config(model__num_heads=6, model__num_kv_heads=3, mesh__tensor=2),
   r'tensor=2 does not divide the 3 heads of keys .*: each .* take a divisor'),
  (config('text', mesh__tensor=2),
   'tensor=2 does not divide the 261 ids of the vocabulary: .* take a divisor'),
  (config(model__model_dim=18, mesh__fsdp=4),
   r'fsdp=4 does not divide the 18 dimensions \(model.model_dim\): .* take a'),
  (config(model=MOE, mesh__expert=8),
   r'expert=8 does not divide the 4 experts \(model.num_experts\): .* take a'),
  (config(mesh__expert=2), "expert=2, but model 'transformer' has no experts"),
  (lambda: topologies.devices_of('cpu:x'), '=cpu:x: cpu:N has N devices'),
  (lambda: topologies.devices_of('cpu:8', 2), 'slices=2 of --topology=cpu:8: '),
  (lambda: topologies.devices_of('v5e:4x4', 0), 'slices=0 of .*: give 1, or'),
]  # fmt: skip


@pytest.mark.parametrize(
  ('make', 'message'), MESHES, ids=[str(n) for n in range(len(MESHES))]
)
def test_bad_meshes(
  make: Callable, message: str, tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  monkeypatch.chdir(tmp_path)
  compiled = len(tiny.compilations)
  with pytest.raises(ValueError, match=message):
    make()
  assert tiny.compilations[compiled:] == []


PROCESSES = [
  (joined(num_processes=2), {}, 'num_processes=2, .*: give all three, or none'),
  (
    joined(coordinator='a:1', num_processes=2, process_id=2), {},
    'process_id=2 of num_processes=2: number the processes 0 to 1',
  ),
  (
    joined(coordinator='a:1', num_processes=2, process_id=-1), {},
    'process_id=-1 of num_processes=2: number the processes 0 to 1',
  ),
  (
    joined(coordinator='a:99999', num_processes=2, process_id=1), {},
    "coordinator='a:99999': give HOST:PORT of the first process",
  ),
  (
    joined(coordinator='a', num_processes=2, process_id=1), {},
    "coordinator='a': give HOST:PORT of the first process",
  ),
  (
    joined(environment=True, heartbeat_seconds=0), {},
    'heartbeat_seconds=0: it must be at least 1',
  ),
  (
    joined(environment=True), {},
    'did not find each other .*: start all .*or by a scheduler',
  ),
  (
    *slurm(SLURM_STEP_NODELIST=None),
    r"Slurm has set {'SLURM_JOB_ID': '7', .*not \['SLURM_STEP_NODELIST'\]: sta",
  ),
  (*slurm(SLURM_PROCID='5'), 'SLURM_PROCID=5 of SLURM_NTASKS=2: .* with srun'),
  (*slurm(SLURM_NTASKS='two'), "SLURM_NTASKS='two', given was None: start th"),
  (
    *slurm({'num_processes': 4}),
    "SLURM_NTASKS='2', given was 4: start the processes with srun, and with",
  ),
  (*slurm({'process_id': 0}), "SLURM_PROCID='1', given was 0: start the proc"),
]  # fmt: skip


@pytest.mark.parametrize(
  ('join', 'variables', 'message'),
  PROCESSES,
  ids=[str(n) for n in range(len(PROCESSES))],
)
def test_bad_processes(
  join: Callable, variables: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  for name, value in variables.items():
    if value is not None:
      monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=message):
    join()


def test_a_taken_port() -> None:
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
    join = joined(
      coordinator=f'localhost:{port}', num_processes=2, process_id=0
    )
    message = f'port {port} of .* cannot be listened at .*: take another one'
    with pytest.raises(ValueError, match=message):
      join()


SWEEP = """
import tiny
from postrain import sweeps
def get_config(): return tiny.sort()
"""
ROWS = SWEEP + 'def get_sweep(): '
XPK = dict(cluster='a', tpu_type='v5p-8', docker_image='b', workdir='/c')
SWEEPS = [
  ('', [], r'a.py has no function get_config\(\): see docs/ablations.md'),
  (SWEEP, [], r'a.py has no function get_sweep\(\): see docs/ablations.md'),
  ('def get_config(:', [], 'SyntaxError: .* mend it there'),
  (
    'from configs import nothing', [],
    "a.py, line 1: ImportError: cannot import name 'nothing' .*: mend it there",
  ),
  (
    'def get_config(): ...\ndef get_sweep(): return []', [],
    r'config=None: get_config\(\) must return the config that rows change',
  ),
  (ROWS + 'return x', [], "a.py, line 5: NameError: name 'x' is .*: mend it"),
  (ROWS + 'yield x', [], "a.py, line 5: NameError: name 'x' is .*: mend it"),
  (ROWS + 'return []', [], 'a sweep without a row: yield at least one'),
  (ROWS + 'return sweeps.seeds(0)', [], 'seeds: number=0: it must be at least'),
  (
    ROWS + 'return [{"seed": 1}, {"seed": 1}]', [],
    r'row 2 .* has the config of the row \(seed=1\): leave one of them out',
  ),
  (
    ROWS + 'return [{"mesh.date": 8}]', [],
    "'mesh.date': config.mesh has no field 'date' .did you mean 'data'",
  ),
  (
    ROWS + 'return [{"mesh.data": 3}]', [],
    r'row 1 \(mesh.data=3\): .* 4 do not divide over 3 devices .*: change the',
  ),
  (ROWS + 'return sweeps.seeds(2)', ['--workers=0'], 'workers=0: give 1 to'),
  (ROWS + 'return sweeps.seeds(2)', ['--retries=-1'], 'retries=-1: give at le'),
  (
    ROWS + 'return sweeps.seeds(2)', ['--backend=slurm'],
    r'SLURM=None: write SLURM = dict\(...\) into the sweep file; fields: time',
  ),
  (
    ROWS + 'return sweeps.seeds(2)\nSLURM = dict(time="9", nodes=0)',
    ['--backend=slurm', '--dry-run'],
    'SLURM: nodes=0: it must be at least 1',
  ),
  (
    ROWS + f'return sweeps.seeds(2)\nXPK = {XPK | {"num_slices": 0}}',
    ['--backend=xpk', '--dry-run'],
    'XPK: num_slices=0: it must be at least 1',
  ),
  (
    ROWS + f'return sweeps.seeds(2)\nXPK = {XPK | {"workdir": "runs"}}',
    ['--backend=xpk', '--dry-run'],
    "XPK: workdir='runs': give the path from the root, as pods see it",
  ),
]  # fmt: skip


@pytest.mark.parametrize(
  ('file', 'flags', 'message'),
  SWEEPS,
  ids=[str(n) for n in range(len(SWEEPS))],
)
def test_bad_sweeps(
  file: str, flags: list, message: str, tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  (tmp_path / 'a.py').write_text(file)
  arguments = [
    'sweep.py',
    str(tmp_path / 'a.py'),
    f'--workdir={tmp_path / "b"}',
  ]
  monkeypatch.setattr(sys, 'argv', arguments + flags)
  spec: Any = importlib.util.spec_from_file_location(
    'sweep', tiny.ROOT / 'experiments' / 'sweep.py'
  )
  command = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(command)
  with pytest.raises(SystemExit, match=f'error: .*{message}'):
    command.main()
  assert not (tmp_path / 'b').exists()
