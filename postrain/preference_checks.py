"""What cannot be learnt from preferences is an error before any compilation."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from postrain import losses
from postrain.batches import asked
from postrain.binding import bind
from postrain.environments import Environment
from postrain.preferring import comparisons, uses_reference
from postrain.recipe import Recipe
from postrain.types import Model

# The arrays that losses may ask for: of what learns, and of what data.
AVAILABLE = {
  ('policy', 'pairs'): {
    *('chosen', 'rejected', 'ref_chosen', 'ref_rejected'),
    *('chosen_lengths', 'rejected_lengths', 'preference'),
  },
  ('policy', 'unpaired'): {
    *('logprobs', 'ref_logprobs', 'desirable', 'reference_point'),
  },
  ('reward_model', 'pairs'): {'chosen', 'rejected', 'margins', 'preference'},
  ('reward_model', 'rankings'): {'rewards', 'ranks', 'where'},
  ('reward_model', 'unpaired'): {'scores', 'labels'},
}


def check_preference(
  recipe: Recipe, environment: Environment, model: Model
) -> None:
  """Refuse what cannot be learnt from, or not with this loss or model.

  Raises:
    ValueError: names what does not fit and what would.
  """
  _check_source(recipe, environment)
  _check_loss(recipe)
  _check_coefs(recipe)
  given = recipe.preference.source == 'dataset'
  known = comparisons(recipe, environment)
  _check_labels(recipe, 'preference' in known.dtypes)
  if recipe.evaluation.every and known.held_out is None and given:
    raise ValueError(
      f'evaluation.every={recipe.evaluation.every} of a run on preferences,'
      ' but none are held out: name their file, or set evaluation.every=0'
    )
  _check_model(recipe, model)


def _check_source(recipe: Recipe, environment: Environment) -> None:
  """Refuse pairs that nobody could write, or nobody put in order."""
  choices = recipe.preference
  loss, source = bind(losses, choices.loss), choices.source
  refers, plays = uses_reference(loss), source == 'self_play'
  if choices.reference_every is not None and not refers:
    raise ValueError(
      f'preference.reference_every={choices.reference_every}, but loss'
      f' {choices.loss["name"]!r} reads no reference: set it to None'
    )
  _check_cached(recipe)
  if source == 'dataset':
    return
  kind = (choices.learns, choices.data)
  numbered, rated = choices.num_examples is not None, None
  if source == 'raters':
    rated = comparisons(recipe, environment).compare
  for wrong, why in (
    (
      kind != ('policy', 'pairs'),
      f'.learns={kind[0]!r} and .data={kind[1]!r}: the policy writes pairs and'
      " learns from them; set 'policy' and 'pairs'",
    ),
    (
      numbered and not plays,
      f'.num_examples={choices.num_examples}: prompts are those of the'
      ' environment; set it to None',
    ),
    (
      source == 'raters' and rated is None,
      f'environment {recipe.environment["name"]!r}, which has no raters: take a'
      " task with the reward gold, or source='rewards'",
    ),
    (
      plays and environment.demonstrations is None,
      f'environment {recipe.environment["name"]!r}, which has no'
      " demonstrations: name their field, or take source='rewards'",
    ),
    (
      plays and not refers,
      f'loss {choices.loss["name"]!r}, which reads no reference: the reference'
      " writes what is rejected; take one that does, 'dpo'",
    ),
  ):
    if wrong:
      raise ValueError(f'preference.source={source!r} with {why}')


def _check_cached(recipe: Recipe) -> None:
  """A table has a row for each of so many units, and one reference."""
  choices = recipe.preference
  if choices.ref_logprobs == 'live':
    return
  task = recipe.environment['name'] == 'task'
  loss, name = bind(losses, choices.loss), choices.loss['name']
  for wrong, why in (
    (not uses_reference(loss), f'loss {name!r}, which reads no reference'),
    (
      'reference_point' in asked(loss),
      f'loss {name!r}, whose reference point is of other completions too',
    ),
    (
      choices.source != 'dataset',
      f'.source={choices.source!r}, whose units are new at each step',
    ),
    (
      choices.reference_every is not None,
      f'.reference_every={choices.reference_every}: it has one reference',
    ),
    (
      task and choices.num_examples is None,
      '.num_examples=None, whose units are new at each step: set a number',
    ),
  ):
    if wrong:
      raise ValueError(
        f"preference.ref_logprobs='cached' with {why}; or take 'live'"
      )


def _check_loss(recipe: Recipe) -> None:
  choices = recipe.preference
  loss, name = bind(losses, choices.loss), choices.loss['name']
  chosen = f'preference.learns={choices.learns!r} and .data={choices.data!r}'
  given = AVAILABLE.get((choices.learns, choices.data))
  if given is None:
    raise ValueError(
      f'{chosen}: a policy learns from pairs or single completions; set .data,'
      " or .learns='reward_model'"
    )
  empty = inspect.Parameter.empty
  needed = {k for k, default in asked(loss).items() if default is empty}
  scores = loss.func.__module__ == 'postrain.losses.reward_models'
  ours = loss.func.__module__.startswith('postrain.')
  if not needed <= given or (ours and scores != (choices.learns != 'policy')):
    fitting = [
      f'{learns!r} and {kind!r}'
      for (learns, kind), names in AVAILABLE.items()
      if needed <= names and scores == (learns != 'policy')
    ]
    raise ValueError(
      f'preference.loss {name!r} asks for {", ".join(sorted(needed))}, which is'
      f' not what {chosen} have; it fits {" or ".join(fitting) or "neither"}'
    )
  if 'reference_point' in needed and choices.batch_size == 1:
    raise ValueError(
      f'preference.batch_size=1 with loss {name!r}: its reference point is'
      ' measured on completions of other prompts; take at least 2'
    )
  if name == 'aot' and choices.num_micro_batches > 1:
    raise ValueError(
      f'preference.num_micro_batches={choices.num_micro_batches} with loss'
      " 'aot', which sorts the whole batch: set it to 1"
    )


def _check_labels(recipe: Recipe, soft: bool) -> None:
  """Soft labels go where they mean something, and are there if asked for."""
  block = recipe.preference.loss
  loss, name = bind(losses, block), block['name']
  if soft and name == 'aot':
    raise ValueError(
      "preference.loss 'aot' with pairs that have a preference: it sorts pairs"
      ' whose order is certain; remove the field, or take another loss'
    )
  needed = asked(loss).get('preference') is inspect.Parameter.empty
  if needed and not soft:
    raise ValueError(
      f'preference.loss {name!r} asks for preference, which the pairs lack:'
      ' give each row the field, or take a loss of certain labels'
    )


def _check_coefs(recipe: Recipe) -> None:
  choices = recipe.preference
  likelihood = (choices.learns, choices.data) == ('policy', 'pairs')
  centred = (choices.learns, choices.data) == ('reward_model', 'pairs')
  for field, value, fits, needed in (
    ('sft_coef', choices.sft_coef, likelihood, 'a policy on pairs'),
    ('centering_coef', choices.centering_coef, centred, 'scores of pairs'),
  ):
    if value is not None and not fits:
      raise ValueError(
        f'preference.{field}={value} with preference.learns='
        f'{choices.learns!r} and .data={choices.data!r}: it is for {needed};'
        ' set it to None'
      )


def _check_model(recipe: Recipe, model: Model) -> None:
  """A policy has logits of words, a reward model one or two of labels."""
  choices = recipe.preference
  width = _width(model)
  if choices.learns == 'policy':
    if width != model.vocab_size:
      raise ValueError(
        f"preference.learns='policy', but the model gives {width} numbers a"
        f' position, not {model.vocab_size} logits: set model.head to'
        " 'language_model', or .learns='reward_model'"
      )
    return
  if width > 2:
    raise ValueError(
      f"preference.learns='reward_model', but the model gives {width} numbers a"
      " position: set model.head='sequence_labels' and model.num_labels=1"
    )
  for field, value in (
    ('sft.num_steps', recipe.sft.num_steps),
    ('rl.num_iterations', recipe.rl.num_iterations),
  ):
    if value:
      raise ValueError(
        f"{field}={value} with preference.learns='reward_model': a model that"
        ' scores writes nothing; set it to 0, and give the export to a run of'
        ' its own'
      )


def _width(model: Model) -> int:
  """Numbers that a model gives for each position."""

  def logits() -> Any:  # all of it traced: nothing is compiled for an error
    params = model.init(jax.random.key(0))
    blank = jnp.zeros((1, 1), jnp.int32)
    states, _ = model.hidden(
      params, blank, positions=blank, segment_ids=blank + 1
    )
    return model.unembed(params, states)

  return jax.eval_shape(logits).shape[-1]
