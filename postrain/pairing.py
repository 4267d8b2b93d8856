"""The pairs of a step: given ones, or completions of the policy compared."""

from typing import Any

import jax
import numpy as np

from postrain import sharding, workdir
from postrain.checks import check_completions, check_rewards
from postrain.collection import send
from postrain.environments import Environment, Units
from postrain.keys import run_key
from postrain.preferring import comparisons
from postrain.programs import Programs
from postrain.recipe import Recipe
from postrain.reporting import Report
from postrain.rollouts import numbered, weighted_sum
from postrain.types import Prompts, Samples, TrainState


class Pairing:
  """Gives the units of each step on preferences.

  Where the policy writes, a step has new prompts and draws as many completions
  of each as ``preference.source`` compares. Their place is that of the longest
  prompt, so that all steps have one shape.
  """

  def __init__(
    self, recipe: Recipe, environment: Environment, mesh: Any,
    programs: Programs,
  ):  # fmt: skip
    self._recipe, self._environment = recipe, environment
    self._mesh, self._programs = mesh, programs

  def units(self, state: TrainState, step: int, report: Report) -> Units:
    """What step number ``step`` of the stage learns from."""
    choices = self._recipe.preference
    known = comparisons(self._recipe, self._environment)
    if known.units is not None:
      return known.units(step, choices.batch_size, choices.num_examples)
    if choices.source == 'self_play':
      better = demonstrations(self._recipe, self._environment, step)
      worse = self._written(state, better[0], step, report)
      return beside(*better, worse)
    prompts = self._prompts(step)
    samples = self._written(state, prompts, step, report)
    with report.timer.span('reward'):
      if known.compare is not None:
        return known.compare(step, prompts, samples)
      return rewarded(self._environment, prompts, samples)

  def _written(
    self, state: TrainState, prompts: Prompts, step: int, report: Report
  ) -> Samples:
    numbers = np.arange(len(prompts.tokens), dtype=np.int32)
    placed = sharding.put_rows(self._mesh, (prompts.tokens, prompts.mask))
    key = run_key(self._recipe.seed, 'pairs', step)
    samples = self._programs.write(
      state.params, state.ref_params, *placed, key, numbers
    )
    send(samples)
    report.flush()
    with report.timer.span('sample'):
      samples = jax.device_get(samples)
    workdir.die_at('in_rollout', self._recipe.sft.num_steps + step)
    check_completions(samples, self._environment, first=step == 0)
    return samples

  def _prompts(self, step: int) -> Prompts:
    environment, size = self._environment, self._recipe.preference.batch_size
    drawn = jax.device_get(environment.prompts(step, size))
    return numbered(
      {0: drawn}, np.arange(size), environment.prompt_length, environment.pad_id
    )


def rewarded(
  environment: Environment, prompts: Prompts, samples: Samples
) -> Units:
  """Two completions of each prompt, the one with more reward first.

  Of those with equal sums of rewards no token is left.
  """
  rewards = environment.rewards(prompts, samples)
  check_rewards(rewards, len(samples.tokens))
  total = weighted_sum(rewards, environment.weights).reshape(-1, 2)
  best = total.argmax(1)[:, None]
  rows = np.concatenate([best, 1 - best], axis=1)
  rows = (rows + 2 * np.arange(len(rows))[:, None]).reshape(-1)
  seen = np.repeat(total[:, :1] != total[:, 1:], 2, axis=0)
  return _behind(prompts, samples.tokens[rows], samples.mask[rows], seen)


def demonstrations(
  recipe: Recipe, environment: Environment, step: int
) -> tuple[Prompts, np.ndarray, np.ndarray]:
  """Those of a step: prompts as a sampler takes them, completions, mask.

  Raises:
    ValueError: one has several turns, or is longer than samples may be.
  """
  choices, width = recipe.preference, recipe.sampling.max_new_tokens
  draw: Any = environment.demonstrations  # some, says check_preference
  drawn = draw(step, choices.batch_size, choices.num_examples)
  tokens, valid, mask = map(np.asarray, drawn)
  starts, slots = mask.argmax(1)[:, None], environment.prompt_length
  behind = np.arange(tokens.shape[1]) >= starts
  longest = int(mask.sum(1).max())
  if longest > width or starts.max() > slots or (valid & behind != mask).any():
    raise ValueError(
      f"preference.source='self_play' with sampling.max_new_tokens={width} and"
      f' prompts of {slots} tokens: demonstrations of step {step} have'
      f' {longest} behind {starts.max()}, or several turns; raise the limits or'
      ' remove them'
    )
  places = starts + np.arange(-slots, width)
  inside = (places >= 0) & (places < tokens.shape[1])
  places = places.clip(0, tokens.shape[1] - 1)
  valid = np.take_along_axis(valid, places, 1) & inside
  tokens = np.take_along_axis(tokens, places, 1)
  tokens = np.where(valid, tokens, environment.pad_id).astype(np.int32)
  prompts = Prompts(tokens[:, :slots], valid[:, :slots], [{}] * len(tokens))
  return prompts, tokens[:, slots:], valid[:, slots:]


def beside(
  prompts: Prompts, tokens: np.ndarray, mask: np.ndarray, samples: Samples
) -> Units:
  """Pairs of a demonstration and what was sampled in its place."""

  def alternating(*both: Any) -> np.ndarray:
    return np.stack(both, axis=1).reshape(-1, mask.shape[1])

  return _behind(
    prompts,
    alternating(tokens, samples.tokens),
    alternating(mask, samples.mask),
  )


def _behind(
  prompts: Prompts, tokens: Any, mask: Any, seen: Any = True
) -> Units:
  """Pairs of completions behind their prompts; none where not ``seen``."""

  def rows(prompts: Any, completions: Any) -> Any:
    return np.concatenate([np.repeat(prompts, 2, axis=0), completions], axis=1)

  mask = rows(np.zeros_like(prompts.mask), mask)
  valid = rows(prompts.mask, mask[:, prompts.mask.shape[1] :])
  return Units(rows(prompts.tokens, tokens), valid & seen, mask & seen, {})
