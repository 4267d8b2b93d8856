"""What would be silently wrong is an error of the assembly."""

import inspect
from typing import Any

import numpy as np

from postrain import advantages
from postrain.binding import bind
from postrain.critics import check_critic
from postrain.environments import Environment
from postrain.mesh_checks import check_mesh, num_row_shards
from postrain.preference_checks import check_preference
from postrain.preferring import comparisons
from postrain.preparation import uses_reference
from postrain.recipe import Recipe
from postrain.types import Model, Samples


def check_assembly(
  recipe: Recipe, environment: Environment, model: Model
) -> None:
  """Hold the parts of a run against each other, before any compilation.

  Raises:
    ValueError: names what does not fit and what would.
  """
  if environment.vocab_size > model.vocab_size:
    raise ValueError(
      f'the tokenizer has {environment.vocab_size} ids, the embedding'
      f' {model.vocab_size} rows: ids beyond it have no embedding; take the'
      " checkpoint's own tokenizer"
    )
  if environment.pad_id in environment.stop_ids:
    raise ValueError(
      f'pad id {environment.pad_id} is also a stop id: the last token of every'
      ' completion would be masked; give the tokenizer a pad token of its own'
    )
  _check_demonstrations(recipe, environment)
  if recipe.preference.num_steps:
    check_preference(recipe, environment, model)
  if recipe.filter.overlong == 'mask' and not environment.stop_ids:
    raise ValueError(
      "filter.overlong='mask', but no token ends a completion: every one would"
      " count as truncated and nothing would train; set it to 'keep'"
    )
  if not model.num_experts:
    _check_dense(recipe)
  reads = recipe.rl.num_iterations and uses_reference(recipe)
  if recipe.reference.memory == 'host' and not reads:
    raise ValueError(
      "reference.memory='host', but nothing reads a reference: set kl.loss_coef"
      " or kl.reward_coef, or leave it 'device'"
    )
  check_mesh(recipe, environment, model)
  shards = num_row_shards(recipe)
  if recipe.rl.num_iterations:
    _check_online(recipe, shards)
  _check_rows(recipe, environment)
  if recipe.sft.num_steps:
    micro = recipe.sft.batch_size // recipe.sft.num_micro_batches
    _check_shards('rows of an sft micro-batch', micro, shards)
  if recipe.preference.num_steps:
    choices = recipe.preference
    micro = choices.batch_size // choices.num_micro_batches
    _check_shards('units of a preference micro-batch', micro, shards)


def _check_demonstrations(recipe: Recipe, environment: Environment) -> None:
  if environment.demonstrations is not None:
    return
  for field, value, without in (
    ('sft.num_steps', recipe.sft.num_steps or None, 0),
    ('ptx.coef', recipe.ptx.coef, None),
  ):
    if value is not None:
      raise ValueError(
        f'{field}={value}, but environment {recipe.environment["name"]!r} has'
        ' no demonstrations: name their field (environment.completion of'
        f' texts), or set {field}={without}'
      )


def _check_online(recipe: Recipe, shards: int) -> None:
  _check_groups(recipe)
  _check_kl(recipe)
  _check_controller(recipe)
  check_critic(recipe)
  _check_rescoring(recipe)
  _check_versions(recipe)
  _check_growth(recipe)
  rows = recipe.rl.num_prompts * recipe.sampling.num_samples
  micro = rows // recipe.rl.num_minibatches // recipe.rl.num_micro_batches
  part = recipe.rl.num_prompts // recipe.sampling.num_parts
  _check_shards('prompts of a part of a rollout', part, shards)
  _check_slots(recipe, shards)
  _check_shards('rows of an rl micro-batch', micro, shards)
  if (ptx := recipe.ptx).coef is not None:
    micro_ptx = ptx.batch_size // ptx.num_micro_batches
    _check_shards('rows of a ptx micro-batch', micro_ptx, shards)
  if recipe.rl.share_prompts:
    micro //= recipe.sampling.num_samples
    _check_shards('prompts of an rl micro-batch', micro, shards)


