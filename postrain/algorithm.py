"""The pure functions of a run, bound from its recipe.

The trainer and the device loop are two ways to call the same four: sample,
prepare, update, imitate.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from postrain import (
  advantages,
  aggregation,
  importance,
  kl,
  losses,
  masks,
  objectives,
  optimizers,
  shaping,
)
from postrain.batches import assemble, call_by_name, reweigh, take
from postrain.binding import bind
from postrain.recipe import Block, Recipe
from postrain.sampling import sample
from postrain.scoring import score
from postrain.train_step import make_train_step
from postrain.types import (
  Batch,
  Max,
  Mean,
  Metrics,
  Model,
  Params,
  Rollout,
  Samples,
)


class Algorithm(NamedTuple):
  """What a run does, as functions of arrays.

  Attributes:
    sample: (params, prompts, prompt_mask, key, prompt_ids) -> Samples.
    prepare: (params, ref_params, prompts, prompt_mask, samples, rewards)
      -> (Batch, Metrics, columns): scores, KL in the reward, advantages, and
      figures of each completion.
    update: (state, batch, rows) -> (state, Metrics): one optimiser step on the
      minibatch of ``rows``.
    imitate: (state, tokens, valid, mask) -> (state, Metrics): one supervised
      step.
    move_reference: (ref_params, params, iteration) -> ref_params.
    rl_optimizer, sft_optimizer: their gradient transformations.
    uses_reference: whether anything reads the reference.
  """

  sample: Callable[..., Samples]
  prepare: Callable[..., tuple[Batch, Metrics, dict[str, Any]]]
  update: Callable[..., tuple[Any, Metrics]]
  imitate: Callable[..., tuple[Any, Metrics]]
  move_reference: Callable[..., Params]
  rl_optimizer: optax.GradientTransformation
  sft_optimizer: optax.GradientTransformation
  uses_reference: bool


def make_algorithm(
  recipe: Recipe, model: Model, *, pad_id: int, stop_ids: tuple[int, ...]
) -> Algorithm:
  """Bind every choice of a recipe; all errors of naming appear here."""
  aggregate = bind(aggregation, recipe.aggregation)
  weigh = functools.partial(
    reweigh,
    aggregation=aggregate,
    kl_aggregation=_optional(aggregation, recipe.kl.aggregation),
    correction=_optional(importance, recipe.correction),
  )
  estimator = bind(kl, recipe.kl.estimator)
  rl_optimizer = bind(optimizers, recipe.rl.optimizer)()
  sft_optimizer = bind(optimizers, recipe.sft.optimizer)()
  objective = objectives.policy_gradient(
    model,
    loss=bind(losses, recipe.loss),
    kl=estimator,
    kl_coef=recipe.kl.loss_coef,
    entropy_coef=recipe.entropy_coef,
    temperature=recipe.sampling.temperature,
    chunk_size=recipe.chunk_size,
  )
  rl_step = make_train_step(
    objective, rl_optimizer, num_micro_batches=recipe.rl.num_micro_batches
  )
  sft_step = make_train_step(
    objectives.supervised(
      model,
      loss=losses.negative_log_likelihood,
      chunk_size=recipe.chunk_size,
    ),
    sft_optimizer,
    num_micro_batches=recipe.sft.num_micro_batches,
  )

  def update(state: Any, batch: Batch, rows: Any) -> tuple[Any, Metrics]:
    return rl_step(state, {}, weigh(take(batch, rows)))

  def imitate(
    state: Any, tokens: Any, valid: Any, mask: Any
  ) -> tuple[Any, Metrics]:
    weights = {'policy': call_by_name(aggregation.token_mean, {'mask': mask})}
    return sft_step(state, {}, Batch(tokens, valid, mask, weights, {}))

  return Algorithm(
    sample=_make_sample(recipe, model, pad_id, stop_ids),
    prepare=_make_prepare(recipe, model, estimator),
    update=update,
    imitate=imitate,
    move_reference=_make_move_reference(recipe),
    rl_optimizer=rl_optimizer,
    sft_optimizer=sft_optimizer,
    uses_reference=_uses_reference(recipe),
  )


def _optional(module: Any, block: Block | None) -> Callable | None:
  return None if block is None else bind(module, block)


def _uses_reference(recipe: Recipe) -> bool:
  coefs = (recipe.kl.reward_coef, recipe.kl.loss_coef)
  return any(coef is not None for coef in coefs)


def _make_sample(
  recipe: Recipe, model: Model, pad_id: int, stop_ids: tuple[int, ...]
) -> Callable[..., Samples]:
  choices = recipe.sampling

  def draw(
    params: Params, prompts: Any, prompt_mask: Any, key: Any, prompt_ids: Any
  ) -> Samples:
    return sample(
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
      prompt_ids=prompt_ids,
    )

  return draw


def _make_prepare(
  recipe: Recipe, model: Model, estimator: Callable
) -> Callable[..., tuple[Batch, Metrics, dict[str, Any]]]:
  advantage = bind(advantages, recipe.advantage)
  score_fn = functools.partial(
    score,
    model,
    temperature=recipe.sampling.temperature,
    chunk_size=recipe.chunk_size,
    num_slices=recipe.rl.num_score_slices,
  )

  def prepare(
    params: Params, ref_params: Params, prompts: Any, prompt_mask: Any,
    samples: Samples, rewards: Any,
  ) -> tuple[Batch, Metrics, dict[str, Any]]:  # fmt: skip
    tokens, valid, mask = join_prompts(prompts, prompt_mask, samples)
    scores = score_fn(params['actor'], tokens, valid, mask)
    arrays = {
      'old_logprobs': scores.logprobs,
      'sampler_logprobs': behind_prompt(prompts, samples.sampler_logprobs),
    }
    gap = jnp.abs(
      scores.model_logprobs - behind_prompt(prompts, samples.model_logprobs)
    )
    informative = masks.informative_groups(rewards)
    metrics: Metrics = {
      'sampler/logprob_gap_max': Max(jnp.where(mask, gap, 0).max()),
      'sampler/logprob_gap': objectives.masked_mean(gap, mask),
      'sampler/entropy': objectives.masked_mean(scores.entropy, mask),
    }
    if _uses_reference(recipe):
      ref = score_fn(ref_params, tokens, valid, mask)
      arrays['ref_logprobs'] = ref.logprobs
      figures = {'logprobs': scores.logprobs, 'ref_logprobs': ref.logprobs}
      metrics |= _reference_metrics(figures, mask)
      if recipe.kl.reward_coef is not None:
        penalty = call_by_name(estimator, {**figures, 'mask': mask})
        rewards = shaping.kl_penalized(
          rewards.reshape(-1), penalty, mask, coef=recipe.kl.reward_coef
        ).reshape(rewards.shape)
    rollout = Rollout(
      tokens=tokens,
      valid=valid,
      mask=mask,
      rewards=rewards,
      truncated=samples.truncated,
      version=jnp.zeros(tokens.shape, jnp.int32),
      turn_ids=jnp.zeros(tokens.shape, jnp.int32),
      arrays=arrays,
    )
    trained = _trained_tokens(recipe, rollout, informative)
    batch = assemble(rollout, advantage=advantage, trained=trained)
    return batch, metrics, _columns(batch, gap)

  return prepare


def join_prompts(
  prompts: Any, prompt_mask: Any, samples: Samples
) -> tuple[Any, Any, Any]:
  """Put each completion behind its prompt: (tokens, valid, mask)."""
  num_samples = samples.tokens.shape[0] // prompts.shape[0]
  repeat = functools.partial(jnp.repeat, repeats=num_samples, axis=0)
  tokens = jnp.concatenate([repeat(prompts), samples.tokens], axis=1)
  valid = jnp.concatenate([repeat(prompt_mask), samples.mask], axis=1)
  return tokens, valid, behind_prompt(prompts, samples.mask)


def behind_prompt(prompts: Any, values: Any) -> Any:
  """Move per-token figures of completions behind the prompt's slots."""
  return jnp.pad(values, ((0, 0), (prompts.shape[1], 0)))


