"""The one stateful object: runs a recipe in a directory, or goes on with it."""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import actors, environments, metrics, sharding, workdir
from postrain.algorithm import make_algorithm
from postrain.batches import minibatch_rows
from postrain.binding import bind
from postrain.checkpoints import Checkpoints
from postrain.checks import (
  check_assembly,
  check_completions,
  check_rewards,
  rehearse,
)
from postrain.evaluator import make_evaluator
from postrain.keys import minibatch_key, run_key
from postrain.recipe import make_recipe, plain
from postrain.reporting import (
  CURVES,
  Report,
  rollout_figures,
  sample_rows,
)
from postrain.rollouts import informative_rows, select_groups, weighted_sum
from postrain.states import States
from postrain.train_step import finish, merge
from postrain.types import Prompts, Samples, TrainState


class Trainer:
  """Assemble a config and run it.

  A run is a fold over steps: supervised ones, then rollout iterations. Each is
  a pure function of (config, step, state), so a run killed anywhere and started
  again ends with the same bits.

  Args:
    config: a ConfigDict or dict; see `postrain.recipe.Recipe`.
    directory: the workdir, made if absent; a run of the same config in it is
      continued.
    overrides: of the command line, for the record.

  Raises:
    ValueError: anything that can be known to be wrong before compilation.
  """

  def __init__(
    self,
    config: Any,
    directory: str,
    overrides: Mapping[str, Any] | None = None,
  ):
    self.directory = directory
    self.config = plain(config)
    self.recipe = recipe = make_recipe(config)
    self.mesh = sharding.make_mesh(**vars(recipe.mesh))
    self.environment = bind(environments, recipe.environment)(
      recipe.seed, recipe.rewards
    )
    self.actor = bind(actors, recipe.model)(self.environment)
    self.algorithm = make_algorithm(
      recipe,
      self.actor.model,
      pad_id=self.environment.pad_id,
      stop_ids=self.environment.stop_ids,
    )
    check_assembly(recipe, self.environment, self.actor.model)
    rehearse(
      recipe, self.environment, self.actor.model, self.algorithm,
      max_length=self.actor.max_length,
    )  # fmt: skip
    self._states = States(recipe, self.actor, self.algorithm, self.mesh)
    workdir.claim(directory, self.config, overrides)
    self._jit_functions()

  def _jit_functions(self) -> None:
    algorithm = self.algorithm
    self._sample = jax.jit(algorithm.sample)
    self._greedy = algorithm.greedy and jax.jit(algorithm.greedy)
    self._prepare = jax.jit(algorithm.prepare)
    self._update = jax.jit(algorithm.update, donate_argnums=0)
    self._imitate = jax.jit(algorithm.imitate, donate_argnums=0)
    self._move_reference = jax.jit(algorithm.move_reference)
    self._evaluator = make_evaluator(
      self.recipe, self.actor.model, self.environment
    )

  def path(self, *names: str) -> str:
    """A path in the workdir."""
    return os.path.join(self.directory, *names)

  def run(self) -> TrainState:
    """Run to the end, or from where an earlier process was stopped.

    Raises:
      ValueError: what only a first step can tell (a reward that fails, a limit
        that truncates every completion); it leaves no directory behind.
    """
    checkpoints = Checkpoints(
      self.path('checkpoints'), keep=self.recipe.checkpoint.keep
    )
    try:
      with contextlib.closing(checkpoints), sharding.on(self.mesh):
        return self._continue(checkpoints)
    except ValueError:
      workdir.release(self.directory)
      raise

  def _continue(self, checkpoints: Checkpoints) -> TrainState:
    recipe = self.recipe
    state, start = self._restore(checkpoints)
    if os.path.exists(self.path('finished.json')):
      print(f'{self.directory}: this run is finished ({start} steps)')
      return state
    if start:
      print(f'{self.directory}: continuing at step {start}')
    with self._report(start) as report:
      for step in range(start, recipe.num_steps):
        state = self._step(state, step, report)
        done = step + 1
        if done % recipe.checkpoint.every == 0 or done == recipe.num_steps:
          workdir.die_at('before_checkpoint', done)
          checkpoints.save(done, state)
          workdir.die_at('after_checkpoint', done)
      self._finish(state, report)
    return state

  def _report(self, start: int) -> Report:
    return Report(
      self.directory,
      first_step=start,
      num_steps=self.recipe.num_steps,
      logging=self.recipe.logging,
      config=self.config,
    )

  def _restore(self, checkpoints: Checkpoints) -> tuple[TrainState, int]:
    """The newest checkpoint's state, or a fresh one."""
    step = checkpoints.latest()
    if step is None:
      return self._states.fresh(), 0
    return checkpoints.restore(step, self._states.abstract(step)), step

  # Steps.

  def _step(self, state: TrainState, step: int, report: Report) -> TrainState:
    recipe, figures = self.recipe, {}
    if step == recipe.sft.num_steps and step:
      state = self._states.begin_reinforcement(state.params)
    every = recipe.evaluation.every
    if every and (step % every == 0 or step == recipe.sft.num_steps):
      figures = self._evaluate(state, report)
    if step < recipe.sft.num_steps:
      state, more = self._supervise(state, step, report)
      report.write(step, figures | more)
    else:
      iteration = step - recipe.sft.num_steps
      state, more, rows = self._reinforce(state, iteration, report)
      num_tokens = sum(row['length'] for row in rows)
      report.write(step, figures | more, num_tokens, rows)
    return state

  def _supervise(
    self, state: TrainState, step: int, report: Report
  ) -> tuple[TrainState, dict[str, float]]:
    choices = self.recipe.sft
    arrays = self.environment.demonstrations(
      step, choices.batch_size, choices.num_examples
    )
    with report.timer.span('update'):
      arrays = sharding.put_rows(self.mesh, arrays)
      state, figures = self._imitate(state, *arrays)
      return state, finish(jax.device_get(figures))

  def _reinforce(
    self, state: TrainState, iteration: int, report: Report
  ) -> tuple[TrainState, dict[str, float], list[dict[str, Any]]]:
    timer = report.timer
    prompts, samples, rewards, share = self._rollout(state, iteration, timer)
    total = weighted_sum(rewards, self.environment.weights)
    signals = self._signals(state, prompts, rewards)
    with timer.span('score'):
      put = functools.partial(sharding.put_rows, self.mesh)
      batch, figures, columns = self._prepare(
        state.params,
        state.ref_params,
        *put((prompts.tokens, prompts.mask)),
        put(samples),
        put(total.reshape(len(prompts.tokens), -1)),
        put(signals),
      )
      figures, columns = jax.device_get((figures, columns))
    with timer.span('update'):
      state, updates = self._optimise(state, batch, iteration)
    rows = sample_rows(
      prompts, samples, rewards, total, columns, self.environment.text
    )
    figures = {
      'groups/informative': share,
      **rollout_figures(samples, rewards, total),
      **finish(figures),
      **updates,
    }
    return state, figures, rows

  def _rollout(
    self, state: TrainState, iteration: int, timer: Any
  ) -> tuple[Prompts, Samples, dict[str, np.ndarray], float]:
    """Sample and reward; with dynamic sampling, until enough groups differ."""
    recipe, parts = self.recipe, []
    limit = recipe.filter.max_rollouts if recipe.filter.informative_only else 1
    for attempt in range(limit):
      number = iteration * limit + attempt
      prompts = self.environment.prompts(number, recipe.rl.num_prompts)
      with timer.span('sample'):
        samples = self._sample(
          state.params,
          *sharding.put_rows(self.mesh, (prompts.tokens, prompts.mask)),
          run_key(recipe.seed, 'sample', number),
          jnp.arange(recipe.rl.num_prompts),
        )
        samples = jax.device_get(samples)
      workdir.die_at('in_rollout', recipe.sft.num_steps + iteration)
      check_completions(samples, self.environment, first=number == 0)
      with timer.span('reward'):
        rewards = self.environment.rewards(prompts, samples)
      check_rewards(rewards, len(samples.tokens))
      parts.append((prompts, samples, rewards))
      totals = [weighted_sum(r, self.environment.weights) for *_, r in parts]
      informative = informative_rows(totals, recipe.rl.num_prompts)
      if informative.sum() >= recipe.rl.num_prompts:
        break
    chosen = select_groups(
      parts, informative, recipe.rl.num_prompts, self.environment.pad_id
    )
    return *chosen, float(informative.mean())

  def _signals(
    self, state: TrainState, prompts: Prompts, rewards: dict[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """What an advantage may ask for beside the sum of the rewards."""
    parts = np.stack([*rewards.values()], axis=-1).astype(np.float32)
    shape = (len(prompts.tokens), -1, len(rewards))
    signals = {'reward_parts': parts.reshape(shape)}
    if self._greedy is not None:
      samples = self._greedy(
        state.params,
        *sharding.put_rows(self.mesh, (prompts.tokens, prompts.mask)),
        run_key(self.recipe.seed, 'sample'),  # unused: nothing is drawn
        jnp.arange(len(prompts.tokens)),
      )
      graded = self.environment.rewards(prompts, jax.device_get(samples))
      check_rewards(graded, len(prompts.tokens))
      signals['baselines'] = weighted_sum(graded, self.environment.weights)
    return signals

  def _optimise(
    self, state: TrainState, batch: Any, iteration: int
  ) -> tuple[TrainState, dict[str, float]]:
    choices, typed = self.recipe.rl, []
    for epoch in range(choices.num_epochs):
      minibatches = minibatch_rows(
        minibatch_key(self.recipe.seed, iteration, epoch),
        len(batch.mask),
        choices.num_minibatches,
        unit_size=batch.unit_size,
      )
      for rows in minibatches:
        key = run_key(self.recipe.seed, 'selection', state.step)
        state, figures = self._update(state, batch, rows, key)
        typed.append(figures)
    if state.ref_params is not None:
      reference = self._move_reference(
        state.ref_params, state.params['actor'], iteration
      )
      state = dataclasses.replace(state, ref_params=reference)
    stacked = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(typed))
    return state, finish(merge(stacked))

  # Evaluation and the end.

  def _evaluate(self, state: TrainState, report: Report) -> dict[str, float]:
    with report.timer.span('evaluate'):
      return self._evaluator(state.params)

  def _finish(self, state: TrainState, report: Report) -> None:
    """Evaluate, export, draw; then say that the run is finished."""
    step = self.recipe.num_steps
    if self.recipe.evaluation.every:
      report.write(step, self._evaluate(state, report))
    workdir.die_at('before_export', step)
    if self.recipe.checkpoint.export and self.actor.export is not None:
      self.actor.export(self.path('export'), state.params['actor'])
    workdir.die_at('after_export', step)
    metrics.curves(self.path(workdir.FILES[0]), self.path('curves.png'), CURVES)
    workdir.write_json(self.path('finished.json'), {'steps': step})
