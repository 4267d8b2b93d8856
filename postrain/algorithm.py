"""The pure functions of a run, bound from its recipe.

The trainer and the device loop are two ways to call the same four: sample,
prepare, update, imitate.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from postrain import (
  aggregation,
  critics,
  importance,
  kl,
  losses,
  masks,
  objectives,
  optimizers,
)
from postrain.batches import asked, reweigh, take
from postrain.binding import bind
from postrain.control import make_control, make_move_reference, make_stop
from postrain.couplings import (
  with_array,
  with_expert_shares,
  with_selection,
)
from postrain.drawing import make_extend, make_sample, make_write
from postrain.preferring import Preferring, make_preferring
from postrain.preparation import bind_advantage, make_prepare, uses_reference
from postrain.recipe import Block, Recipe
from postrain.train_step import accumulate, make_train_step
from postrain.types import (
  Batch,
  Mean,
  Metrics,
  Model,
  Packing,
  Params,
  Samples,
  Sum,
)


class Algorithm(NamedTuple):
  """What a run does, as functions of arrays.

  Attributes:
    sample: (params, prompts, prompt_mask, key, prompt_ids) -> Samples.
    extend: (params, prompts, prompt_mask, key, prompt_ids, samples, version) ->
      Samples, for as many tokens as an iteration gives; None unless what has
      not ended is carried over.
    greedy: as ``sample``, one greedy completion of each prompt; None unless the
      advantage asks for their rewards, ``baselines``.
    prepare: (params, ref_params, prompts, prompt_mask, samples, rewards,
      signals, packing=None, kl_coef=None) -> (Batch, Metrics, columns): scores,
      KL in the reward, advantages, and figures of each completion. The
      ``signals`` are those of `postrain.batches.assemble`; the packing is that
      of the scores.
    update: (state, batch, rows, key, demonstrations=None, packing=None) ->
      (state, Metrics): one optimiser step on the minibatch of ``rows``, so
      packed; the key is for masks that draw, and the demonstrations (tokens,
      valid, mask) are for `schema.Ptx`.
    imitate: (state, tokens, valid, mask, packing=None) -> (state, Metrics): one
      supervised step.
    write: (params, ref_params, prompts, prompt_mask, key, prompt_ids) ->
      Samples that the stage on preferences compares; None where they are given.
    control: (kl_coef, reference/kl_sequence of `prepare`) -> kl_coef of the
      next iteration; None where it is fixed.
    move_reference: (ref_params, params, iteration) -> ref_params.
    rl_optimizer, sft_optimizer: their gradient transformations.
    uses_reference: whether anything reads the reference.
    critic: its network, if there is one; ``params`` have it in the online
      stage.
    preferring: the stage on preferences, None where it has no steps.
  """

  sample: Callable[..., Samples]
  extend: Callable[..., Samples] | None
  greedy: Callable[..., Samples] | None
  prepare: Callable[..., tuple[Batch, Metrics, dict[str, Any]]]
  update: Callable[..., tuple[Any, Metrics]]
  imitate: Callable[..., tuple[Any, Metrics]]
  write: Callable[..., Samples] | None
  control: Callable[..., Any] | None
  move_reference: Callable[..., Params]
  rl_optimizer: optax.GradientTransformation
  sft_optimizer: optax.GradientTransformation
  uses_reference: bool
  critic: critics.Network | None = None
  preferring: Preferring | None = None


def make_algorithm(
  recipe: Recipe, model: Model, *, pad_id: int, stop_ids: tuple[int, ...],
  prompt_length: int = 0,
) -> Algorithm:  # fmt: skip
  """Bind every choice of a recipe; all errors of naming appear here.

  Args:
    recipe: of the run.
    model: that learns.
    pad_id: fills unused slots.
    stop_ids: end a completion.
    prompt_length: slots of prompts, which losses of single completions read.
  """
  estimator = bind(kl, recipe.kl.estimator)
  advantage = bind_advantage(recipe)
  rl_optimizer = bind(optimizers, recipe.rl.optimizer)()
  critic = None
  if recipe.critic.network is not None:
    critic = bind(critics, recipe.critic.network)(model, recipe.seed)
    of_critic = bind(optimizers, recipe.critic.optimizer)()
    # Nothing, not a norm that clips, is of both.
    roles: dict[Any, Any] = {'actor': rl_optimizer, 'critic': of_critic}
    rl_optimizer = optax.partition(roles, {role: role for role in roles})
  sft_optimizer = bind(optimizers, recipe.sft.optimizer)()
  greedy = make_sample(recipe, model, pad_id, stop_ids, greedy=True)
  return Algorithm(
    sample=make_sample(recipe, model, pad_id, stop_ids),
    extend=make_extend(recipe, model, stop_ids),
    greedy=greedy if 'baselines' in asked(advantage) else None,
    prepare=make_prepare(recipe, model, estimator, advantage, critic),
    update=_make_update(recipe, model, rl_optimizer, critic),
    imitate=_make_imitate(recipe, model, sft_optimizer),
    write=make_write(recipe, model, pad_id, stop_ids),
    control=make_control(recipe),
    move_reference=make_move_reference(recipe),
    rl_optimizer=rl_optimizer,
    sft_optimizer=sft_optimizer,
    uses_reference=uses_reference(recipe),
    critic=critic,
    preferring=make_preferring(recipe, model, prompt_length=prompt_length)
    if recipe.preference.num_steps
    else None,
  )


def _make_update(
  recipe: Recipe, model: Model, optimizer: optax.GradientTransformation,
  critic: critics.Network | None,
) -> Callable[..., tuple[Any, Metrics]]:  # fmt: skip
  weigh = functools.partial(
    reweigh,
    aggregation=bind(aggregation, recipe.aggregation),
    kl_aggregation=_optional(aggregation, recipe.kl.aggregation),
    correction=_optional(importance, recipe.correction),
  )
  loss = bind(losses, recipe.loss)
  kl_coef, controlled = recipe.kl.loss_coef, recipe.kl.controller is not None
  if kl_coef is not None and controlled:
    kl_coef = 1.0  # the weights hold the one that moves
  objective = objectives.policy_gradient(
    model,
    loss=loss,
    kl=bind(kl, recipe.kl.estimator),
    kl_coef=kl_coef,
    entropy_coef=recipe.entropy_coef,
    value_loss=bind(losses, recipe.critic.loss),
    value_coef=None if critic is None else recipe.critic.coef,
    critic=critic and critic.model,
    trunk=critic and critic.trunk,
    balance_coef=recipe.routing.balance_coef,
    temperature=recipe.sampling.temperature,
    chunk_size=recipe.chunk_size,
  )
  rl_step = make_train_step(
    objective,
    optimizer,
    num_micro_batches=recipe.rl.num_micro_batches,
    stop=make_stop(recipe),
    beside=_make_ptx(recipe, model),
  )
  select = _make_select(recipe, model, restricts='selected' not in asked(loss))
  measure = _make_measure(recipe, model, recipe.rl.num_micro_batches)

  def update(
    state: Any, batch: Batch, rows: Any, key: Any,
    demonstrations: Any = None, packing: Packing | None = None,
  ) -> tuple[Any, Metrics]:  # fmt: skip
    if recipe.rl.num_minibatches > 1:  # a gather would move rows of one too
      batch = take(batch, rows)
    if packing is not None:
      batch = dataclasses.replace(batch, packing=packing)
    batch = select(state.params['actor'], batch, key)
    batch = measure(state.params['actor'], batch)
    batch = weigh(batch)
    if controlled:
      weights = batch.weights
      weights = {**weights, 'kl': weights['kl'] * state.kl_coef}
      batch = dataclasses.replace(batch, weights=weights)
    state, metrics = rl_step(state, {}, batch, demonstrations)
    return state, metrics | _fill(packing)

  return update


def _make_ptx(recipe: Recipe, model: Model) -> Callable | None:
  """Make (params, demonstrations) -> the gradient of their term, figures."""
  coef, num_micro_batches = recipe.ptx.coef, recipe.ptx.num_micro_batches
  if coef is None:
    return None
  likelihood = objectives.supervised(
    model, loss=losses.negative_log_likelihood, chunk_size=recipe.chunk_size
  )

  def term(params: Params, frozen: Any, batch: Batch) -> tuple[Any, Metrics]:
    total, figures = likelihood(params, frozen, batch)
    total = coef * total
    fixed = jax.lax.stop_gradient(total)
    return total, {'loss/ptx': figures['loss'], 'loss': Sum(fixed)}

  def beside(params: Params, demonstrations: Any) -> tuple[Any, Metrics]:
    tokens, valid, mask = demonstrations
    weights = {'policy': aggregation.token_mean(mask)}
    batch = Batch(tokens, valid, mask, weights, {})
    return accumulate(term, params, {}, batch, num_micro_batches)

  return beside


def _make_imitate(
  recipe: Recipe, model: Model, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, Metrics]]:
  sft_step = make_train_step(
    objectives.supervised(
      model,
      loss=losses.negative_log_likelihood,
      balance_coef=recipe.routing.balance_coef,
      chunk_size=recipe.chunk_size,
    ),
    optimizer,
    num_micro_batches=recipe.sft.num_micro_batches,
  )
  measure = _make_measure(recipe, model, recipe.sft.num_micro_batches)

  def imitate(
    state: Any, tokens: Any, valid: Any, mask: Any,
    packing: Packing | None = None,
  ) -> tuple[Any, Metrics]:  # fmt: skip
    weights = {
      'policy': aggregation.token_mean(mask),
      'balance': aggregation.token_mean(valid),
    }
    batch = Batch(tokens, valid, mask, weights, {}, packing)
    batch = measure(state.params['actor'], batch)
    state, metrics = sft_step(state, {}, batch)
    return state, metrics | _fill(packing)

  return imitate


def _fill(packing: Packing | None) -> Metrics:
  """The share of packed slots that hold a token."""
  if packing is None:
    return {}
  full = packing.segment_ids > 0
  return {
    'update/fill': Mean(full.sum(dtype=jnp.float32), jnp.float32(full.size))
  }


def _optional(module: Any, block: Block | None) -> Callable | None:
  return None if block is None else bind(module, block)


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


def _make_measure(
  recipe: Recipe, model: Model, num_slices: int
) -> Callable[[Params, Batch], Batch]:
  """The experts' load over the minibatch, where the loss of balance asks."""
  choices = recipe.routing
  if choices.balance_coef is None or choices.balance_over == 'sequence':
    return lambda params, batch: batch
  return functools.partial(with_expert_shares, model, num_slices=num_slices)
