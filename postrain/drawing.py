"""How a run draws completions: the sampler with its choices bound."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from postrain.adapted import bases, rejoined
from postrain.recipe import Recipe
from postrain.sampling import extend, sample, sample_in_slots
from postrain.types import Model, Params, Samples


def make_sample(
  recipe: Recipe, model: Model, pad_id: int, stop_ids: tuple[int, ...],
  greedy: bool = False,
) -> Callable[..., Samples]:  # fmt: skip
  """Make ``sample`` of `postrain.algorithm.Algorithm`, or its ``greedy``."""
  choices, routing = recipe.sampling, recipe.routing
  record = routing.record or routing.replay == 'sampler'
  if greedy:
    choices = dataclasses.replace(
      choices, num_samples=1, temperature=0, top_k=None, top_p=None, min_p=None
    )

  how = functools.partial(sample, num_cache_sizes=choices.num_cache_sizes)
  if choices.num_slots is not None:
    how = functools.partial(
      sample_in_slots,
      num_slots=choices.num_slots,
      num_halvings=choices.num_halvings,
    )

  def draw(
    params: Params, prompts: Any, prompt_mask: Any, key: Any, prompt_ids: Any
  ) -> Samples:
    return how(
      model,
      params['actor'],
      prompts,
      prompt_mask,
      key,
      num_samples=choices.num_samples,
      max_new_tokens=choices.max_new_tokens,
      stop_ids=stop_ids,
      pad_id=pad_id,
      temperature=choices.temperature,
      top_k=choices.top_k,
      top_p=choices.top_p,
      min_p=choices.min_p,
      record_routing=record and not greedy,
      prompt_ids=prompt_ids,
    )

  return draw


def make_write(
  recipe: Recipe, model: Model, pad_id: int, stop_ids: tuple[int, ...]
) -> Callable[..., Samples] | None:
  """Make ``write`` of it; None where preferences are given."""
  source = recipe.preference.source
  if source == 'dataset':
    return None
  number = 1 if source == 'self_play' else 2
  sampling = dataclasses.replace(recipe.sampling, num_samples=number)
  chosen = dataclasses.replace(recipe, sampling=sampling)
  draw = make_sample(chosen, model, pad_id, stop_ids)

  def write(params: Any, reference: Params | None, *rest: Any) -> Samples:
    if source == 'self_play':
      params = {'actor': rejoined(reference, bases(params['actor']))}
    return draw(params, *rest)

  return write


def make_extend(
  recipe: Recipe, model: Model, stop_ids: tuple[int, ...]
) -> Callable[..., Samples] | None:
  """Make ``extend`` of it; None where nothing is carried over."""
  choices = recipe.sampling
  max_steps = choices.carry_over
  if max_steps is None:
    return None

  def go_on(
    params: Params, prompts: Any, prompt_mask: Any, key: Any, prompt_ids: Any,
    samples: Samples, version: Any,
  ) -> Samples:  # fmt: skip
    return extend(
      model,
      params['actor'],
      prompts,
      prompt_mask,
      samples,
      key,
      max_steps=max_steps,
      stop_ids=stop_ids,
      temperature=choices.temperature,
      top_k=choices.top_k,
      top_p=choices.top_p,
      min_p=choices.min_p,
      version=version,
      prompt_ids=prompt_ids,
    )

  return go_on
