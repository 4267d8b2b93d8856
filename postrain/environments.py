"""Where prompts come from and what rewards their completions."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import tasks
from postrain.binding import bind
from postrain.keys import prompt_keys, run_key
from postrain.types import Prompts, Samples, Task

__all__ = ['task']


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


def task(seed: int, rewards: Mapping[str, Any], *, task: dict) -> Environment:
  """A synthetic task of `postrain.tasks`: prompts and rewards on the device.

  Args:
    seed: of the run.
    rewards: label -> dict(name of a reward of the task, weight).
    task: block for `postrain.tasks`.
  """
  chosen: Task = bind(tasks, task)()
  grade = jax.jit(functools.partial(_grade, chosen, rewards))
  draw = jax.jit(
    functools.partial(_draw, chosen), static_argnames=('held_out',)
  )
  _check_rewards(chosen, rewards)

  def prompts(key: Any, prompt_ids: np.ndarray, held_out: bool) -> Prompts:
    tokens, mask = draw(key, prompt_ids, held_out=held_out)
    return Prompts(np.asarray(tokens), np.asarray(mask), [{}] * len(prompt_ids))

  def demonstrations(
    step: int, batch_size: int, num_examples: int | None
  ) -> tuple:
    if chosen.solution is None:
      raise ValueError(
        f'task {task["name"]!r} has no demonstrations: set sft.num_steps=0'
      )
    ids = np.arange(batch_size) + step * batch_size
    if num_examples is not None:
      ids = np.random.default_rng([seed, step]).integers(
        num_examples, size=batch_size
      )
    drawn = prompts(run_key(seed, 'demonstrations'), ids, False)
    completions, mask = map(np.asarray, chosen.solution(drawn.tokens))
    return (
      np.concatenate([drawn.tokens, completions], axis=1),
      np.concatenate([drawn.mask, mask], axis=1),
      np.pad(mask, ((0, 0), (drawn.mask.shape[1], 0))),
    )

  return Environment(
    vocab_size=chosen.vocab_size,
    pad_id=chosen.pad_id,
    stop_ids=chosen.stop_ids,
    prompts=lambda iteration, num: prompts(
      run_key(seed, 'prompts', iteration), np.arange(num), False
    ),
    held_out=lambda num: prompts(
      run_key(seed, 'held_out'), np.arange(num), True
    ),
    demonstrations=demonstrations,
    rewards=lambda drawn, samples: {
      label: np.asarray(values)
      for label, values in grade(
        drawn.tokens, samples.tokens, samples.mask
      ).items()
    },
    weights=_weights(rewards),
    text=chosen.render,
    device_task=chosen,
  )


def _draw(
  task: Task, key: Any, prompt_ids: Any, held_out: bool
) -> tuple[Any, Any]:
  keys = prompt_keys(key, prompt_ids)
  return jax.vmap(functools.partial(task.prompt, held_out=held_out))(keys)


def _grade(
  task: Task, rewards: Mapping[str, Any], prompts: Any, tokens: Any, mask: Any
) -> dict[str, Any]:
  prompts = jnp.repeat(prompts, tokens.shape[0] // prompts.shape[0], axis=0)
  return {
    label: task.rewards[block['name']](prompts, tokens, mask)
    for label, block in rewards.items()
  }


def _check_rewards(task: Task, rewards: Mapping[str, Any]) -> None:
  for label, block in rewards.items():
    if set(block) != {'name', 'weight'}:
      raise ValueError(
        f'rewards.{label}={block!r}: a reward of a task has name and weight'
      )
    if block['name'] not in task.rewards:
      raise ValueError(
        f'rewards.{label}: the task has no reward {block["name"]!r};'
        f' it has: {", ".join(task.rewards)}'
      )


def _weights(rewards: Mapping[str, Any]) -> dict[str, float]:
  weights = {label: block.get('weight') for label, block in rewards.items()}
  for label, weight in weights.items():
    if isinstance(weight, bool) or not isinstance(weight, int | float):
      raise ValueError(f'rewards.{label}: weight={weight!r} is not a number')
  if not any(weights.values()):
    raise ValueError('rewards: at least one needs a weight that is not 0')
  return {label: float(weight) for label, weight in weights.items()}
