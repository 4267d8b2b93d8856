"""Programs compiled for devices that are not here, and what passes in them."""

import importlib.util
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest
import tiny

from configs import scaling
from postrain import sharding, topologies
from postrain.traffic import traffic

quick_compiler = tiny.quick_compiler


def compiled(fn, *specs, shape=(8, 8)):
  mesh = sharding.make_mesh(fsdp=8)
  with sharding.on(mesh):
    places = [jax.NamedSharding(mesh, spec) for spec in specs]
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=places[0])
    return jax.jit(fn, out_shardings=places[1]).lower(x).compile().as_text()


CUT, WHOLE = PartitionSpec('fsdp'), PartitionSpec()


def test_bytes_of_a_gather_and_of_a_sum():
  """256 bytes: each of 8 sends 7/8 of them, twice that for a sum."""
  assert traffic(compiled(lambda x: x, CUT, WHOLE)) == {
    'all-gather': (1, 1, 7 / 8 * 256)
  }
  found = traffic(compiled(lambda x: x.sum(0), CUT, WHOLE))
  assert found == {'all-reduce': (1, 1, 2 * 7 / 8 * 32)}
  assert traffic(compiled(lambda x: x + 1, CUT, CUT)) == {}


def test_a_loop_counts_its_turns():
  def turns(x):
    def body(carry, _):
      total = jax.lax.with_sharding_constraint(carry.sum(0), WHOLE)
      return carry + jnp.broadcast_to(total, carry.shape), None

    return jax.lax.scan(body, x, length=5)[0]

  count, runs, sent = traffic(compiled(turns, CUT, CUT))['all-reduce']
  assert (count, runs, sent) == (1, 5, 5 * 2 * 7 / 8 * 32)


TPU = """
HloModule jit_f
%cond.1 (p.1: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4)
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.1, %constant.1), direction=LT
}
%all-reduce-scatter.1 (input.1: f32[8,16]) -> f32[2,16] {
  %all-reduce.1 = f32[8,16]{1,0} all-reduce(%input.1), channel_id=3, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
}
%wait.1 (p.2: bf16[2,8]) -> bf16[8,8] {
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%p.2), channel_id=4, \
replica_groups=[2,4]<=[8], dimensions={0}
}
%body.1 (p.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[2,16] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = bf16[8,8] fusion(%y), kind=kCustom, calls=%wait.1
  %fusion.3 = bf16[8,8] fusion(%y), kind=kCustom, calls=%wait.1
}
ENTRY %main.1 (p.4: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1
  %p.5 = f32[4]{0} collective-permute-start(%z), source_target_pairs={{0,1}}
}
"""


def test_the_text_of_a_tpu():
  """Scattered sums in fusions, named groups, bounds in conditions."""
  assert traffic(TPU) == {
    'all-gather': (1, 8, 8 * 3 / 4 * 128),
    'reduce-scatter': (1, 4, 4 * 3 / 4 * 512),
    'collective-permute': (1, 1, 16.0),
  }


def miniature(**mesh):
  config = scaling.get_config('miniature')
  config.model.update(num_layers=1, remat=None, dtype='float32')
  config.rl.update(num_prompts=8, num_micro_batches=1, num_score_slices=1)
  config.mesh.update(mesh)
  return config


def test_a_missing_constraint_is_caught(monkeypatch, capsys):
  """Without those on activations, devices hold what others work on."""
  config = miniature(fsdp=8)
  found = topologies.report(config, jax.devices(), ['update'])
  (held,) = found['programs'].values()
  assert held['fits']
  assert 'all-gather' in held['traffic']
  assert found['mesh']['fsdp'] == 8
  assert re.match(r'update\[256\]: [\d.]+ MB a device', capsys.readouterr().out)

  monkeypatch.setitem(topologies.MEMORY, 'cpu', 1.2 * held['total'] / 2**30)
  monkeypatch.setattr(sharding, 'constrained', lambda x, axes: x)
  monkeypatch.setattr(
    sharding, 'over_rows', lambda fn, whole, rows, **_: fn(whole, *rows)
  )
  found = topologies.report(config, jax.devices(), ['update'])
  (planted,) = found['programs'].values()
  assert not planted['fits']
  assert planted['remedies'][0] == 'a larger rl.num_micro_batches'
  assert 'does not fit: try a larger rl.num_micro' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('cpu:x', 'cpu:N has N devices'),
    ('cpu:0', 'cpu:N has N devices'),
    ('v5p:2x2x1', 'needs the compiler of TPUs'),
  ],
)
def test_topologies_that_are_none(topology, message, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=message):
    topologies.devices_of(topology)


def test_programs_that_the_config_has_not():
  with pytest.raises(ValueError, match='programs: prefer; this config'):
    topologies.report(miniature(), jax.devices(), ['prefer'])


@pytest.mark.parametrize('table', ['table', 'weak_table'])
def test_the_tables_of_the_page_are_those_of_the_files(table, capsys):
  runpy.run_path(str(tiny.ROOT / 'experiments/scaling/run.py'))[table]()
  page = (tiny.ROOT / 'docs/scaling.md').read_text(encoding='utf-8')
  remedy = 'run: python experiments/scaling/run.py --part=table, and weak'
  assert capsys.readouterr().out in page, remedy


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='no compiler for TPUs'
)
@pytest.mark.parametrize(
  ('topology', 'changes'),
  [
    ('v5e:2x2', ['model.attention=splash']),
    # More than XLA scatters in one step.
    ('v6e:8x8', ['rl.num_micro_batches=4', 'rl.num_score_slices=4']),
  ],
)
def test_for_a_tpu(topology, changes):
  """In a process of its own: the compiler's library stays loaded."""
  found = subprocess.run(
    [
      sys.executable, 'experiments/compile_for.py', f'--topology={topology}',
      '--programs=update', '--config=configs/scaling.py:miniature',
      *(f'--config.{change}' for change in changes),
    ],
    cwd=tiny.ROOT, check=True, capture_output=True, text=True,
  )  # fmt: skip
  assert 'reduce-scatter' in found.stdout
