"""Held-out figures during training, with the grader that rewards."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain.environments import Environment
from postrain.evaluation import pass_at_k
from postrain.keys import run_key
from postrain.recipe import Recipe
from postrain.sampling import sample
from postrain.types import Model, Params, Prompts, Samples


def make_evaluator(
  recipe: Recipe, model: Model, environment: Environment
) -> Callable[[dict[str, Params]], dict[str, float]]:
  """Make ``evaluate(params) -> figures``: greedy, and pass@k if asked.

  ``eval/greedy`` is the share of held-out prompts whose greedy completion
  reaches the threshold of the grader, ``eval/<label>`` the mean of each reward
  over them, ``eval/pass@k`` the unbiased estimate from samples drawn as in
  training. The keys are the same at every call, so that curves move by the
  parameters alone.
  """
  choices = recipe.evaluation
  draw = functools.partial(
    sample,
    model,
    max_new_tokens=recipe.sampling.max_new_tokens,
    stop_ids=environment.stop_ids,
    pad_id=environment.pad_id,
  )
  greedy = jax.jit(functools.partial(draw, num_samples=1, temperature=0))
  several = jax.jit(
    functools.partial(
      draw,
      num_samples=max(choices.num_samples, 1),
      temperature=recipe.sampling.temperature,
      top_k=recipe.sampling.top_k,
      top_p=recipe.sampling.top_p,
      min_p=recipe.sampling.min_p,
    )
  )

  def rewards(sampler: Any, params: Params) -> dict[str, np.ndarray]:
    prompts = environment.held_out(choices.num_prompts)
    key = run_key(recipe.seed, 'evaluation')
    parts = []
    for start in range(0, choices.num_prompts, choices.batch_size):
      ids = np.arange(start, start + choices.batch_size) % choices.num_prompts
      part = Prompts(
        prompts.tokens[ids],
        prompts.mask[ids],
        [prompts.examples[i] for i in ids],
      )
      samples: Samples = jax.device_get(
        sampler(
          params, part.tokens, part.mask, key, prompt_ids=jnp.asarray(ids)
        )
      )
      graded = environment.rewards(part, samples)
      parts.append({k: v.reshape(len(ids), -1) for k, v in graded.items()})
    return {
      k: np.concatenate([p[k] for p in parts])[: choices.num_prompts]
      for k in parts[0]
    }

  def evaluate(params: dict[str, Params]) -> dict[str, float]:
    graded = rewards(greedy, params['actor'])
    correct = graded[choices.grader] >= choices.threshold
    figures = {'eval/greedy': float(correct.mean())}
    figures |= {f'eval/{k}': float(v.mean()) for k, v in graded.items()}
    if choices.num_samples:
      graded = rewards(several, params['actor'])
      counts = (graded[choices.grader] >= choices.threshold).sum(-1)
      for k in choices.ks:
        shares = [pass_at_k(int(c), choices.num_samples, k) for c in counts]
        figures[f'eval/pass@{k}'] = float(np.mean(shares))
    return figures

  return evaluate
