"""Held-out figures during training, with the grader that rewards."""

from collections.abc import Iterator
import functools
from typing import Any

import numpy as np

from postrain import sharding
from postrain.compilation import make_jit
from postrain.environments import Environment
from postrain.evaluation import pass_at_k
from postrain.keys import run_key
from postrain.recipe import Recipe
from postrain.rollouts import fetched, picked
from postrain.sampling import sample
from postrain.sharding import for_sampling
from postrain.types import Model, Params, Prompts, Samples


class Evaluator:
  """Called with parameters, gives figures: greedy, and pass@k if asked.

  ``eval/greedy`` is the share of held-out prompts whose greedy completion
  reaches the threshold of the grader, ``eval/<label>`` the mean of each reward
  over them, ``eval/pass@k`` the unbiased estimate from samples drawn as in
  training. The keys are the same at every call, so that curves move by the
  parameters alone.
  """

  def __init__(self, recipe: Recipe, model: Model, environment: Environment):
    self.recipe, self.environment = recipe, environment
    choices = recipe.evaluation
    draw = functools.partial(
      sample,
      model,
      max_new_tokens=recipe.sampling.max_new_tokens,
      stop_ids=environment.stop_ids,
      pad_id=environment.pad_id,
    )
    jit = make_jit()
    self._greedy = jit(
      for_sampling(functools.partial(draw, num_samples=1, temperature=0))
    )
    self._several = jit(
      for_sampling(
        functools.partial(
          draw,
          num_samples=max(choices.num_samples, 1),
          temperature=recipe.sampling.temperature,
          top_k=recipe.sampling.top_k,
          top_p=recipe.sampling.top_p,
          min_p=recipe.sampling.min_p,
        )
      )
    )

  def __call__(self, params: dict[str, Params]) -> dict[str, float]:
    choices = self.recipe.evaluation
    graded = self._rewards(self._greedy, params['actor'])
    correct = graded[choices.grader] >= choices.threshold
    figures = {'eval/greedy': float(correct.mean())}
    figures |= {f'eval/{k}': float(v.mean()) for k, v in graded.items()}
    if choices.num_samples:
      graded = self._rewards(self._several, params['actor'])
      counts = (graded[choices.grader] >= choices.threshold).sum(-1)
      for k in choices.ks:
        shares = [pass_at_k(int(c), choices.num_samples, k) for c in counts]
        figures[f'eval/pass@{k}'] = float(np.mean(shares))
    return figures

  def traced(
    self, params: dict[str, Params], key: Any
  ) -> Iterator[tuple[str, Any]]:
    """The samplers, traced on the shapes of what they take, by name."""
    part, ids = next(self._parts())
    samplers = {'greedy': self._greedy}
    if self.recipe.evaluation.num_samples:
      samplers['samples'] = self._several
    for name, sampler in samplers.items():
      yield (
        name,
        sampler.trace(
          params['actor'], part.tokens, part.mask, key, prompt_ids=ids
        ),
      )

  def _rewards(self, sampler: Any, params: Params) -> dict[str, np.ndarray]:
    key, parts = run_key(self.recipe.seed, 'evaluation'), []
    for part, ids in self._parts():
      samples: Samples = sharding.on_host(
        sampler(params, part.tokens, part.mask, key, prompt_ids=ids)
      )
      graded = self.environment.rewards(part, samples)
      parts.append({k: v.reshape(len(ids), -1) for k, v in graded.items()})
    return {
      k: np.concatenate([p[k] for p in parts])[: len(self._prompts.examples)]
      for k in parts[0]
    }

  @functools.cached_property
  def _prompts(self) -> Prompts:
    prompts = self.environment.held_out(self.recipe.evaluation.num_prompts)
    return fetched(prompts)

  def _parts(self) -> Iterator[tuple[Prompts, np.ndarray]]:
    """Batches of one shape and their numbers; the last begins again."""
    choices, prompts = self.recipe.evaluation, self._prompts
    for start in range(0, choices.num_prompts, choices.batch_size):
      ids = np.arange(start, start + choices.batch_size) % choices.num_prompts
      yield picked(prompts, ids), ids.astype(np.int32)
