"""A reference in the memory of the host: the same bits, none on the device."""

import dataclasses
import pathlib
import re

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from postrain import device_loop, sharding
from postrain.trainer import Trainer

quick_compiler = tiny.quick_compiler


def config(memory: str, update: str) -> ConfigDict:
  """Two iterations whose loss and reward read the reference."""
  made = tiny.sort()
  made.rl.num_iterations, made.checkpoint.every = 2, 1
  made.kl.loss_coef = made.kl.reward_coef = 0.1
  made.reference.memory, made.reference.update = memory, update
  made.mesh.data = 2
  return made


@pytest.mark.parametrize('update', ['frozen', 'ema'])
def test_it_changes_no_bit(update: str, tmp_path: pathlib.Path) -> None:
  """Through a kill as well: it is restored to where it lay."""
  ends = []
  for memory in ('device', 'host'):
    directory = tmp_path / memory
    Trainer(config(memory, update), str(directory)).run()
    (directory / 'finished.json').unlink()
    (directory / 'checkpoints' / '2').rename(tmp_path / f'{memory} end')
    again = Trainer(config(memory, update), str(directory)).run()
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(again.ref_params)}
    assert kinds == {'device' if memory == 'device' else 'pinned_host'}
    metrics = (directory / 'metrics.jsonl').read_text()
    ends.append((jax.device_get(again), metrics))
  (one, one_metrics), (other, other_metrics) = ends
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert one_metrics == other_metrics


def test_only_scores_read_it(tmp_path: pathlib.Path) -> None:
  """And what does not, has none of it on the device meanwhile."""
  trainer = Trainer(config('host', 'frozen'), str(tmp_path))
  with sharding.on(trainer.mesh):
    programs = {
      p.name.partition('[')[0]: p for p in trainer._rehearsal.needed(0)
    }
  texts = {name: p.traced.lower().as_text() for name, p in programs.items()}
  placed = r'%arg\d+: [^,]*\{[^}]*memory_kind = "pinned_host"'
  found = {name for name, text in texts.items() if re.search(placed, text)}
  assert found == {'prepare'}
  assert 'move_reference' not in programs
  state = trainer._states.abstract(1)
  without = dataclasses.replace(state, ref_params=None)
  assert sharding.device_bytes(state) == sharding.device_bytes(without)


def test_the_device_loop_has_no_host() -> None:
  on_one = config('host', 'frozen')
  on_one.mesh.data = 1
  with pytest.raises(ValueError, match="memory='host': the device loop is one"):
    device_loop.run(on_one, seeds=jax.numpy.arange(1))
