"""The stage on preferences as pure functions, bound from a recipe.

One step is an objective on pairs, rankings or single completions, with what
the loss asks for: the log-probs of the reference, the reference point of KTO.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from postrain import aggregation, losses, objectives, optimizers
from postrain.adapted import bases, rejoined
from postrain.batches import asked, call_by_name, mismatched, weigh_units
from postrain.binding import bind
from postrain.couplings import with_array, with_reference_point
from postrain.environments import Comparisons, Environment
from postrain.recipe import Recipe
from postrain.reward_models import completion_objective, completion_scores
from postrain.scoring import score
from postrain.train_step import make_train_step
from postrain.types import Batch, Mean, Metrics, Model, Objective, Params


class Preferring(NamedTuple):
  """What the stage on preferences does, as functions of arrays.

  Attributes:
    prefer: (state, reference, tokens, valid, mask, arrays) -> (state,
      Metrics): one optimiser step on `postrain.environments.Units`. The
      reference may be None where ``arrays`` hold ``ref_logprobs``, or nothing
      reads them.
    judge: (params, reference, tokens, valid, mask, arrays) -> [N] by how much
      the model prefers the chosen of pairs: the logit of its chance.
    optimizer: its gradient transformation.
    refer: (reference, tokens, valid, mask) -> [B T], its log-probs.
    uses_reference: whether its steps read the reference.
  """

  prefer: Callable[..., tuple[Any, Metrics]]
  judge: Callable[..., Any]
  optimizer: optax.GradientTransformation
  refer: Callable[..., Any]
  uses_reference: bool


def make_preferring(
  recipe: Recipe, model: Model, *, prompt_length: int
) -> Preferring:
  """Bind the choices of the stage; all errors of naming appear here.

  Args:
    recipe: of the run.
    model: that learns, of the role ``actor`` of a state: a policy, or one with
      a head that scores.
    prompt_length: slots of the prompts of single completions.
  """
  choices = recipe.preference
  loss = bind(losses, choices.loss)
  optimizer = bind(optimizers, choices.optimizer)()
  step = make_train_step(
    _make_objective(recipe, model, loss),
    optimizer,
    num_micro_batches=choices.num_micro_batches,
  )
  refer = _make_refer(recipe, model, loss, prompt_length)
  sft = aggregation.token_mean if choices.sft_coef is not None else None

  def prefer(
    state: Any, reference: Params | None, tokens: Any, valid: Any, mask: Any,
    arrays: Mapping[str, Any],
  ) -> tuple[Any, Metrics]:  # fmt: skip
    batch = Batch(
      tokens, valid, mask, {}, dict(arrays),
      unit_size=len(tokens) // choices.batch_size,
    )  # fmt: skip
    if 'desirable' in arrays:
      labels = arrays['desirable'].astype(jnp.float32)
      batch = with_array(batch, 'labels', labels)
    batch = refer(state.params['actor'], reference, batch)
    state, told = step(state, {}, weigh_units(batch, sft_aggregation=sft))
    if choices.source in ('raters', 'rewards'):
      told = {**told, 'preference/untied': _untied(batch)}
    return state, told

  return Preferring(
    prefer=prefer,
    judge=_make_judge(recipe, model, loss),
    optimizer=optimizer,
    refer=functools.partial(_scored, recipe, model),
    uses_reference=uses_reference(loss) and choices.ref_logprobs == 'live',
  )


def _scored(
  recipe: Recipe, model: Model, params: Params, tokens: Any, valid: Any,
  mask: Any,
) -> Any:  # fmt: skip
  """The log-probs of tokens."""
  return score(
    model, params, tokens, valid, mask, chunk_size=recipe.chunk_size
  ).logprobs


def _untied(batch: Batch) -> Mean:
  """The share of pairs that somebody put in order."""
  full = batch.mask[::2].any(-1)
  return Mean(full.sum(dtype=jnp.float32), jnp.float32(len(full)))


def comparisons(recipe: Recipe, environment: Environment) -> Comparisons:
  """The preferences that the stage learns from.

  Raises:
    ValueError: the environment has none, or they are none of this kind.
  """
  if recipe.preference.source != 'dataset':
    return _written(recipe, environment)
  if environment.preferences is None:
    raise ValueError(
      f'preference.num_steps={recipe.preference.num_steps}, but environment'
      f' {recipe.environment["name"]!r} has no preferences: take a task with'
      ' the reward gold or name their file (environment.preferences of texts),'
      ' or set preference.num_steps=0'
    )
  return environment.preferences(recipe.preference.data)


def _written(recipe: Recipe, environment: Environment) -> Comparisons:
  """Pairs that the policy writes, so far as they are known before."""
  length = environment.prompt_length + recipe.sampling.max_new_tokens
  known = environment.preferences and environment.preferences('pairs')
  raters = recipe.preference.source == 'raters'
  return Comparisons(
    unit_size=2,
    length=length,
    dtypes={},
    units=None,
    lengths=lambda *_: {length},
    held_out=known.held_out if known else None,
    compare=known.compare if known and raters else None,
  )


def uses_reference(loss: Callable) -> bool:
  """Whether a loss asks for log-probs of the reference."""
  return any(name.startswith('ref_') for name in asked(loss))


def _make_objective(recipe: Recipe, model: Model, loss: Callable) -> Objective:
  choices = recipe.preference
  if choices.learns == 'reward_model':
    scores = completion_objective(
      model, loss=loss, centering_coef=choices.centering_coef
    )
    return lambda params, frozen, batch: scores(
      {'reward_model': params['actor']}, frozen, batch
    )
  if choices.data == 'unpaired':
    return objectives.unpaired(model, loss=loss, chunk_size=recipe.chunk_size)
  return objectives.preference(
    model, loss=loss, sft_coef=choices.sft_coef, chunk_size=recipe.chunk_size
  )


def _make_refer(
  recipe: Recipe, model: Model, loss: Callable, prompt_length: int
) -> Callable[[Params, Params | None, Batch], Batch]:
  """What the loss reads of the reference, unless the batch has it."""
  slices: Any = dict(
    chunk_size=recipe.chunk_size,
    num_slices=recipe.preference.num_micro_batches,
  )

  def referred(reference: Params, batch: Batch) -> Batch:
    scores = score(
      model, reference, batch.tokens, batch.valid, batch.mask, **slices
    )
    return with_array(batch, 'ref_logprobs', scores.logprobs)

  def refer(params: Params, reference: Params | None, batch: Batch) -> Batch:
    if not uses_reference(loss) or 'ref_logprobs' in batch.arrays:
      return batch
    reference = rejoined(reference, bases(params))
    if 'reference_point' in asked(loss):
      other = mismatched(batch, prompt_length=prompt_length)
      batch = with_reference_point(
        model, params, batch, referred(reference, other), **slices
      )
    return referred(reference, batch)

  return refer


def _make_judge(recipe: Recipe, model: Model, loss: Callable) -> Callable:
  """By how much the chosen of held-out pairs are preferred."""

  def scored(params: Params, batch: Batch) -> Any:
    rows = (batch.tokens, batch.valid, batch.mask)
    return _scored(recipe, model, params, *rows)

  def judge(
    params: Params, reference: Params | None, tokens: Any, valid: Any,
    mask: Any, arrays: Mapping[str, Any],
  ) -> Any:  # fmt: skip
    if recipe.preference.learns == 'reward_model':
      scores = completion_scores(model, params['actor'], tokens, valid)
      return scores[::2] - scores[1::2]
    batch = Batch(tokens, valid, mask, {}, dict(arrays), unit_size=2)
    if uses_reference(loss) and 'ref_logprobs' not in arrays:
      of_reference = rejoined(reference, bases(params['actor']))
      batch = with_array(batch, 'ref_logprobs', scored(of_reference, batch))
    return _margins(recipe, loss, scored(params['actor'], batch), batch)

  return judge


def _margins(
  recipe: Recipe, loss: Callable, logprobs: Any, batch: Batch
) -> Any:
  """The difference of what a loss calls the rewards of a pair."""
  if recipe.preference.data != 'unpaired':
    _, figures = call_by_name(loss, objectives.pair_arrays(logprobs, batch))
    return figures['margin']
  rows = {'logprobs': logprobs, 'ref_logprobs': batch.arrays['ref_logprobs']}
  arrays = {k: jnp.where(batch.mask, v, 0).sum(-1) for k, v in rows.items()}
  arrays['desirable'] = jnp.ones(len(batch.tokens), bool)
  arrays['reference_point'] = jnp.zeros((), jnp.float32)
  _, figures = call_by_name(loss, arrays)
  return figures['reward'][::2] - figures['reward'][1::2]
