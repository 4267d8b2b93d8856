"""Environments of synthetic tasks: everything but the text on the device."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import tasks
from postrain.binding import bind
from postrain.environments.raters import comparisons
from postrain.environments.record import Environment, reward_weights
from postrain.keys import prompt_keys, run_key
from postrain.types import Prompts, Task


def task(
  seed: int,
  rewards: Mapping[str, Any],
  *,
  task: dict,
  rater: dict | None = None,
  num_completions: int = 4,
  writer_logits: tuple | None = None,
) -> Environment:
  """A synthetic task of `postrain.tasks`: prompts and rewards on the device.

  Args:
    seed: of the run.
    rewards: label -> dict(name of a reward of the task, weight).
    task: block for `postrain.tasks`.
    rater: hyperparameters of `postrain.tasks.labels`, of the function for the
      kind of preferences that a run learns from; None for its defaults. Raters
      need a task with the reward ``gold``.
    num_completions: of a prompt, in rankings.
    writer_logits: one for each token id, of those who write what raters are
      given to train on; None for all tokens alike. Padding is never drawn.
  """
  chosen: Task = bind(tasks, task)()
  judge = jax.jit(functools.partial(grade, chosen, rewards))
  draw = jax.jit(
    functools.partial(_draw, chosen), static_argnames=('held_out',)
  )
  weights = reward_weights(rewards)
  _check_rewards(chosen, rewards)

  def prompts(key: Any, prompt_ids: np.ndarray, held_out: bool) -> Prompts:
    tokens, mask = draw(key, prompt_ids, held_out=held_out)
    return Prompts(tokens, mask, [{}] * len(prompt_ids))

  def demonstrations(
    solution: Callable, step: int, batch_size: int, num_examples: int | None
  ) -> tuple:
    ids = np.arange(batch_size) + step * batch_size
    if num_examples is not None:
      ids = np.random.default_rng([seed, step]).integers(
        num_examples, size=batch_size
      )
    drawn = prompts(run_key(seed, 'demonstrations'), ids, False)
    completions, mask = map(np.asarray, solution(drawn.tokens))
    return (
      np.concatenate([drawn.tokens, completions], axis=1),
      np.concatenate([drawn.mask, mask], axis=1),
      np.pad(mask, ((0, 0), (drawn.mask.shape[1], 0))),
    )

  return Environment(
    vocab_size=chosen.vocab_size,
    pad_id=chosen.pad_id,
    stop_ids=chosen.stop_ids,
    prompt_length=chosen.prompt_length,
    demonstration_length=chosen.prompt_length + chosen.completion_length,
    prompts=lambda iteration, num: prompts(
      run_key(seed, 'prompts', iteration), np.arange(num), False
    ),
    held_out=lambda num: prompts(
      run_key(seed, 'held_out'), np.arange(num), True
    ),
    demonstrations=chosen.solution
    and functools.partial(demonstrations, chosen.solution),
    prompt_lengths=lambda *_: {chosen.prompt_length},
    demonstration_lengths=lambda *_: {
      chosen.prompt_length + chosen.completion_length
    },
    rewards=lambda drawn, samples: {
      label: np.asarray(values)
      for label, values in judge(
        drawn.tokens, samples.tokens, samples.mask
      ).items()
    },
    preferences=comparisons(
      chosen, seed, rater or {}, num_completions, writer_logits
    ),
    weights=weights,
    text=chosen.render,
    device_task=chosen,
  )


def _draw(
  task: Task, key: Any, prompt_ids: Any, held_out: bool
) -> tuple[Any, Any]:
  keys = prompt_keys(key, prompt_ids)
  return jax.vmap(functools.partial(task.prompt, held_out=held_out))(keys)


def grade(
  task: Task, rewards: Mapping[str, Any], prompts: Any, tokens: Any, mask: Any
) -> dict[str, Any]:
  """Rewards by label of the samples [B T] of prompts [P S]; jittable."""
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
