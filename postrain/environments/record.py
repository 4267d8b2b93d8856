"""What a trainer knows of where prompts come from and what rewards them."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from postrain.types import Prompts, Samples, Task


@dataclasses.dataclass(frozen=True)
class Environment:
  """Prompts, demonstrations and rewards, as the trainer sees them.

  Attributes:
    vocab_size: ids that tokens may take.
    pad_id: fills unused slots.
    stop_ids: end a completion.
    prompts: (iteration, num_prompts) -> Prompts; a pure function.
    held_out: (num_prompts) -> Prompts, the same at every call.
    demonstrations: (step, batch_size, num_examples) -> (tokens, valid, mask)
      for supervised training.
    rewards: (prompts, samples) -> {label: [B]} in the order of the config.
    weights: label -> weight in the sum that trains.
    text: token ids -> text.
    tokenizer: of the export, None if there is none.
    device_task: the task, where rewards are jittable.
  """

  vocab_size: int
  pad_id: int
  stop_ids: tuple[int, ...]
  prompts: Callable[[int, int], Prompts]
  held_out: Callable[[int], Prompts]
  demonstrations: Callable[[int, int, int | None], tuple]
  rewards: Callable[[Prompts, Samples], dict[str, np.ndarray]]
  weights: dict[str, float]
  text: Callable[[Any], str]
  tokenizer: Any = None
  device_task: Task | None = None


def reward_weights(rewards: Mapping[str, Any]) -> dict[str, float]:
  weights = {label: block.get('weight') for label, block in rewards.items()}
  for label, weight in weights.items():
    if isinstance(weight, bool) or not isinstance(weight, int | float):
      raise ValueError(f'rewards.{label}: weight={weight!r} is not a number')
  if not any(weights.values()):
    raise ValueError('rewards: at least one needs a weight that is not 0')
  return {label: float(weight) for label, weight in weights.items()}