def _reference_metrics(figures: dict[str, Any], mask: Any) -> Metrics:
  k1 = jnp.where(mask, call_by_name(kl.k1, figures), 0)
  k3 = call_by_name(kl.k3, figures)
  sequences = mask.any(-1)
  return {
    'reference/kl_sequence': Mean(k1.sum(), sequences.sum(dtype=jnp.float32)),
    'reference/kl_token': objectives.masked_mean(k3, mask),
  }


def _columns(batch: Batch, gap: Any) -> dict[str, Any]:
  """Figures of each completion, for the sample files."""
  lengths = jnp.maximum(batch.mask.sum(-1, dtype=jnp.float32), 1)
  advantages = batch.arrays['advantages'].sum(-1) / lengths
  largest = jnp.where(batch.mask, gap, 0).max(-1)
  return {'advantage': advantages, 'logprob_gap': largest}


def _trained_tokens(recipe: Recipe, rollout: Rollout, informative: Any) -> Any:
  """Which tokens the policy term trains on."""
  trained = rollout.mask
  if recipe.filter.overlong == 'mask':
    trained = trained & masks.overlong(rollout.mask, rollout.truncated)
  if recipe.filter.informative_only:
    rows = jnp.repeat(informative.reshape(-1), rollout.rewards.shape[1])
    trained = trained & rows[:, None]
  return trained


def _make_move_reference(recipe: Recipe) -> Callable[..., Params]:
  choices = recipe.reference

  def move(ref_params: Params, params: Params, iteration: Any) -> Params:
    """The reference after ``iteration`` (from 0) has updated ``params``."""
    if choices.update == 'frozen':
      return ref_params
    if choices.update == 'ema':
      return jax.tree.map(
        lambda r, p: choices.decay * r + (1 - choices.decay) * p,
        ref_params,
        params,
      )
    due = (iteration + 1) % choices.every == 0
    return jax.tree.map(lambda r, p: jnp.where(due, p, r), ref_params, params)

  return move
