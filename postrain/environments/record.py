"""What a trainer knows of where prompts come from and what rewards them."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from postrain.types import Prompts, Samples, Task


class Units(NamedTuple):
  """Preferences as rows: units of two (the chosen first), of K, or of one.

  Attributes:
    tokens: [B T], prompt and completion.
    valid: [B T], which are real.
    mask: [B T], those of the completion.
    arrays: what is known of each row, by vocabulary name: ``margins`` or
      ``preference`` of pairs, ``ranks`` of rankings, ``desirable`` of single
      completions.
  """

  tokens: Any
  valid: Any
  mask: Any
  arrays: dict[str, Any]


def rows_of(units: Units, numbers: np.ndarray, unit_size: int) -> Units:
  """The units of these numbers."""
  rows = (numbers[:, None] * unit_size + np.arange(unit_size)).reshape(-1)
  return Units(*jax.tree.map(lambda x: x[rows], tuple(units)))


@dataclasses.dataclass(frozen=True)
class Comparisons:
  """Preferences of one kind, as the trainer sees them.

  Attributes:
    unit_size: rows of a unit.
    length: tokens of the longest row. Those of single completions have all this
      length, their prompts in the first ``prompt_length`` slots of the
      environment.
    dtypes: of the arrays of `Units`, by name.
    units: (step, batch_size, num_examples) -> Units; a pure function; None
      where the policy writes.
    lengths: (steps, batch_size, num_examples) -> the lengths of rows that
      ``units`` will have in any of them.
    held_out: (num_pairs) -> Units, pairs, the same at every call.
    numbers: (step, batch_size, num_examples) -> the numbers of what ``units``
      gives among ``all_units``; None with those where the policy writes.
    all_units: (num_examples) -> Units, as many as there are.
    compare: (step, prompts, samples) -> Units: two completions of each prompt,
      in the order that raters give them; None where there are no raters.
  """

  unit_size: int
  length: int
  dtypes: dict[str, Any]
  units: Callable[[int, int, int | None], Units] | None
  lengths: Callable[[range, int, int | None], set[int]]
  held_out: Callable[[int], Units] | None
  numbers: Callable[[int, int, Any], np.ndarray] | None = None
  all_units: Callable[[Any], Units] | None = None
  compare: Callable[[int, Prompts, Samples], Units] | None = None


@dataclasses.dataclass(frozen=True)
class Environment:
  """Prompts, demonstrations and rewards, as the trainer sees them.

  Attributes:
    vocab_size: ids that tokens may take.
    pad_id: fills unused slots.
    stop_ids: end a completion.
    prompt_length: tokens of the longest prompt.
    demonstration_length: tokens of the longest demonstration and its prompt.
    prompts: (iteration, num_prompts) -> Prompts; a pure function. Arrays of
      the device need not be there yet.
    held_out: (num_prompts) -> Prompts, the same at every call.
    demonstrations: (step, batch_size, num_examples) -> (tokens, valid, mask)
      for supervised training; None where there are none.
    prompt_lengths: (iterations, num_prompts) -> the slots that ``prompts`` will
      have in any of them.
    demonstration_lengths: (steps, batch_size, num_examples) -> likewise.
    preferences: (kind) -> Comparisons, 'pairs', 'rankings' or 'unpaired', for
      the stage on preferences; None where there are none.
    rewards: (prompts, samples) -> {label: [B]} in the order of the config.
    weights: label -> weight in the sum that trains.
    text: token ids -> text.
    grading: () -> a context; inside of it rewards may have processes of their
      own.
    tokenizer: of the export, None if there is none.
    device_task: the task, where rewards are jittable.
  """

  vocab_size: int
  pad_id: int
  stop_ids: tuple[int, ...]
  prompt_length: int
  demonstration_length: int
  prompts: Callable[[int, int], Prompts]
  held_out: Callable[[int], Prompts]
  demonstrations: Callable[[int, int, int | None], tuple] | None
  prompt_lengths: Callable[[range, int], set[int]]
  demonstration_lengths: Callable[[range, int, int | None], set[int]]
  rewards: Callable[[Prompts, Samples], dict[str, np.ndarray]]
  weights: dict[str, float]
  text: Callable[[Any], str]
  preferences: Callable[[str], Comparisons] | None = None
  grading: Callable[[], contextlib.AbstractContextManager] = (
    contextlib.nullcontext
  )
  tokenizer: Any = None
  device_task: Task | None = None


def reward_weights(rewards: Mapping[str, Any]) -> dict[str, float]:
  """The weight of each reward in the sum that trains.

  Raises:
    ValueError: one is missing or no finite number.
  """
  weights: dict[str, float] = {}
  for label, block in rewards.items():
    weight = block.get('weight') if isinstance(block, Mapping) else None
    if (
      isinstance(weight, bool)
      or not isinstance(weight, int | float)
      or not math.isfinite(weight)
    ):
      raise ValueError(
        f'rewards.{label}={block!r}: it needs a finite number as its weight'
      )
    weights[label] = float(weight)
  return weights