def check_lengths(
  recipe: Recipe, environment: Environment, max_length: int | None
) -> None:
  """Refuse sequences longer than the ``max_length`` positions of the model."""
  longest = {}
  samples = recipe.preference.learns == 'policy'
  if recipe.rl.num_iterations or (recipe.evaluation.every and samples):
    length = environment.prompt_length + recipe.sampling.max_new_tokens
    longest['a prompt with sampling.max_new_tokens'] = length
  if recipe.sft.num_steps or recipe.ptx.coef is not None:
    longest['a demonstration'] = environment.demonstration_length
  if recipe.preference.num_steps:
    length = comparisons(recipe, environment).length
    longest['a completion of the preferences'] = length
  for name, length in longest.items():
    if max_length is not None and length > max_length:
      raise ValueError(
        f'{name} has up to {length} tokens, the model {max_length} positions:'
        ' shorten prompts or completions, or raise its max_length'
      )


def _check_dense(recipe: Recipe) -> None:
  fields = {'record': False, 'replay': None, 'balance_coef': None}
  for field, unused in fields.items():
    value = getattr(recipe.routing, field)
    if value is not unused:
      raise ValueError(
        f'routing.{field}={value!r}, but model {recipe.model["name"]!r} has no'
        f' experts: set it to {unused}, or take a mixture (model.num_experts)'
      )


def _check_groups(recipe: Recipe) -> None:
  group = recipe.sampling.num_samples
  advantage = bind(advantages, recipe.advantage).func
  compares = 'singleton' in inspect.signature(advantage).parameters
  if group == 1 and compares and 'singleton' not in recipe.advantage:
    raise ValueError(
      f'sampling.num_samples=1 with advantage {recipe.advantage["name"]!r}: a'
      ' group of one has nothing to compare with; take at least 2, or set'
      ' advantage.singleton'
    )


def _check_kl(recipe: Recipe) -> None:
  kl = recipe.kl
  if kl.estimator['name'] == 'k1' and kl.loss_coef is not None:
    raise ValueError(
      'kl.estimator k1 with kl.loss_coef: the expected gradient of k1 in the'
      ' loss is 0, it only adds noise; take k2 or k3 there, or kl.reward_coef'
    )


def _check_controller(recipe: Recipe) -> None:
  """One coefficient moves, from where it is set."""
  kl = recipe.kl
  coefs = (kl.reward_coef, kl.loss_coef)
  if kl.controller is None:
    return
  if sum(coef is not None for coef in coefs) != 1:
    raise ValueError(
      f'kl.controller={kl.controller} with kl.reward_coef={kl.reward_coef} and'
      f' kl.loss_coef={kl.loss_coef}: set one of them, where it begins, and the'
      ' other to None'
    )
  start = next(coef for coef in coefs if coef is not None)
  if isinstance(start, int | float) and start <= 0:
    raise ValueError(
      f'kl.controller={kl.controller} begins at the coefficient {start}, which'
      ' it multiplies: set it to a positive number'
    )


def _check_rescoring(recipe: Recipe) -> None:
  """Without old log-probs of their own, those of the one update are the old.

  The ratio is then 1 and its gradient that of the log-prob, as it is anyway in
  the first update after a rollout.
  """
  if recipe.rl.rescore:
    return
  replay = recipe.routing.replay
  reasons = {
    'rl.num_epochs': recipe.rl.num_epochs > 1,
    'rl.num_minibatches': recipe.rl.num_minibatches > 1,
    'kl.reward_coef': recipe.kl.reward_coef is not None,
    'correction': recipe.correction is not None,
    'critic.network': recipe.critic.network is not None,
    'kl.controller': recipe.kl.controller is not None,
    'rl.kl_stop': recipe.rl.kl_stop is not None,
    f'routing.replay={replay!r}': replay == 'old',
    **_versions(recipe),
  }
  if needing := [name for name, needs in reasons.items() if needs]:
    raise ValueError(
      f'rl.rescore=False with {", ".join(needing)}, which needs the log-probs'
      ' of the rollout before the update: set rl.rescore=True'
    )


def _versions(recipe: Recipe) -> dict[str, bool]:
  """What has an iteration train on tokens of earlier parameters."""
  carry_over, staleness = recipe.sampling.carry_over, recipe.rl.staleness
  return {
    f'sampling.carry_over={carry_over}': carry_over is not None,
    f'rl.staleness={staleness}': staleness > 0,
  }


