"""The pure functions of a run, bound from its recipe.

The trainer and the device loop are two ways to call the same four: sample,
prepare, update, imitate.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

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
from postrain.batches import asked, assemble, call_by_name, reweigh, take
from postrain.binding import bind
from postrain.couplings import with_array, with_selection
from postrain.recipe import Block, Recipe
from postrain.references import (
  make_move_reference,
  reference_metrics,
  uses_reference,
)
from postrain.sampling import sample
from postrain.scoring import score
from postrain.train_step import make_train_step
from postrain.types import (
  Batch,
  Max,
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
    greedy: the same, one greedy completion of each prompt; None unless the
      advantage asks for their rewards, ``baselines``.
    prepare: (params, ref_params, prompts, prompt_mask, samples, rewards,
      signals) -> (Batch, Metrics, columns): scores, KL in the reward,
      advantages, and figures of each completion. The ``signals`` are those of
      `postrain.batches.assemble`.
    update: (state, batch, rows, key) -> (state, Metrics): one optimiser step on
      the minibatch of ``rows``; the key is for masks that draw.
    imitate: (state, tokens, valid, mask) -> (state, Metrics): one supervised
      step.
    move_reference: (ref_params, params, iteration) -> ref_params.
    rl_optimizer, sft_optimizer: their gradient transformations.
    uses_reference: whether anything reads the reference.
  """

  sample: Callable[..., Samples]
  greedy: Callable[..., Samples] | None
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
  advantage = _bind_advantage(recipe)
  loss = bind(losses, recipe.loss)
  rl_optimizer = bind(optimizers, recipe.rl.optimizer)()
  sft_optimizer = bind(optimizers, recipe.sft.optimizer)()
  objective = objectives.policy_gradient(
    model,
    loss=loss,
    kl=estimator,
    kl_coef=recipe.kl.loss_coef,
    entropy_coef=recipe.entropy_coef,
    temperature=recipe.sampling.temperature,
    chunk_size=recipe.chunk_size,
  )
  rl_step = make_train_step(
    objective, rl_optimizer, num_micro_batches=recipe.rl.num_micro_batches
  )
  select = _make_select(recipe, model, restricts='selected' not in asked(loss))

  def update(
    state: Any, batch: Batch, rows: Any, key: Any
  ) -> tuple[Any, Metrics]:
    batch = select(state.params['actor'], take(batch, rows), key)
    return rl_step(state, {}, weigh(batch))

  greedy = _make_sample(recipe, model, pad_id, stop_ids, greedy=True)
  return Algorithm(
    sample=_make_sample(recipe, model, pad_id, stop_ids),
    greedy=greedy if 'baselines' in asked(advantage) else None,
    prepare=_make_prepare(recipe, model, estimator, advantage),
    update=update,
    imitate=_make_imitate(recipe, model, sft_optimizer),
    move_reference=make_move_reference(recipe),
    rl_optimizer=rl_optimizer,
    sft_optimizer=sft_optimizer,
    uses_reference=uses_reference(recipe),
  )


def _make_imitate(
  recipe: Recipe, model: Model, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, Metrics]]:
  objective = objectives.supervised(
    model, loss=losses.negative_log_likelihood, chunk_size=recipe.chunk_size
  )
  step = make_train_step(
    objective, optimizer, num_micro_batches=recipe.sft.num_micro_batches
  )

  def imitate(
    state: Any, tokens: Any, valid: Any, mask: Any
  ) -> tuple[Any, Metrics]:
    weights = {'policy': call_by_name(aggregation.token_mean, {'mask': mask})}
    return step(state, {}, Batch(tokens, valid, mask, weights, {}))

  return imitate


def _optional(module: Any, block: Block | None) -> Callable | None:
  return None if block is None else bind(module, block)


def _bind_advantage(recipe: Recipe) -> Callable[..., Any]:
  """The advantage; one of several rewards has their weights from them."""
  advantage = bind(advantages, recipe.advantage)
  if 'reward_parts' not in asked(advantage):
    return advantage
  if recipe.kl.reward_coef is not None:
    raise ValueError(
      f'kl.reward_coef={recipe.kl.reward_coef} with advantage'
      f' {recipe.advantage["name"]!r}: each reward is standardised by itself'
      ' and none of them holds the KL; use kl.loss_coef'
    )
  weights = tuple(block['weight'] for block in recipe.rewards.values())
  return bind(advantages, {'weights': weights, **recipe.advantage})


def _make_select(
  recipe: Recipe, model: Model, restricts: bool
) -> Callable[..., Batch]:
  """The selection, passed to a loss that asks for it, else what trains."""
  selection = _optional(masks, recipe.selection)

  def select(params: Params, batch: Batch, key: Any) -> Batch:
    if selection is None:
      return batch
    batch = with_selection(
      model,
      params,
      batch,
      selection=selection,
      key=key,
      temperature=recipe.sampling.temperature,
      chunk_size=recipe.chunk_size,
      num_slices=recipe.rl.num_micro_batches,
    )
    if restricts:
      trained = batch.arrays['trained'] & batch.arrays['selected']
      batch = with_array(batch, 'trained', trained)
    return batch

  return select


def _make_sample(
  recipe: Recipe, model: Model, pad_id: int, stop_ids: tuple[int, ...],
  greedy: bool = False,
) -> Callable[..., Samples]:  # fmt: skip
  choices = recipe.sampling
  if greedy:
    choices = dataclasses.replace(
      choices, num_samples=1, temperature=0, top_k=None, top_p=None, min_p=None
    )

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
  recipe: Recipe, model: Model, estimator: Callable, advantage: Callable
) -> Callable[..., tuple[Batch, Metrics, dict[str, Any]]]:
  score_fn = functools.partial(
    score,
    model,
    temperature=recipe.sampling.temperature,
    chunk_size=recipe.chunk_size,
    num_slices=recipe.rl.num_score_slices,
  )

  def prepare(
    params: Params, ref_params: Params, prompts: Any, prompt_mask: Any,
    samples: Samples, rewards: Any, signals: dict[str, Any],
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
    if uses_reference(recipe):
      ref = score_fn(ref_params, tokens, valid, mask)
      arrays['ref_logprobs'] = ref.logprobs
      figures = {'logprobs': scores.logprobs, 'ref_logprobs': ref.logprobs}
      metrics |= reference_metrics(figures, mask)
      if recipe.kl.reward_coef is not None:
        penalty = call_by_name(estimator, {**figures, 'mask': mask})
        if 'mask' in asked(advantage):  # along tokens: each pays for itself
          arrays['penalties'] = recipe.kl.reward_coef * penalty
        else:
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
    batch = assemble(
      rollout, advantage=advantage, trained=trained, signals=signals
    )
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
