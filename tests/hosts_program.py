"""One of two processes, started by test_hosts.py: what they tell each other.

python tests/hosts_program.py PORT PROCESS_ID DIRECTORY
"""

import contextlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from postrain import hosts, sharding
from postrain.checkpoints import Checkpoints
from postrain.types import Prompts, Samples

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
    with contextlib.suppress(ValueError):
      sharding.make_mesh(data=4)
      raise RuntimeError('a mesh of half the devices was made')
  print('done')


if __name__ == '__main__':
  main()
