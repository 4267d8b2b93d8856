"""One of two processes, started by test_hosts.py: what they tell each other.

python tests/hosts_program.py PORT PROCESS_ID DIRECTORY
"""

import contextlib
import pathlib
import sys
from types import SimpleNamespace

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from postrain import hosts, sharding
from postrain.checkpoints import Checkpoints
from postrain.environments.record import Comparisons, Units
from postrain.reference_table import ReferenceTable
from postrain.types import Prompts, Samples, TrainState

STEP = 5


def state() -> dict:
  """Arrays of a few types, the same anywhere."""
  floats = jnp.sin(jnp.arange(16 * 8, dtype=jnp.float32)).reshape(16, 8)
  return {
    'cut': floats,
    'half': floats.astype(jnp.bfloat16),
    'same': jnp.arange(5),
  }


def placed(mesh: object) -> dict:
  """The shardings of `state`, the first two in rows."""
  rows, same = sharding.rows(mesh), sharding.replicated(mesh)
  return {'cut': rows, 'half': rows, 'same': same}


def talk(index: int) -> None:
  """Values and errors of one process reach all."""
  assert jax.process_count() == 2
  assert hosts.exchanged({'from': index}) == [{'from': 0}, {'from': 1}]
  said = None
  try:
    with hosts.agreed():
      if index == 1:
        raise ValueError('no such file')
  except ValueError as error:
    said = str(error)
  assert said == ('no such file' if index else 'process 1: no such file')


def reward(prompts: Prompts, samples: Samples) -> dict[str, np.ndarray]:
  """What was seen here: each process has half of the prompts."""
  assert len(prompts.tokens) == 2
  assert len(samples.tokens) == 4
  return {
    'sum': samples.tokens.sum(-1),
    'process': np.full(4, jax.process_index()),
  }


def check_table(mesh: object, directory: str, index: int) -> None:
  """Scores of all units are known to all, and written by the first alone."""
  tokens = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
  there = np.ones((8, 3), bool)
  known = Comparisons(
    unit_size=2, length=3, dtypes={}, units=None, lengths=lambda *_: {3},
    held_out=None, all_units=lambda _: Units(tokens, there, there, {}),
  )  # fmt: skip
  choices = SimpleNamespace(
    source='dataset', data='pairs', num_examples=4, batch_size=4,
    num_micro_batches=1,
  )  # fmt: skip
  parts = (
    SimpleNamespace(preference=choices),
    SimpleNamespace(preferences=lambda _: known),
    SimpleNamespace(
      states=SimpleNamespace(mesh=mesh), judging=None,
      refer=jax.jit(lambda params, tokens, *_: params['cut'][0, 0] + tokens),
    ),
  )  # fmt: skip
  params = jax.jit(state, out_shardings=placed(mesh))()
  blank = jax.device_put(np.zeros(8, np.uint32), sharding.replicated(mesh))
  begun = TrainState(0, {'actor': params}, {}, ref_digest=blank)
  own = pathlib.Path(directory, f'{index}.npz')
  begun = ReferenceTable(*parts, str(own)).ready(begun, begins=True)
  assert own.exists() == (index == 0)
  hosts.meet()
  table = ReferenceTable(*parts, str(own.with_name('0.npz')))
  table.ready(begun, begins=False)
  np.testing.assert_array_equal(table._tables[0], tokens)


def main() -> None:
  port, index, directory = sys.argv[1:]
  with hosts.joined(
    coordinator=f'localhost:{port}', num_processes=2, process_id=int(index)
  ):
    talk(int(index))
    mesh = sharding.make_mesh(data=4, fsdp=2)
    values = np.arange(8 * 3).reshape(8, 3)
    there = sharding.put_rows(mesh, values)
    assert not there.is_fully_addressable
    np.testing.assert_array_equal(sharding.on_host(there), values)
    prompts = Prompts(values[:4], values[:4], [{}] * 4)
    samples = Samples(*[values] * 4, values[:, 0])
    rewards = hosts.shared(reward)(prompts, samples)
    assert rewards['sum'].tolist() == values.sum(-1).tolist()
    assert rewards['process'].tolist() == [0] * 4 + [1] * 4

    make = jax.jit(state, out_shardings=placed(mesh))
    with contextlib.closing(Checkpoints(directory, keep=1)) as checkpoints:
      checkpoints.save(STEP, make())
    check_table(mesh, directory, int(index))
    with contextlib.suppress(ValueError):
      sharding.make_mesh(data=4)
      raise RuntimeError('a mesh of half the devices was made')
  print('done')


if __name__ == '__main__':
  main()
