"""From parameters to a rewarded rollout: where a step waits for the host."""

from typing import Any

import jax
import numpy as np

from postrain import sharding, workdir
from postrain.checks import check_completions, check_rewards
from postrain.environments import Environment
from postrain.keys import run_key
from postrain.programs import Programs
from postrain.recipe import Recipe
from postrain.reporting import Report
from postrain.rollouts import (
  Part,
  blank,
  cut,
  fetched,
  joined,
  numbered,
  parted,
  picked,
  select_groups,
  taken,
  weighted_sum,
)
from postrain.sampling import ended
from postrain.types import Carried, Params, Prompts, Samples


class Collector:
  """Samples and rewards what an iteration trains on.

  ``carried`` is what it remembers between iterations: completions that were
  begun for later ones. It belongs into checkpoints.
  """

  def __init__(
    self, recipe: Recipe, environment: Environment, mesh: Any,
    programs: Programs,
  ):  # fmt: skip
    self.recipe, self.environment = recipe, environment
    self.mesh, self.programs = mesh, programs
    self.carried: Carried | None = None

  def rollout(
    self, params: dict[str, Params], iteration: int, report: Report
  ) -> tuple[Part, list[Any]]:
    """Sample and reward; with dynamic sampling, until enough groups differ."""
    recipe, num_prompts = self.recipe, self.recipe.rl.num_prompts
    parts, flags = [], []
    carries = recipe.sampling.carry_over is not None
    sampled = self._finished if carries else self._attempt
    for attempt in range(recipe.rollouts):
      number = iteration * recipe.rollouts + attempt
      parts.append(sampled(params, number, report))
      workdir.die_at('in_rollout', recipe.num_offline_steps + iteration)
      total = weighted_sum(parts[-1][2], self.environment.weights)
      flags.append(self.programs.informative(total.reshape(num_prompts, -1)))
      if not recipe.filter.informative_only:
        return parts[0], flags
      # The one thing beside tokens that the host waits for.
      informative = np.concatenate(sharding.on_host(flags))
      if informative.sum() >= num_prompts:
        break
    pad_id = self.environment.pad_id
    return select_groups(parts, informative, num_prompts, pad_id), flags

  def _attempt(
    self, params: dict[str, Params], number: int, report: Report
  ) -> Part:
    """One rollout: a part is rewarded while the next ones are sampled."""
    rl = self.recipe.rl
    if self.carried is None:
      under_way = self._begun(params, number, version=number)
      report.flush()
    else:
      prompts = self.environment.prompts(number, rl.num_prompts)
      under_way = [(prompts, self.carried.samples)]
    parts = []
    for part, samples in under_way:
      with report.timer.span('sample'):
        part, samples = fetched(part), sharding.on_host(samples)
      with report.timer.span('reward'):
        rewards = self.environment.rewards(part, samples)
      check_rewards(rewards, len(samples.tokens))
      parts.append((part, samples, rewards))
    whole = joined(parts)
    check_completions(whole[1], self.environment, first=number == 0)
    self.carried = None
    if rl.staleness and number + 1 < rl.num_iterations:
      ((_, samples),) = self._begun(params, number + 1, version=number)
      self.carried = Carried(samples)
    return whole

  def _begun(
    self, params: dict[str, Params], number: int, version: int
  ) -> list[tuple[Prompts, Samples]]:
    """The parts of a rollout, dispatched."""
    recipe = self.recipe
    prompts = self.environment.prompts(number, recipe.rl.num_prompts)
    key = run_key(recipe.seed, 'sample', number)
    under_way = []
    for part, ids in cut(prompts, recipe.sampling.num_parts):
      placed = sharding.put_rows(self.mesh, (part.tokens, part.mask))
      samples = self.programs.sample(params, *placed, key, ids)
      send(samples)
      if recipe.rl.staleness:
        stamp = np.full(samples.tokens.shape, version, np.int32)
        samples = samples._replace(version=stamp)
      under_way.append((part, samples))
    return under_way

  def _finished(
    self, params: dict[str, Params], iteration: int, report: Report
  ) -> Part:
    """Groups that have ended; the rows of others have no token yet.

    They are carried over, with new prompts in the places of those that train.
    Where no group has ended, all get as many tokens again.
    """
    rl, timer = self.recipe.rl, report.timer
    ahead = rl.staleness and self.carried is not None
    carried = self.carried or self._nothing()
    prompts = self._numbered(carried.numbers)
    if not ahead:
      carried = self._extended(params, prompts, carried, iteration)
      report.flush()
    with timer.span('sample'):
      carried = sharding.on_host(carried)
      while not (done := self._ended(carried.samples)).any():
        carried = self._extended(params, prompts, carried, iteration)
        carried = sharding.on_host(carried)
    train, rest = parted(carried.samples, done, self.environment.pad_id)
    with timer.span('reward'):
      rewards = self._rewards(prompts, train, done)
    rows: Any = train.mask.any(-1)
    check_completions(taken(train, rows), self.environment, iteration == 0)
    self.carried = None
    if iteration + 1 < rl.num_iterations:
      numbers = carried.numbers.copy()
      numbers[done] = numbers.max() + 1 + np.arange(done.sum())
      self.carried = Carried(rest, numbers)
      if rl.staleness:
        self.carried = self._extended(
          params, self._numbered(numbers), self.carried, iteration
        )
    return prompts, train, rewards

  def _extended(
    self, params: dict[str, Params], prompts: Prompts, carried: Carried,
    version: int,
  ) -> Carried:  # fmt: skip
    """Completions with the tokens of an iteration more, dispatched."""
    tokens, mask, samples = sharding.put_rows(
      self.mesh, (prompts.tokens, prompts.mask, carried.samples)
    )
    key = run_key(self.recipe.seed, 'sample')
    samples = self.programs.extend(
      params, tokens, mask, key, carried.numbers, samples, np.int32(version)
    )
    send(samples)
    return carried._replace(samples=samples)

  def _nothing(self) -> Carried:
    """The first prompts, with rows that have no token."""
    shapes: Any = self.programs.states.carried
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.samples)
    numbers = np.arange(self.recipe.rl.num_prompts, dtype=np.int32)
    return Carried(blank(zeros, self.environment.pad_id), numbers)

  def _numbered(self, numbers: np.ndarray) -> Prompts:
    """Prompts by their numbers, ``num_prompts`` of them an iteration."""
    environment, size = self.environment, self.recipe.rl.num_prompts
    drawn = {
      int(block): fetched(environment.prompts(int(block), size))
      for block in np.unique(numbers // size)
    }
    return numbered(
      drawn, numbers, environment.prompt_length, environment.pad_id
    )

  def _ended(self, samples: Samples) -> np.ndarray:
    """Which groups have only completions that go no further."""
    rows: Any = ended(samples, self.environment.stop_ids)
    return rows.reshape(self.recipe.rl.num_prompts, -1).all(-1)

  def _rewards(
    self, prompts: Prompts, samples: Samples, done: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Rewards of groups that have ended, 0 for the others."""
    rows = np.repeat(done, self.recipe.sampling.num_samples)
    if self.environment.device_task is not None:  # of one shape: one program
      rewards = self.environment.rewards(prompts, samples)
      check_rewards(rewards, len(rows))
      return {k: np.where(rows, v, 0) for k, v in rewards.items()}
    some = picked(prompts, np.flatnonzero(done)), taken(samples, rows)
    rewards = self.environment.rewards(*some)
    check_rewards(rewards, int(rows.sum()))
    spread = np.cumsum(rows) - 1  # where a row finds its own
    return {k: np.where(rows, v[spread], 0) for k, v in rewards.items()}

  def signals(
    self, params: dict[str, Params], prompts: Prompts,
    rewards: dict[str, np.ndarray], timer: Any,
  ) -> dict[str, np.ndarray]:  # fmt: skip
    """What an advantage may ask for beside the sum of the rewards."""
    parts = np.stack([*rewards.values()], axis=-1).astype(np.float32)
    shape = (len(prompts.tokens), -1, len(rewards))
    signals = {'reward_parts': parts.reshape(shape)}
    if self.programs.greedy is not None:
      with timer.span('sample'):
        samples = self.programs.greedy(
          params,
          *sharding.put_rows(self.mesh, (prompts.tokens, prompts.mask)),
          run_key(self.recipe.seed, 'sample'),  # unused: nothing is drawn
          np.arange(len(prompts.tokens), dtype=np.int32),
        )
        samples = sharding.on_host(samples)
      graded = self.environment.rewards(prompts, samples)
      check_rewards(graded, len(prompts.tokens))
      signals['baselines'] = weighted_sum(graded, self.environment.weights)
    return signals


def send(arrays: Any) -> None:
  """Start copies to the host, to be waited for later."""
  for leaf in jax.tree.leaves(arrays):
    leaf.copy_to_host_async()
