"""Our side: the trainer as it is, and its sampler.

Run by `benchmarks/peers/run.py`; see `benchmarks.peers.protocol`.
"""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import protocol
from benchmarks.shapes import NUM_BATCHES, run_config
from postrain import environments, sharding
from postrain.binding import bind
from postrain.environments import Comparisons, Environment, Units
from postrain.environments.record import rows_of
from postrain.keys import run_key
from postrain.scoring import score
from postrain.trainer import Trainer
from postrain.values import token_values

CHOSEN = 'preference/chosen_logprob'


def even(completions: list, examples: list) -> list[float]:
  """The reward of every side."""
  return [protocol.even_share(each.text) for each in completions]


def paced(
  seed: int,
  rewards: Any,
  *,
  folder: str,
  prompt_length: int,
  completion_length: int,
) -> Environment:
  """Texts whose steps begin when the driver says so.

  Where a step asks for its rows the one before it is reported: the trainer
  itself stays as it is. No token ends a completion.
  """
  given = dict(
    name='text', train=f'{folder}/demonstrations.jsonl',
    held_out=f'{folder}/demonstrations.jsonl',
    tokenizer=dict(directory=folder), prompt='prompt', completion='completion',
    preferences=dict(
      train=f'{folder}/pairs.jsonl', held_out=f'{folder}/pairs.jsonl',
      ties='error',
    ),
    max_prompt_length=prompt_length,
    max_length=prompt_length + completion_length,
  )  # fmt: skip
  made = bind(environments, given)(seed, rewards)
  tokens = {}

  def pace(draw: Any) -> Any:
    def next_rows(number: int, *sizes: Any) -> Any:
      if number:
        jax.block_until_ready(jax.live_arrays())  # an update is under way
        protocol.session().answer(**_written(), **tokens)
      return draw(number, *sizes)

    return next_rows

  def judge(drawn: Any, samples: Any) -> dict[str, np.ndarray]:
    tokens['tokens'] = int(samples.mask.sum())
    return made.rewards(drawn, samples)

  def preferences(kind: str) -> Comparisons:
    known = made.preferences(kind)
    return dataclasses.replace(
      known, units=pace(functools.partial(in_order, known)),
      lengths=lambda *_: {known.length},
    )  # fmt: skip

  return dataclasses.replace(
    made, stop_ids=(), prompts=pace(made.prompts), rewards=judge,
    demonstrations=pace(made.demonstrations), preferences=preferences,
  )  # fmt: skip


def in_order(known: Comparisons, step: int, size: int, *_: Any) -> Units:
  """Pairs in the order of their file, around and around."""
  start = step % NUM_BATCHES * size
  units = known.held_out(start + size)
  return rows_of(units, np.arange(start, start + size), 2)


def _written() -> dict[str, Any]:
  """Wall seconds of the phases of the last step in the files, and all losses.

  A step is written while the next one samples.
  """
  given = protocol.options()
  phases = [{}, *_lines(given.workdir, 'timings')][-1]
  found = {
    name.removeprefix('seconds/'): value
    for name, value in phases.items()
    if name.startswith('seconds/') and name != 'seconds/total'
  }
  told = {'phases': found}
  if given.job in ('dpo', protocol.TRAJECTORY, 'sft'):
    rows = _lines(given.workdir, 'metrics')
    told['losses'] = [row['loss'] for row in rows]
    if given.job != 'sft':
      told['chosen_logprobs'] = [row[CHOSEN] for row in rows]
  return told


def _lines(folder: str, name: str) -> list[dict[str, Any]]:
  path = os.path.join(folder, f'{name}.jsonl')
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8') as lines:
    return [json.loads(line) for line in lines]


def initial(trainer: Trainer) -> Any:
  """The parameters of the directory, in their shards."""
  shardings = sharding.param_shardings(trainer.mesh, trainer.actor.model)
  return trainer.actor.init(run_key(0, 'init'), shardings)


def checked(folder: str) -> tuple[Any, Any, Any]:
  """Sequences that every side is asked about: tokens, valid, mask."""
  prompts, completions = protocol.checked(folder)
  tokens = jnp.asarray(np.concatenate([prompts, completions], axis=1))
  valid = jnp.ones_like(tokens, bool)
  return tokens, valid, valid.at[:, : len(prompts[0])].set(False)


def sequence_logprobs(trainer: Trainer, folder: str) -> list[float]:
  rows = checked(folder)
  fn = jax.jit(lambda p: score(trainer.actor.model, p, *rows))
  return fn(initial(trainer)).logprobs.sum(-1).tolist()


def values(trainer: Trainer, folder: str) -> dict[str, list[float]]:
  """Of the critic for the same tokens, where there is one."""
  critic: Any = trainer.algorithm.critic
  if critic is None:
    return {}
  tokens, valid, mask = checked(folder)
  params = critic.read(sharding.param_shardings(trainer.mesh, critic.model))
  fn = jax.jit(lambda p: token_values(critic.model, p, tokens, valid, mask))
  return {'values': fn(params)[mask].tolist()}


def generate(trainer: Trainer, given: Any) -> None:
  """Sampling alone, by the function that the trainer compiles."""
  prompts, _ = protocol.checked(given.folder)
  prompts = jnp.asarray(prompts)[: given.shape.num_prompts]
  mask, numbers = jnp.ones_like(prompts, bool), jnp.arange(len(prompts))
  params = {'actor': initial(trainer)}
  sample = jax.jit(trainer.algorithm.sample)
  step = 0
  while True:
    key = run_key(0, 'sample', step)
    samples = jax.device_get(sample(params, prompts, mask, key, numbers))
    protocol.session().answer(tokens=int(samples.mask.sum()))
    step += 1


def gemm() -> None:
  """Multiply matrices of float32: what this machine can do."""
  keys = jax.random.split(jax.random.key(0))
  a, b = (
    jax.random.normal(k, s)
    for k, s in zip(keys, [(512, 512), (512, 2816)], strict=True)
  )
  multiply = jax.jit(jnp.matmul)
  while True:
    for _ in range(50):
      jax.block_until_ready(multiply(a, b))
    protocol.session().answer(flops=50 * 2.0 * 512 * 512 * 2816)


def main() -> None:
  given, session = protocol.options(), protocol.session()
  found = protocol.versions('jax', 'jaxlib', 'flax', 'optax')
  if given.job == 'gemm':
    session.answer(versions=found)
    gemm()
  config = run_config(
    given.shape,
    given.folder,
    job=given.job,
    micro_batches=given.micro_batches,
  )
  trainer = Trainer(config, given.workdir)
  with sharding.on(trainer.mesh):
    logprobs = sequence_logprobs(trainer, given.folder)
    more = values(trainer, given.folder)
    session.answer(versions=found, logprobs=logprobs, **more)
    if given.job == 'generate':
      generate(trainer, given)
  trainer.run()


if __name__ == '__main__':
  main()
