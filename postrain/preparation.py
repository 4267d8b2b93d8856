"""From samples and rewards to a batch: scores, KL in the reward, advantages."""

from collections.abc import Callable
import functools
from typing import Any

import jax.numpy as jnp

from postrain import advantages, kl, masks, objectives, shaping, sharding
from postrain.adapted import bases, rejoined
from postrain.batches import asked, assemble, call_by_name, together
from postrain.binding import bind
from postrain.critics import Network
from postrain.recipe import Recipe
from postrain.scoring import (
  Scores,
  hidden_states,
  in_slices,
  rerouted,
  score,
)
from postrain.types import (
  Batch,
  Mean,
  Metrics,
  Model,
  Packing,
  Params,
  Rollout,
  Samples,
  SharedPrompts,
)
from postrain.values import explained_variance, token_values


def uses_reference(recipe: Recipe) -> bool:
  """Whether anything reads the reference."""
  coefs = (recipe.kl.reward_coef, recipe.kl.loss_coef)
  return any(coef is not None for coef in coefs)


def bind_advantage(recipe: Recipe) -> Callable[..., Any]:
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


def make_prepare(
  recipe: Recipe, model: Model, estimator: Callable, advantage: Callable,
  critic: Network | None = None,
) -> Callable[..., tuple[Batch, Metrics, dict[str, Any]]]:  # fmt: skip
  """Make ``prepare`` of `postrain.algorithm.Algorithm`."""
  score_fn = functools.partial(
    score,
    model,
    temperature=recipe.sampling.temperature,
    chunk_size=recipe.chunk_size,
    num_slices=recipe.rl.num_score_slices,
  )
  whitening = None
  if recipe.whitening is not None:
    whitening = bind(advantages, recipe.whitening)
  returns = None
  if critic is not None:
    returns = bind(advantages, recipe.critic.returns)

  def prepare(
    params: Params, ref_params: Params, prompts: Any, prompt_mask: Any,
    samples: Samples, rewards: Any, signals: dict[str, Any],
    packing: Packing | None = None, kl_coef: Any = None,
  ) -> tuple[Batch, Metrics, dict[str, Any]]:  # fmt: skip
    tokens, valid, mask = join_prompts(prompts, prompt_mask, samples)
    shared = None
    if recipe.rl.share_prompts:
      shared = SharedPrompts(prompts.shape[1], recipe.sampling.num_samples)
    score_rows = functools.partial(
      score_fn, tokens=tokens, valid=valid, mask=mask, packing=packing or shared
    )
    arrays, metrics, columns = _with_old(
      recipe, score_rows, params['actor'], samples, mask
    )
    if critic is not None:
      rows = tokens, valid, mask, packing or shared
      arrays['old_values'] = _values(recipe, model, critic, params, rows)
    informative = masks.informative_groups(rewards)  # before any KL
    if uses_reference(recipe):
      reference = _reference(recipe, ref_params, params['actor'])
      arrays['ref_logprobs'] = score_rows(reference).logprobs
    if uses_reference(recipe) and recipe.rl.rescore:
      figures = {**arrays, 'logprobs': arrays['old_logprobs'], 'mask': mask}
      metrics |= _reference_metrics(figures, mask, kl_coef)
      if recipe.kl.reward_coef is not None:
        penalty = _penalty(recipe, estimator, figures, kl_coef)
        if 'mask' in asked(advantage):  # along tokens: each pays for itself
          arrays['penalties'] = penalty
        else:
          rewards = _penalized(rewards, penalty, mask)
    rollout = Rollout(
      tokens=tokens,
      valid=valid,
      mask=mask,
      rewards=rewards,
      truncated=samples.truncated,
      version=_versions(samples, tokens.shape[1]),
      turn_ids=jnp.zeros(tokens.shape, jnp.int32),
      arrays=arrays,
    )
    if recipe.sampling.carry_over is not None:
      signals = {**signals, 'where': _ended(advantage, mask, signals)}
    trained = _trained_tokens(recipe, rollout, informative)
    batch = assemble(
      rollout, advantage=advantage, whitening=whitening, returns=returns,
      trained=trained, signals=signals, shared=shared,
    )  # fmt: skip
    metrics |= _value_metrics(batch)
    return batch, metrics, columns | {'advantage': _mean_advantages(batch)}

  return prepare


def _values(
  recipe: Recipe, model: Model, critic: Network, params: dict[str, Params],
  rows: tuple,
) -> Any:  # fmt: skip
  """Values of the critic before its updates."""

  def of_slice(piece: tuple) -> Any:
    states = None
    if critic.trunk is not None:
      states = hidden_states(model, params['actor'], *piece)
    return token_values(
      critic.model, params['critic'], *piece, chunk_size=recipe.chunk_size,
      states=states,
    )  # fmt: skip

  slices = recipe.rl.num_score_slices
  return in_slices(of_slice, rows, slices, together(rows[-1]))


def _value_metrics(batch: Batch) -> Metrics:
  if 'returns' not in batch.arrays:
    return {}
  values, returns = batch.arrays['old_values'], batch.arrays['returns']
  explained = explained_variance(values, returns, batch.mask)
  return {
    'value/explained_variance': Mean(explained, jnp.float32(1)),
    'value/old': objectives.masked_mean(values, batch.mask),
    'value/returns': objectives.masked_mean(returns, batch.mask),
  }


def _ended(advantage: Callable, mask: Any, signals: dict[str, Any]) -> Any:
  """Which rewards count: the other completions are under way."""
  parts = signals['reward_parts']
  there = jnp.broadcast_to(
    mask.any(-1).reshape(*parts.shape[:2], 1), parts.shape
  )
  return there if 'reward_parts' in asked(advantage) else there[..., 0]


