"""The whole loop inside one jit, for tasks whose reward is jittable.

Sample, reward, advantage and update are scanned over iterations, and seeds and
numeric hyperparameters are vmapped over: an ablation of 32 seeds is one call.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from postrain import actors, environments, sharding
from postrain.adapted import trainable
from postrain.algorithm import Algorithm, make_algorithm
from postrain.batches import minibatch_rows
from postrain.binding import bind
from postrain.checks import check_assembly
from postrain.compilation import make_jit
from postrain.environments import Environment
from postrain.environments.synthetic import grade
from postrain.keys import minibatch_key, prompt_keys, run_key
from postrain.learned_rewards import is_reward_model
from postrain.recipe import Recipe, make_recipe, plain
from postrain.train_step import merge, value
from postrain.types import (
  Batch,
  Metrics,
  Params,
  Task,
  TrainState,
)

DRAWN = ('sort_policy', 'transformer')  # actors that begin as `Model.init` says


def run(
  config: Any,
  *,
  seeds: Int[Array, ' N'],
  hyperparameters: Mapping[str, Array] | None = None,
) -> tuple[dict[str, Params], dict[str, Float[Array, 'N I']]]:
  """Run a config for each seed at once, inside one jit.

  The same functions as in `postrain.trainer.Trainer`, with two things left
  out: supervised steps and dynamic sampling, which need the host. Parameters
  are drawn by each seed, or those that the model of the config begins with.

  Args:
    config: as of a run; its environment must be a task.
    seeds: one run each.
    hyperparameters: path in the config (``'loss.clip_low'``) -> one number for
      each run.

  Returns:
    The trained parameters, and the figures of each run and iteration, both
    with the runs as leading axis.

  Raises:
    ValueError: the config needs the host, or an array does not match ``seeds``.
  """
  return make(config)(seeds, hyperparameters)


def make(config: Any) -> Callable[..., Any]:
  """Make ``runs(seeds, hyperparameters)`` of `run`, compiled once a shape."""
  config = plain(config)

  def one(seed: Array, values: dict[str, Array], given: Params | None) -> Any:
    return _loop(_override(config, values), seed, given)

  compiled = make_jit()(jax.vmap(one))

  def runs(
    seeds: Array, hyperparameters: Mapping[str, Array] | None = None
  ) -> Any:
    values = dict(hyperparameters or {})
    actor = _checked(config, seeds, values)
    return compiled(seeds, values, _given(config, actor, seeds))

  return runs


def _given(config: dict[str, Any], actor: Any, seeds: Array) -> Params | None:
  """The parameters that the runs begin with, where the loop draws none."""
  if config['model']['name'] in DRAWN:
    return None
  places = sharding.param_shardings(sharding.make_mesh(), actor.model)
  begun = [actor.init(run_key(seed, 'init'), places) for seed in seeds]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *begun)


def _checked(
  config: dict[str, Any], seeds: Array, hyperparameters: dict[str, Array]
) -> Any:
  """The actor of a config that the loop can run."""
  recipe = make_recipe(config)
  if any(map(is_reward_model, recipe.rewards.values())):
    raise ValueError(
      'rewards: the device loop has those of its task alone, and no reward'
      ' model; use the trainer'
    )
  environment = bind(environments, recipe.environment)(
    recipe.seed, recipe.rewards
  )
  if environment.device_task is None:
    raise ValueError(
      f'environment {recipe.environment["name"]!r} rewards on the host: the'
      " device loop needs environment.name='task'"
    )
  _check_choices(recipe)
  for path, values in hyperparameters.items():
    if values.shape != seeds.shape:
      raise ValueError(
        f'hyperparameters[{path!r}] has shape {values.shape},'
        f' seeds {seeds.shape}: give one number for each run'
      )
  actor = bind(actors, recipe.model)(environment)
  check_assembly(recipe, environment, actor.model)
  return actor


def _check_choices(recipe: Recipe) -> None:
  """Refuse what one program cannot do."""
  if wide := {k: n for k, n in vars(recipe.mesh).items() if n != 1}:
    raise ValueError(
      f'mesh with {wide}: the device loop runs on one device; set them to 1, or'
      ' use the trainer'
    )
  if recipe.num_offline_steps or recipe.filter.informative_only:
    raise ValueError(
      'the device loop has neither supervised steps nor dynamic sampling nor'
      ' preferences: set sft.num_steps=0, preference.num_steps=0 and'
      ' filter.informative_only=False, or use the trainer'
    )
  if recipe.sampling.num_slots is not None:
    raise ValueError(
      f'sampling.num_slots={recipe.sampling.num_slots}: the runs of the device'
      ' loop go in step, and no slot could be refilled before those of the'
      ' others; set it to None, or use the trainer'
    )
  if recipe.sampling.carry_over is not None or recipe.rl.staleness:
    raise ValueError(
      f'sampling.carry_over={recipe.sampling.carry_over} and'
      f' rl.staleness={recipe.rl.staleness}: the device loop trains on rollouts'
      ' of its own iteration; set them to None and 0, or use the trainer'
    )
  if recipe.rl.row_length is not None:
    raise ValueError(
      f'rl.row_length={recipe.rl.row_length}: rows are packed on the host,'
      ' which the device loop does not ask; set it to None, or use the trainer'
    )
  if recipe.reference.memory == 'host':
    raise ValueError(
      "reference.memory='host': the device loop is one program, which holds its"
      " state on the device; set it to 'device', or use the trainer"
    )
  if recipe.kl.controller is not None:
    raise ValueError(
      f'kl.controller={recipe.kl.controller}: the device loop has a fixed'
      ' coefficient; set it to None, or use the trainer'
    )
  if recipe.ptx.coef is not None:
    raise ValueError(
      f'ptx.coef={recipe.ptx.coef}: the device loop reads no demonstrations;'
      ' set it to None, or use the trainer'
    )
  if recipe.critic.network is not None:
    raise ValueError(
      f'critic.network={recipe.critic.network["name"]!r}: the device loop'
      ' trains the actor alone; set it to None, or use the trainer'
    )


def _override(config: dict[str, Any], values: dict[str, Array]) -> dict:
  """Put values at their paths; a path that does not exist is an error."""
  for path, number in values.items():
    *blocks, field = path.split('.')
    config = dict(config)
    inner = config
    for block in blocks:
      if not isinstance(inner.get(block), dict):
        raise ValueError(f'hyperparameter {path!r}: config has no {block!r}')
      inner[block] = inner = dict(inner[block])
    if field not in inner:
      raise ValueError(
        f'hyperparameter {path!r}: config has no such field; there are:'
        f' {", ".join(inner)}'
      )
    inner[field] = number
  return config


def _loop(config: dict[str, Any], seed: Array, given: Params | None) -> Any:
  recipe = make_recipe(config)
  environment: Environment = bind(environments, recipe.environment)(
    recipe.seed, recipe.rewards
  )
  task: Any = environment.device_task  # there is one, says _check
  actor = bind(actors, recipe.model)(environment)
  algorithm = make_algorithm(
    recipe, actor.model, pad_id=task.pad_id, stop_ids=task.stop_ids
  )
  if given is None:
    given = actor.model.init(run_key(seed, 'init'))
  params = {'actor': given}
  trained = trainable(params)
  reference = trained['actor'] if algorithm.uses_reference else None
  state = TrainState(
    jnp.int32(0), params, algorithm.rl_optimizer.init(trained), reference,
    stopped=None if recipe.rl.kl_stop is None else jnp.bool_(False),
  )  # fmt: skip

  def iterate(state: TrainState, iteration: Array) -> Any:
    return _iterate(
      recipe, algorithm, environment, task, seed, state, iteration
    )

  iterations = jnp.arange(recipe.rl.num_iterations)
  state, figures = jax.lax.scan(iterate, state, iterations)
  return state.params, figures


def _iterate(
  recipe: Recipe, algorithm: Algorithm, environment: Environment, task: Task,
  seed: Array, state: TrainState, iteration: Array,
) -> tuple[TrainState, dict[str, Array]]:  # fmt: skip
  ids = jnp.arange(recipe.rl.num_prompts)
  keys = prompt_keys(run_key(seed, 'prompts', iteration), ids)
  prompts, prompt_mask = jax.vmap(task.prompt)(keys)
  key = run_key(seed, 'sample', iteration)
  samples = algorithm.sample(state.params, prompts, prompt_mask, key, ids)
  rewards = grade(task, recipe.rewards, prompts, samples.tokens, samples.mask)
  weights = environment.weights
  weighted = [w * rewards[label] for label, w in weights.items()]
  total = jnp.sum(jnp.stack(weighted), axis=0)
  parts = jnp.stack([*rewards.values()], axis=-1)
  signals = {'reward_parts': parts.reshape(len(ids), -1, len(rewards))}
  if algorithm.greedy is not None:
    best = algorithm.greedy(state.params, prompts, prompt_mask, key, ids)
    graded = grade(task, recipe.rewards, prompts, best.tokens, best.mask)
    baselines = jnp.stack([w * graded[k] for k, w in weights.items()])
    signals['baselines'] = baselines.sum(0)
  batch, figures, _ = algorithm.prepare(
    state.params, state.ref_params, prompts, prompt_mask, samples,
    total.reshape(len(ids), -1), signals,
  )  # fmt: skip
  state, updates = _optimise(recipe, algorithm, seed, state, batch, iteration)
  figures = {k: value(v) for k, v in {**figures, **updates}.items()}
  means = {f'reward/{k}': v.mean() for k, v in rewards.items()}
  return state, {'reward': total.mean(), **means, **figures}


def _optimise(
  recipe: Recipe, algorithm: Algorithm, seed: Array, state: TrainState,
  batch: Batch, iteration: Array,
) -> tuple[TrainState, Metrics]:  # fmt: skip
  choices = recipe.rl

  def step(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
    key = run_key(seed, 'selection', state.step)
    return algorithm.update(state, batch, rows, key)

  def epoch(state: TrainState, number: Array) -> tuple[TrainState, Metrics]:
    key = minibatch_key(seed, iteration, number)
    rows = minibatch_rows(
      key, len(batch.mask), choices.num_minibatches, unit_size=batch.unit_size
    )
    state, figures = jax.lax.scan(step, state, rows)
    return state, merge(figures)

  state, figures = jax.lax.scan(epoch, state, jnp.arange(choices.num_epochs))
  if state.ref_params is not None:
    reference = algorithm.move_reference(
      state.ref_params, state.params['actor'], iteration
    )
    state = dataclasses.replace(state, ref_params=reference)
  return state, merge(figures)
