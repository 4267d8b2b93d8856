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
  cut,
  fetched,
  joined,
  select_groups,
  weighted_sum,
)
from postrain.types import Params, Prompts


class Collector:
  """Samples and rewards what an iteration trains on."""

  def __init__(
    self, recipe: Recipe, environment: Environment, mesh: Any,
    programs: Programs,
  ):  # fmt: skip
    self.recipe, self.environment = recipe, environment
    self.mesh, self.programs = mesh, programs

  def rollout(
    self, params: dict[str, Params], iteration: int, report: Report
  ) -> tuple[Part, list[Any]]:
    """Sample and reward; with dynamic sampling, until enough groups differ."""
    recipe, num_prompts = self.recipe, self.recipe.rl.num_prompts
    parts, flags = [], []
    for attempt in range(recipe.rollouts):
      number = iteration * recipe.rollouts + attempt
      parts.append(self._attempt(params, iteration, number, report))
      total = weighted_sum(parts[-1][2], self.environment.weights)
      flags.append(self.programs.informative(total.reshape(num_prompts, -1)))
      if not recipe.filter.informative_only:
        return parts[0], flags
      # The one thing beside tokens that the host waits for.
      informative = np.concatenate(jax.device_get(flags))
      if informative.sum() >= num_prompts:
        break
    pad_id = self.environment.pad_id
    return select_groups(parts, informative, num_prompts, pad_id), flags

  def _attempt(
    self, params: dict[str, Params], iteration: int, number: int, report: Report
  ) -> Part:
    """One rollout: a part is rewarded while the next ones are sampled."""
    recipe, timer = self.recipe, report.timer
    prompts = self.environment.prompts(number, recipe.rl.num_prompts)
    key = run_key(recipe.seed, 'sample', number)
    under_way = []
    for part, ids in cut(prompts, recipe.sampling.num_parts):
      placed = sharding.put_rows(self.mesh, (part.tokens, part.mask))
      samples = self.programs.sample(params, *placed, key, ids)
      send(samples)
      under_way.append((part, samples))
    report.flush()
    parts = []
    for part, samples in under_way:
      with timer.span('sample'):
        part, samples = fetched(part), jax.device_get(samples)
      with timer.span('reward'):
        rewards = self.environment.rewards(part, samples)
      check_rewards(rewards, len(samples.tokens))
      parts.append((part, samples, rewards))
    workdir.die_at('in_rollout', recipe.sft.num_steps + iteration)
    whole = joined(parts)
    check_completions(whole[1], self.environment, first=number == 0)
    return whole

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
        samples = jax.device_get(samples)
      graded = self.environment.rewards(prompts, samples)
      check_rewards(graded, len(prompts.tokens))
      signals['baselines'] = weighted_sum(graded, self.environment.weights)
    return signals


def send(arrays: Any) -> None:
  """Start copies to the host, to be waited for later."""
  for leaf in jax.tree.leaves(arrays):
    leaf.copy_to_host_async()