def _with_old(
  recipe: Recipe, score_rows: Callable[..., Scores], params: Params,
  samples: Samples, mask: Any,
) -> tuple[dict[str, Any], Metrics, dict[str, Any]]:  # fmt: skip
  """The sampler's log-probs, the learner's for the same tokens, their gap.

  Returns:
    Arrays of the batch, figures, and figures of each completion.
  """

  def behind(values: Any) -> Any:
    return jnp.pad(values, ((0, 0), (mask.shape[1] - values.shape[1], 0)))

  replay = recipe.routing.replay
  arrays = {'sampler_logprobs': behind(samples.sampler_logprobs)}
  plain = behind(samples.model_logprobs)
  if replay == 'sampler':
    arrays['experts'] = samples.experts
  if not recipe.rl.rescore:  # the update measures the gap
    return {**arrays, 'plain_logprobs': plain}, {}, {}
  scores = score_rows(
    params,
    experts=samples.experts if replay == 'sampler' else None,
    record_routing=replay == 'old' or samples.experts is not None,
  )
  arrays['old_logprobs'] = scores.logprobs
  if replay == 'old':
    arrays['experts'] = scores.experts
  gap = jnp.abs(scores.model_logprobs - plain)
  largest = jnp.where(mask, gap, 0).max(-1)
  metrics = _sampler_metrics(scores, samples, plain, mask)
  return arrays, metrics, {'logprob_gap': largest}


def _versions(samples: Samples, length: int) -> Any:
  """The iteration that drew each token, 0 on prompts."""
  version = samples.version
  if version is None:
    return jnp.zeros((len(samples.tokens), length), jnp.int32)
  return jnp.pad(version, ((0, 0), (length - version.shape[1], 0)))


def join_prompts(
  prompts: Any, prompt_mask: Any, samples: Samples
) -> tuple[Any, Any, Any]:
  """Put each completion behind its prompt: (tokens, valid, mask)."""
  num_samples = samples.tokens.shape[0] // prompts.shape[0]
  repeat = functools.partial(jnp.repeat, repeats=num_samples, axis=0)
  tokens = jnp.concatenate([repeat(prompts), samples.tokens], axis=1)
  valid = jnp.concatenate([repeat(prompt_mask), samples.mask], axis=1)
  mask = jnp.pad(samples.mask, ((0, 0), (prompts.shape[1], 0)))
  return tokens, valid, mask


def _sampler_metrics(
  scores: Scores, samples: Samples, plain: Any, mask: Any
) -> Metrics:
  """How sampler and learner differ, in log-probs and in routing."""
  metrics = objectives.sampler_gap(scores.model_logprobs, plain, mask)
  metrics['sampler/entropy'] = objectives.masked_mean(scores.entropy, mask)
  if samples.experts is not None and scores.experts is not None:
    moved = rerouted(samples.experts, scores.experts)
    known = (samples.experts >= 0).all((-2, -1))
    metrics['sampler/rerouted'] = objectives.masked_mean(moved, known)
  return metrics


def _reference(recipe: Recipe, ref_params: Params, actor: Params) -> Params:
  """The whole of its parameters, on the device."""
  if recipe.reference.memory == 'host':
    ref_params = sharding.fetched(ref_params)
  return rejoined(ref_params, bases(actor))


def _penalty(
  recipe: Recipe, estimator: Callable, figures: dict[str, Any], kl_coef: Any
) -> Any:
  """What each token pays."""
  coef = recipe.kl.reward_coef if kl_coef is None else kl_coef
  return coef * call_by_name(estimator, figures)


def _reference_metrics(
  figures: dict[str, Any], mask: Any, kl_coef: Any
) -> Metrics:
  k1 = jnp.where(mask, call_by_name(kl.k1, figures), 0)
  k3 = call_by_name(kl.k3, figures)
  sequences = mask.any(-1).sum(dtype=jnp.float32)
  root = jnp.sqrt(jnp.maximum(k1.sum() / jnp.maximum(sequences, 1), 0))
  metrics: Metrics = {
    'reference/kl_sequence': Mean(k1.sum(), sequences),
    'reference/kl_sequence_root': Mean(root, jnp.float32(1)),
    'reference/kl_token': objectives.masked_mean(k3, mask),
  }
  if kl_coef is not None:
    metrics['reference/kl_coef'] = Mean(kl_coef, jnp.float32(1))
  return metrics


def _penalized(rewards: Any, penalty: Any, mask: Any) -> Any:
  """Each reward less the penalties of its whole completion."""
  return shaping.kl_penalized(
    rewards.reshape(-1), penalty, mask, coef=1.0
  ).reshape(rewards.shape)


def _mean_advantages(batch: Batch) -> Any:
  """Of each completion, for the sample files."""
  lengths = jnp.maximum(batch.mask.sum(-1, dtype=jnp.float32), 1)
  return batch.arrays['advantages'].sum(-1) / lengths


def _trained_tokens(recipe: Recipe, rollout: Rollout, informative: Any) -> Any:
  """Which tokens the policy term trains on."""
  trained = rollout.mask
  if recipe.filter.overlong == 'mask':
    trained = trained & masks.overlong(rollout.mask, rollout.truncated)
  if recipe.filter.informative_only:
    rows = jnp.repeat(informative.reshape(-1), rollout.rewards.shape[1])
    trained = trained & rows[:, None]
  return trained
