"""What would be silently wrong is an error of the assembly."""

import inspect
from typing import Any

import numpy as np

from postrain import advantages
from postrain.environments import Environment
from postrain.recipe import Recipe
from postrain.types import Model, Samples


def check_assembly(
  recipe: Recipe, environment: Environment, model: Model
) -> None:
  """Hold the parts of a run against each other, before any compilation.

  Raises:
    ValueError: names what does not fit and what would.
  """
  if environment.vocab_size > model.vocab_size:
    raise ValueError(
      f'the tokenizer has {environment.vocab_size} ids, the embedding'
      f' {model.vocab_size} rows: ids beyond it have no embedding; take the'
      " checkpoint's own tokenizer"
    )
  if environment.pad_id in environment.stop_ids:
    raise ValueError(
      f'pad id {environment.pad_id} is also a stop id: the last token of every'
      ' completion would be masked; give the tokenizer a pad token of its own'
    )
  shards = recipe.mesh.data * recipe.mesh.fsdp
  if recipe.rl.num_iterations:
    _check_groups(recipe)
    _check_kl(recipe)
    rows = recipe.rl.num_prompts * recipe.sampling.num_samples
    micro = rows // recipe.rl.num_minibatches // recipe.rl.num_micro_batches
    _check_shards('rl.num_prompts', recipe.rl.num_prompts, shards)
    _check_shards('rows of an rl micro-batch', micro, shards)
  if recipe.sft.num_steps:
    micro = recipe.sft.batch_size // recipe.sft.num_micro_batches
    _check_shards('rows of an sft micro-batch', micro, shards)


def _check_groups(recipe: Recipe) -> None:
  group = recipe.sampling.num_samples
  compares = (
    'singleton'
    in inspect.signature(
      getattr(advantages, recipe.advantage['name'])
    ).parameters
  )
  if group == 1 and compares and 'singleton' not in recipe.advantage:
    raise ValueError(
      f'sampling.num_samples=1 with advantage {recipe.advantage["name"]!r}: a'
      ' group of one has nothing to compare with; take at least 2, or set'
      ' advantage.singleton'
    )


def _check_kl(recipe: Recipe) -> None:
  kl = recipe.kl
  if kl.estimator['name'] == 'k1' and kl.loss_coef is not None:
    raise ValueError(
      'kl.estimator k1 with kl.loss_coef: the expected gradient of k1 in the'
      ' loss is 0, it only adds noise; take k2 or k3 there, or kl.reward_coef'
    )


def _check_shards(name: str, number: int, shards: int) -> None:
  if number % shards:
    raise ValueError(
      f'{name}: {number} do not divide over {shards} devices'
      ' (mesh.data x mesh.fsdp)'
    )


def check_completions(
  samples: Samples, environment: Environment, first: bool
) -> None:
  """Refuse a length limit that lets no completion end."""
  if first and environment.stop_ids and np.all(samples.truncated):
    raise ValueError(
      f'all {len(samples.truncated)} completions of the first rollout met the'
      f' limit of {samples.tokens.shape[1]} tokens without a stop token'
      f' {environment.stop_ids}: raise sampling.max_new_tokens, or train the'
      ' model to stop (sft.num_steps)'
    )


def check_rewards(rewards: dict[str, Any], num_rows: int) -> None:
  """Refuse rewards of the wrong number or not finite."""
  for label, values in rewards.items():
    if np.shape(values) != (num_rows,):
      raise ValueError(
        f'reward {label!r} has shape {np.shape(values)} for {num_rows}'
        ' completions: return one number each'
      )
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
      raise ValueError(
        f'reward {label!r} is {values[bad[0]]} for completion {bad[0]}:'
        ' return finite numbers'
      )
