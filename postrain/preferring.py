"""The stage on preferences as pure functions, bound from a recipe.

One step is an objective on pairs, rankings or single completions, with what
the loss asks for: the log-probs of the reference, the reference point of KTO.
"""

from collections.abc import Callable, Mapping
import inspect
from typing import Any, NamedTuple

import jax
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
from postrain.types import Batch, Metrics, Model, Objective, Params

# The arrays that losses may ask for: of what learns, and of what data.
AVAILABLE = {
  ('policy', 'pairs'): {
    *('chosen', 'rejected', 'ref_chosen', 'ref_rejected'),
    *('chosen_lengths', 'rejected_lengths'),
  },
  ('policy', 'unpaired'): {
    *('logprobs', 'ref_logprobs', 'desirable', 'reference_point'),
  },
  ('reward_model', 'pairs'): {'chosen', 'rejected', 'margins'},
  ('reward_model', 'rankings'): {'rewards', 'ranks', 'where'},
  ('reward_model', 'unpaired'): {'scores', 'labels'},
}


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
    uses_reference: whether the loss reads the reference.
  """

  prefer: Callable[..., tuple[Any, Metrics]]
  judge: Callable[..., Any]
  optimizer: optax.GradientTransformation
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
    return step(state, {}, weigh_units(batch, sft_aggregation=sft))

  return Preferring(
    prefer=prefer,
    judge=_make_judge(recipe, model, loss),
    optimizer=optimizer,
    uses_reference=uses_reference(loss),
  )


def comparisons(recipe: Recipe, environment: Environment) -> Comparisons:
  """The preferences that the stage learns from.

  Raises:
    ValueError: the environment has none, or they are none of this kind.
  """
  if environment.preferences is None:
    raise ValueError(
      f'preference.num_steps={recipe.preference.num_steps}, but environment'
      f' {recipe.environment["name"]!r} has no preferences: take a task with'
      ' the reward gold or name their file (environment.preferences of texts),'
      ' or set preference.num_steps=0'
    )
  return environment.preferences(recipe.preference.data)


def check_preference(
  recipe: Recipe, environment: Environment, model: Model
) -> None:
  """Refuse what cannot be learnt from, or not with this loss or model.

  Raises:
    ValueError: names what does not fit and what would.
  """
  _check_loss(recipe)
  _check_coefs(recipe)
  held_out = comparisons(recipe, environment).held_out
  if recipe.evaluation.every and held_out is None:
    raise ValueError(
      f'evaluation.every={recipe.evaluation.every} of a run on preferences,'
      ' but none are held out: name their file, or set evaluation.every=0'
    )
  _check_model(recipe, model)


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
    return score(
      model, params, batch.tokens, batch.valid, batch.mask,
      chunk_size=recipe.chunk_size,
    ).logprobs  # fmt: skip

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