def _check_versions(recipe: Recipe) -> None:
  """Refuse what needs whole rollouts, or all of it from one policy."""
  sampling, routing = recipe.sampling, recipe.routing
  chosen = [name for name, uses in _versions(recipe).items() if uses]
  carries = sampling.carry_over is not None
  minibatches = recipe.rl.num_minibatches
  reasons = (
    ('sampling.num_parts', sampling.num_parts, 1),
    ('filter.informative_only', recipe.filter.informative_only, False),
    ('routing.record', routing.record, False),
    (
      'routing.replay',
      'sampler' if routing.replay == 'sampler' else None,
      None,
    ),
    ('sampling.num_slots', sampling.num_slots if carries else None, None),
    # One of them might hold no group that has ended.
    ('rl.num_minibatches', minibatches if carries else 1, 1),
  )
  for field, value, needed in reasons:
    if chosen and value != needed:
      raise ValueError(
        f'{field}={value!r} with {" and ".join(chosen)}, whose tokens are not'
        f' of one rollout: set it to {needed}'
      )


def _check_rows(recipe: Recipe, environment: Environment) -> None:
  """Packed rows hold whole sequences, each with a prompt of its own."""
  rl, sft = recipe.rl, recipe.sft
  if rl.row_length is not None and rl.share_prompts:
    raise ValueError(
      f'rl.row_length={rl.row_length} with rl.share_prompts=True: a packed row'
      ' reads the prompt of each of its completions; set one to None or False'
    )
  completed = environment.prompt_length + recipe.sampling.max_new_tokens
  for field, width, longest in (
    ('rl', rl.num_iterations and rl.row_length, completed),
    ('sft', sft.num_steps and sft.row_length, environment.demonstration_length),
  ):
    if width and width < longest:
      raise ValueError(
        f'{field}.row_length={width}, but a sequence has up to {longest}'
        ' tokens: set it to that at least, or to None'
      )


def _check_shards(name: str, number: int, shards: int) -> None:
  if number % shards:
    raise ValueError(
      f'{name}: {number} do not divide over {shards} devices'
      ' (mesh.data x mesh.fsdp x mesh.expert): change the mesh or the batch'
    )


def _check_growth(recipe: Recipe) -> None:
  sampling = recipe.sampling
  for field in ('num_slots', 'carry_over'):
    value = getattr(sampling, field)
    if value is not None and sampling.num_cache_sizes > 1:
      raise ValueError(
        f'sampling.num_cache_sizes={sampling.num_cache_sizes} with sampling.'
        f'{field}={value}, whose cache does not grow: set it to 1'
      )


def _check_slots(recipe: Recipe, shards: int) -> None:
  """Each number of slots must divide over the devices that share a batch."""
  choices = recipe.sampling
  if choices.num_slots is None:
    return
  rows = recipe.rl.num_prompts * choices.num_samples
  for i in range(choices.num_halvings + 1):
    size = min(choices.num_slots, rows) >> i
    _check_shards(f'sampling.num_slots after {i} halvings', size, shards)


def check_completions(
  samples: Samples, environment: Environment, first: bool
) -> None:
  """Refuse a length limit that lets no completion end."""
  if first and environment.stop_ids and np.all(samples.truncated):
    raise ValueError(
      f'all {len(samples.truncated)} completions of the first rollout met the'
      f' limit of {samples.tokens.shape[1]} tokens without a stop token'
      f' {environment.stop_ids}: raise sampling.max_new_tokens, or train the'
      ' model to stop (sft.num_steps)'
    )


def check_rewards(rewards: dict[str, Any], num_rows: int) -> None:
  """Refuse rewards of the wrong number or not finite."""
  for label, values in rewards.items():
    if np.shape(values) != (num_rows,):
      raise ValueError(
        f'reward {label!r} has shape {np.shape(values)} for {num_rows}'
        ' completions: return one number each'
      )
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
      raise ValueError(
        f'reward {label!r} is {values[bad[0]]} for completion {bad[0]}:'
        ' return finite numbers'
      )
