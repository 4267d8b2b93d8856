"""The one stateful object: runs a recipe in a directory, or goes on with it."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import os
from typing import Any

import numpy as np

from postrain import critics, hosts, metrics, sharding, workdir
from postrain.adapted import trainable
from postrain.assembly import assemble
from postrain.checkpoints import Checkpoints
from postrain.collection import Collector, send
from postrain.compilation import by_role, compiling
from postrain.pairing import Pairing
from postrain.recipe import plain
from postrain.reference_table import make_table
from postrain.reporting import (
  CURVES,
  Report,
  group_figures,
  rollout_figures,
  sample_rows,
)
from postrain.rollouts import weighted_sum
from postrain.train_step import finish
from postrain.types import Metrics, Params, TrainState

Tell = Callable[[], tuple]  # what `Report.write` takes beside the step


class Trainer:
  """Assemble a config and run it.

  A run is a fold over steps: supervised ones, those on preferences, then
  rollout iterations. Each is a pure function of (config, step, state), so a run
  killed anywhere and started again ends with the same bits.

  Args:
    config: a ConfigDict or dict; see `postrain.recipe.Recipe`.
    directory: the workdir, made if absent; a run of the same config in it is
      continued.
    overrides: of the command line, for the record.

  Raises:
    ValueError: anything that can be known to be wrong before compilation.
  """

  @hosts.agreed()
  def __init__(
    self,
    config: Any,
    directory: str,
    overrides: Mapping[str, Any] | None = None,
  ):
    self.directory = directory
    self.config = plain(config)
    parts = assemble(config)
    self.recipe, self.mesh = parts.recipe, parts.mesh
    self.environment, self.actor = parts.environment, parts.actor
    self.algorithm, self._states = parts.algorithm, parts.states
    self._evaluator, self._rehearsal = parts.evaluator, parts.rehearsal
    self._programs = programs = parts.programs
    self._pairing = Pairing(self.recipe, self.environment, self.mesh, programs)
    self._table = make_table(parts, self.path('reference.npz'))
    self._prepare, self._update = programs.prepare, programs.update
    if hosts.first():
      workdir.claim(directory, self.config, overrides)

  def path(self, *names: str) -> str:
    """A path in the workdir."""
    return os.path.join(self.directory, *names)

  def run(self) -> TrainState:
    """Run to the end, or from where an earlier process was stopped.

    Raises:
      ValueError: what only a first step can tell (a reward that fails, a limit
        that truncates every completion); it leaves no directory behind.
      hosts.Stopped: it was asked to stop (SIGTERM), and is to be continued.
    """
    checkpoints = Checkpoints(
      self.path('checkpoints'), keep=self.recipe.checkpoint.keep
    )
    try:
      with contextlib.closing(checkpoints), sharding.on(self.mesh):
        return self._continue(checkpoints)
    except ValueError:
      if hosts.first():
        workdir.release(self.directory)
      raise

  def _continue(self, checkpoints: Checkpoints) -> TrainState:
    recipe, start = self.recipe, checkpoints.latest() or 0
    self._collector = Collector(
      recipe, self.environment, self.mesh, self._programs
    )
    if os.path.exists(self.path('finished.json')):
      print(f'{self.directory}: this run is finished ({start} steps)')
      return self._restore(checkpoints, start)
    if start:
      print(f'{self.directory}: continuing at step {start}')
    print(by_role(self._rehearsal.roles()), flush=True)
    programs = self._rehearsal.needed(start)
    with compiling(programs, limit=recipe.machine.memory_limit):
      state = self._restore(checkpoints, start)
      checkpoints.compile(self._states.all_stored(start))
    hosts.meet()
    with (
      self.environment.grading(),
      self._report(start) as report,
      hosts.stopping() as stops,
    ):
      for step in range(start, recipe.num_steps):
        state = self._step(state, step, report)
        done = step + 1
        stop = stops() and done < recipe.num_steps
        due = done % recipe.checkpoint.every == 0 or done == recipe.num_steps
        if due or stop:
          report.flush()
          workdir.die_at('before_checkpoint', done)
          carried = sharding.on_host(self._collector.carried)
          stored = dataclasses.replace(state, carried=carried)
          checkpoints.save(done, stored, wait=False)
          workdir.die_at('after_checkpoint', done)
        if stop:
          checkpoints.wait()
          print(f'{self.directory}: stopped at step {done}; start it again')
          raise hosts.Stopped()
      checkpoints.wait()
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

  def _restore(self, checkpoints: Checkpoints, step: int) -> TrainState:
    """The state after so many steps."""
    if not step:
      return self._states.fresh()
    state = checkpoints.restore(step, self._states.stored(step))
    self._collector.carried = sharding.on_host(state.carried)
    return dataclasses.replace(state, carried=None)

  # Steps. What one says is fetched and written when the next one is under way.

  def _step(self, state: TrainState, step: int, report: Report) -> TrainState:
    recipe, figures = self.recipe, {}
    supervised, offline = recipe.sft.num_steps, recipe.num_offline_steps
    if step and step in (supervised, offline):
      state = self._states.begin_next(state.params, step)
    if self._table is not None and supervised <= step < offline:
      state = self._table.ready(state, begins=step == supervised)
    every = recipe.evaluation.every
    if every and (step % every == 0 or step in (supervised, offline)):
      report.flush()
      figures = self._evaluate(state, step, report)
    if step < supervised:
      state, tell = self._supervise(state, step, report)
    elif step < offline:
      state, tell = self._prefer(state, step - supervised, report)
    else:
      state, tell = self._reinforce(state, step - offline, report)

    def all_of_it() -> tuple:
      more, *rest = tell()
      return figures | more, *rest

    report.defer(step, all_of_it)
    return state

  def _supervise(
    self, state: TrainState, step: int, report: Report
  ) -> tuple[TrainState, Tell]:
    choices = self.recipe.sft
    draw: Any = self.environment.demonstrations  # some, says check_assembly
    arrays = draw(step, choices.batch_size, choices.num_examples)
    return self._offline(*self._programs.imitate(state, *arrays), report)

  def _prefer(
    self, state: TrainState, step: int, report: Report
  ) -> tuple[TrainState, Tell]:
    every = self.recipe.preference.reference_every
    if every is not None and step and step % every == 0:
      reference = self._programs.refresh(trainable(state.params))
      state = dataclasses.replace(state, ref_params=reference)
    if self._table is not None:
      units = self._table.units(step)
    else:
      units = self._pairing.units(state, step, report)
    return self._offline(*self._programs.prefer(state, units), report)

  def _offline(
    self, state: TrainState, figures: Metrics, report: Report
  ) -> tuple[TrainState, Tell]:
    """What a step without a rollout has to tell."""
    timer = report.timer
    send(figures)
    report.flush()
    started = timer.add('update')

    def tell() -> tuple[dict[str, float]]:
      told = finish(figures)
      timer.add('update', started)
      return (told,)

    return state, tell

  def _reinforce(
    self, state: TrainState, iteration: int, report: Report
  ) -> tuple[TrainState, Tell]:
    timer = report.timer
    rollout, informative = self._collector.rollout(
      state.params, iteration, report
    )
    prompts, samples, rewards = rollout
    total = weighted_sum(rewards, self.environment.weights)
    signals = self._collector.signals(state.params, prompts, rewards, timer)
    started = timer.add('score')
    batch, figures, columns = self._prepare(
      state.params,
      state.ref_params,
      prompts.tokens,
      prompts.mask,
      samples,
      total.reshape(len(prompts.tokens), -1),
      signals,
      state.kl_coef,
    )
    state, updates = self._optimise(state, batch, iteration)
    if self._programs.control is not None:
      measured = figures['reference/kl_sequence']
      coef = self._programs.control(state.kl_coef, measured)
      state = dataclasses.replace(state, kl_coef=coef)
    send((informative, figures, columns, updates))

    def tell() -> tuple[dict[str, float], int, list[dict[str, Any]]]:
      scored = sharding.on_host((informative, figures, columns))
      updated = timer.add('score', started)
      merged = sharding.on_host(updates)
      timer.add('update', updated)
      rows = sample_rows(
        prompts, samples, rewards, total, scored[2], self.environment.text
      )
      told = {
        **group_figures(
          samples, np.concatenate(scored[0]), len(prompts.tokens), iteration
        ),
        **rollout_figures(samples, rewards, total, self.recipe.evaluation),
        **finish(scored[1]),
        **finish(merged),
      }
      return told, int(samples.mask.sum()), rows

    return state, tell

  def _optimise(
    self, state: TrainState, batch: Any, iteration: int
  ) -> tuple[TrainState, Metrics]:
    number, updates = np.int32(iteration), []
    choices = self.recipe.rl
    done = iteration * choices.num_epochs * choices.num_minibatches
    for epoch in range(choices.num_epochs):
      cuts = self._programs.minibatches(number, np.int32(epoch), state.step)
      for rows, key in zip(*cuts, strict=True):
        state, figures = self._update(
          state, batch, rows, key, done + len(updates)
        )
        updates.append(figures)
    if state.ref_params is not None:
      reference = self._programs.move_reference(
        state.ref_params, state.params['actor'], number
      )
      state = dataclasses.replace(state, ref_params=reference)
    return state, self._programs.merge(updates)

  # Evaluation and the end.

  def _evaluate(
    self, state: TrainState, step: int, report: Report
  ) -> dict[str, float]:
    recipe, judging = self.recipe, self._programs.judging
    first, offline = recipe.sft.num_steps, recipe.num_offline_steps
    figures = {}
    with report.timer.span('evaluate'):
      if recipe.preference.learns == 'policy':
        figures |= self._evaluator(state.params)
      ends = step == offline == recipe.num_steps
      if judging is not None and (first <= step < offline or ends):
        figures |= judging(state)
    return figures

  def _finish(self, state: TrainState, report: Report) -> None:
    """Evaluate, export, draw; then say that the run is finished."""
    step = self.recipe.num_steps
    if self._table is not None and step == self.recipe.num_offline_steps:
      state = self._table.ready(state, begins=False)
    if self.recipe.evaluation.every:
      report.write(step, self._evaluate(state, step, report))
    workdir.die_at('before_export', step)
    if self.recipe.checkpoint.export:
      self._export(state.params)
    workdir.die_at('after_export', step)
    if hosts.first():
      rows = self.path(workdir.FILES[0])
      metrics.curves(rows, self.path('curves.png'), CURVES)
      workdir.write_json(self.path('finished.json'), {'steps': step})
    hosts.meet()

  def _export(self, params: dict[str, Params]) -> None:
    """Write what trained, by the first host."""
    params, critic = sharding.on_one_host(params), self.algorithm.critic
    if not hosts.first():
      return
    if self.actor.export is not None:
      self.actor.export(self.path('export'), params['actor'])
    if critic is not None:
      directory = self.path('export_critic')
      critics.export(critic, self.actor, self.environment, directory, params)
