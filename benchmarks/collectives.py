"""Collectives of the compiled sampler, scoring and train step, by kind.

  python benchmarks/collectives.py

GRPO of a decoder of 2 layers on 1, 2, 4 and 8 virtual devices, with rows cut
over them (data), and with the parameters cut too (fsdp). Counts are of the text
of the programs, where the body of a loop stands once, and should be the same at
any number of devices. Over data the model needs all-reduces alone, over fsdp
all-gathers and reduce-scatters beside them; the update also gathers the arrays
of the rollout once, for a minibatch takes its rows from all devices.
"""

import argparse
import collections
import os
import re
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp

from configs import base
from postrain import actors, environments, sharding
from postrain.adapted import trainable
from postrain.algorithm import make_algorithm
from postrain.binding import bind
from postrain.recipe import make_recipe, plain
from postrain.types import TrainState

KINDS = (
  'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip
PROGRAMS = ('sample', 'score', 'update')


def count(program: str) -> collections.Counter[str]:
  """Collectives in the text of a compiled program."""
  return collections.Counter(
    re.findall(rf' ({"|".join(KINDS)})(?:-start)?\(', program)
  )


def recipe() -> Any:
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='arithmetic', num_digits=2)
  )
  config.model = dict(
    name='transformer', num_layers=2, model_dim=64, mlp_dim=128, num_heads=8,
    num_kv_heads=8, head_dim=8, max_length=16,
  )  # fmt: skip
  config.rewards = dict(exact=dict(name='exact', weight=1.0))
  config.kl.loss_coef = 0.01
  config.sampling.max_new_tokens = 4
  config.rl.num_micro_batches = 2
  config.rl.num_prompts = 16
  config.rl.num_iterations = 1
  config.evaluation.grader = 'exact'
  config.chunk_size = 4
  return make_recipe(plain(config))


def programs(**sizes: int) -> dict[str, str]:
  """Name -> text of the compiled program, on a mesh."""
  choices = recipe()
  environment = bind(environments, choices.environment)(0, choices.rewards)
  model = bind(actors, choices.model)(environment).model
  algorithm = make_algorithm(
    choices, model, pad_id=environment.pad_id, stop_ids=environment.stop_ids
  )
  mesh = sharding.make_mesh(**sizes)
  key, ids = jax.random.key(0), jnp.arange(choices.rl.num_prompts)
  drawn = jax.vmap(environment.device_task.prompt)(
    jax.random.split(key, len(ids))
  )
  prompts = sharding.put_rows(mesh, drawn)
  with sharding.on(mesh):
    shardings = {'actor': sharding.param_shardings(mesh, model)}
    init = lambda key: {'actor': model.init(key)}  # noqa: E731
    params = jax.jit(init, out_shardings=shardings)(key)
    optimizer = algorithm.rl_optimizer
    moments = sharding.opt_state_shardings(
      mesh, optimizer, trainable(params), shardings
    )
    opt_state = jax.jit(optimizer.init, out_shardings=moments)(params)
    state = TrainState(
      jax.device_put(jnp.int32(0), sharding.replicated(mesh)), params, opt_state
    )
    sample = jax.jit(algorithm.sample).lower(params, *prompts, key, ids)
    sample = sample.compile()
    samples = sample(params, *prompts, key, ids)
    shape = (choices.rl.num_prompts, choices.sampling.num_samples)
    rewards = sharding.put_rows(mesh, jnp.ones(shape))
    score = jax.jit(algorithm.prepare).lower(
      params, params['actor'], *prompts, samples, rewards, {}
    )
    score = score.compile()
    batch, *_ = score(params, params['actor'], *prompts, samples, rewards, {})
    rows = jnp.arange(len(batch.mask))
    update = jax.jit(algorithm.update, donate_argnums=0)
    update = update.lower(state, batch, rows, key).compile()
  texts = (each.as_text() for each in (sample, score, update))
  return dict(zip(PROGRAMS, texts, strict=True))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--devices', type=int, nargs='*', default=[1, 2, 4, 8], help='up to 8'
  )
  parser.add_argument('--axes', nargs='*', default=['data', 'fsdp'])
  flags = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', 8)
  print('| mesh | program | ' + ' | '.join(KINDS) + ' |')
  print('|' + ' --- |' * (len(KINDS) + 2))
  for axis in flags.axes:
    for number in flags.devices:
      for name, text in programs(**{axis: number}).items():
        found = count(text)
        cells = [f'{axis}={number}', name, *(str(found[k]) for k in KINDS)]
        print('| ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
  main()
