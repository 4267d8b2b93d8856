"""Our side: the trainer as it is, its sampler, and steps on pairs.

Run by `benchmarks/peers/run.py`; see `benchmarks.peers.protocol`.
"""

import dataclasses
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import protocol
from benchmarks.shapes import DPO_BETA, EOS, run_config
from postrain import environments, losses, objectives, sharding
from postrain.batches import weigh_units
from postrain.binding import bind
from postrain.environments import Environment
from postrain.keys import run_key
from postrain.scoring import score
from postrain.train_step import finish, make_train_step
from postrain.trainer import Trainer
from postrain.types import Batch, SharedPrompts, TrainState


def even(completions: list, examples: list) -> list[float]:
  """The reward of every side."""
  return [protocol.even_share(each.text) for each in completions]


def paced(
  seed: int,
  rewards: Any,
  *,
  train: str,
  tokenizer: str,
  prompt_length: int,
  completion_length: int,
) -> Environment:
  """Texts whose steps begin when the driver says so.

  Where a step asks for its rows the one before it is reported: the trainer
  itself stays as it is. No token ends a completion.
  """
  given = dict(
    name='text', train=train, held_out=train,
    tokenizer=dict(directory=tokenizer), prompt='prompt',
    completion='completion', max_prompt_length=prompt_length,
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

  return dataclasses.replace(
    made, stop_ids=(), prompts=pace(made.prompts), rewards=judge,
    demonstrations=pace(made.demonstrations),
  )  # fmt: skip


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
  if given.job != 'sft':
    return {'phases': found}
  losses = [row['loss'] for row in _lines(given.workdir, 'metrics')]
  return {'phases': found, 'losses': losses}


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


def sequence_logprobs(trainer: Trainer, folder: str) -> list[float]:
  prompts, completions = protocol.checked(folder)
  tokens = jnp.asarray(np.concatenate([prompts, completions], axis=1))
  valid = jnp.ones_like(tokens, bool)
  mask = valid.at[:, : len(prompts[0])].set(False)
  fn = jax.jit(lambda p: score(trainer.actor.model, p, tokens, valid, mask))
  return fn(initial(trainer)).logprobs.sum(-1).tolist()


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


def pairs(folder: str) -> Batch:
  """Rows of chosen and rejected, one behind the other."""
  found = protocol.rows(folder, 'pairs')
  tokens = np.array([
    [*protocol.ids(row['prompt']), *protocol.ids(row[side]), EOS]
    for row in found
    for side in ('chosen', 'rejected')
  ])  # fmt: skip
  mask = np.ones(tokens.shape, bool)
  length = len(protocol.ids(found[0]['prompt']))
  mask[:, :length] = False
  arrays = jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.asarray(mask)
  shared = SharedPrompts(length, num_samples=2)
  return Batch(*arrays, weights={}, arrays={}, packing=shared, unit_size=2)


def dpo(trainer: Trainer, given: Any) -> None:
  """Score the reference and update on pairs, jitted and donated.

  The trainer has no stage of preferences, so its parts are put together here.
  """
  model, optimizer = trainer.actor.model, trainer.algorithm.rl_optimizer
  loss = bind(losses, dict(name='dpo', beta=DPO_BETA))
  train_step = make_train_step(
    objectives.preference(model, loss=loss),
    optimizer,
    num_micro_batches=given.micro_batches,
  )

  def prepare(params: Any, batch: Batch) -> Batch:
    scores = score(
      model, params, batch.tokens, batch.valid, batch.mask,
      num_slices=given.micro_batches, packing=batch.packing,
    )  # fmt: skip
    arrays = {'ref_logprobs': scores.logprobs}
    return weigh_units(dataclasses.replace(batch, arrays=arrays))

  prepare = jax.jit(prepare)
  update = jax.jit(lambda s, b: train_step(s, {}, b), donate_argnums=0)
  reference, batch = initial(trainer), pairs(given.folder)
  params = {'actor': jax.tree.map(jnp.copy, reference)}
  state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))
  found = []
  while True:
    times = [time.perf_counter()]
    prepared = jax.block_until_ready(prepare(reference, batch))
    times.append(time.perf_counter())
    if not found:
      likely = prepared.arrays['ref_logprobs'].sum(-1).reshape(-1, 2)
    state, metrics = update(state, prepared)
    found.append(finish(jax.device_get(metrics))['loss'])
    times.append(time.perf_counter())
    protocol.session().answer(
      losses=found,
      pair_logprobs=likely.mean(0).tolist(),
      phases={'score': times[1] - times[0], 'update': times[2] - times[1]},
    )


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
    session.answer(versions=found, logprobs=logprobs)
    if given.job in ('generate', 'dpo'):
      {'generate': generate, 'dpo': dpo}[given.job](trainer, given)
  trainer.run()


if __name__ == '__main__':
  main()
