"""From a config to a recipe, its numbers held against their ranges."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from postrain.binding import check_arguments
from postrain.schema import Block as Block
from postrain.schema import Evaluation, Recipe, Reinforcement, Sampling


def make_recipe(config: Any) -> Recipe:
  """Check a config against the schema and make its recipe.

  Raises:
    ValueError: a field is unknown, missing, ill-typed or out of its range.
  """
  recipe = _build(Recipe, plain(config), 'config')
  _check_ranges(recipe)
  return recipe


def plain(config: Any) -> Any:
  """Turn a ConfigDict, however nested, into dicts and tuples."""
  if hasattr(config, 'to_dict'):
    config = config.to_dict()
  if isinstance(config, Mapping):
    return {str(k): plain(v) for k, v in config.items()}
  if isinstance(config, list | tuple):
    return tuple(plain(v) for v in config)
  return config


def _build(schema: Any, given: Any, where: str) -> Any:
  if not isinstance(given, Mapping):
    raise ValueError(f'{where}={given!r}: expected a block of fields')
  check_arguments(schema, given, where)
  blocks = {
    f.name: _build(f.type, given[f.name], f'{where}.{f.name}')
    for f in dataclasses.fields(schema)
    if dataclasses.is_dataclass(f.type)
  }
  return schema(**{**given, **blocks})


def _check_ranges(recipe: Recipe) -> None:
  sampling, rl, sft = recipe.sampling, recipe.rl, recipe.sft
  _check_positive(recipe)
  _check_rewards(recipe)
  _check_evaluation(recipe.evaluation)
  if not 0 <= recipe.reference.decay <= 1:
    raise ValueError(
      f'reference.decay={recipe.reference.decay}: it must be in [0, 1]'
    )
  rows = rl.num_prompts * sampling.num_samples
  _check_divides('rl.num_minibatches', rl.num_minibatches, rows)
  _check_divides(
    'rl.num_micro_batches', rl.num_micro_batches, rows // rl.num_minibatches
  )
  _check_divides('rl.num_score_slices', rl.num_score_slices, rows)
  if rl.share_prompts:
    _check_groups(rl)
  _check_divides('sampling.num_parts', sampling.num_parts, rl.num_prompts)
  if sft.num_steps:
    _check_divides(
      'sft.num_micro_batches', sft.num_micro_batches, sft.batch_size
    )
  ptx = recipe.ptx
  if ptx.batch_size % ptx.num_micro_batches:
    raise ValueError(
      f'ptx.num_micro_batches={ptx.num_micro_batches} does not divide'
      f' ptx.batch_size={ptx.batch_size}: take a divisor'
    )
  preference = recipe.preference
  if preference.batch_size % preference.num_micro_batches:
    raise ValueError(
      f'preference.num_micro_batches={preference.num_micro_batches} does not'
      f' divide preference.batch_size={preference.batch_size}: take a divisor'
    )
  _check_sampling(sampling)
  if isinstance(rl.kl_stop, int | float) and rl.kl_stop <= 0:
    raise ValueError(
      f'rl.kl_stop={rl.kl_stop}: no update would be made; it must be positive,'
      ' or None'
    )
  if rl.staleness not in (0, 1):
    raise ValueError(
      f'rl.staleness={rl.staleness}: a rollout is sampled 0 or 1 iterations'
      ' ahead'
    )


def _check_sampling(sampling: Sampling) -> None:
  if _is_number(sampling.temperature) and sampling.temperature <= 0:
    raise ValueError(
      f'sampling.temperature={sampling.temperature}: it must be positive'
      ' (evaluation is greedy by itself)'
    )
  for field, value in (('top_p', sampling.top_p), ('min_p', sampling.min_p)):
    if isinstance(value, int | float) and not 0 < value <= 1:
      raise ValueError(f'sampling.{field}={value}: it must be in (0, 1]')
  if (sampling.carry_over or 1) > sampling.max_new_tokens:
    raise ValueError(
      f'sampling.carry_over={sampling.carry_over}: an iteration would give more'
      f' than sampling.max_new_tokens={sampling.max_new_tokens}; set it to None'
    )


def _check_rewards(recipe: Recipe) -> None:
  if recipe.evaluation.grader not in recipe.rewards:
    raise ValueError(
      f'evaluation.grader={recipe.evaluation.grader!r} is none of the rewards:'
      f' {", ".join(recipe.rewards)}'
    )
  blocks = recipe.rewards.values()
  if not any(b['weight'] for b in blocks if 'weight' in b):
    raise ValueError('rewards: at least one needs a weight that is not 0')


def _check_groups(rl: Reinforcement) -> None:
  """With shared prompts every slice holds whole groups."""
  parts = {
    'rl.num_minibatches x rl.num_micro_batches': rl.num_minibatches
    * rl.num_micro_batches,
    'rl.num_score_slices': rl.num_score_slices,
  }
  for name, number in parts.items():
    if rl.num_prompts % number:
      raise ValueError(
        f'{name}={number} parts groups of rl.num_prompts={rl.num_prompts}:'
        ' take a divisor of it, or rl.share_prompts=False'
      )


def _is_number(value: Any) -> bool:
  """Whether it can be checked: None and traced values cannot."""
  return isinstance(value, int | float)


def _check_evaluation(choices: Evaluation) -> None:
  if not choices.num_samples:
    return
  for k in choices.ks:
    if not isinstance(k, int) or not 1 <= k <= choices.num_samples:
      raise ValueError(
        f'evaluation.ks has {k!r}: pass@k needs k in [1,'
        f' evaluation.num_samples={choices.num_samples}]'
      )


def _check_positive(recipe: Recipe) -> None:
  """Hold counts against their least values."""
  if _is_number(recipe.seed) and recipe.seed < 0:
    raise ValueError(f'seed={recipe.seed}: it must be at least 0')
  zero_is_fine = {
    'sft': ('num_steps',),
    'preference': ('num_steps',),
    'sampling': ('num_halvings',),
    'rl': ('num_iterations',),
    'evaluation': ('every', 'num_samples'),
    'logging': ('table_every',),
  }
  wanted = {
    'sampling': (
      'num_samples', 'num_parts', 'max_new_tokens', 'num_cache_sizes',
    ),
    'rl': (
      'num_prompts', 'num_epochs', 'num_minibatches', 'num_micro_batches',
      'num_score_slices',
    ),
    'sft': ('batch_size', 'num_micro_batches'),
    'preference': ('batch_size', 'num_micro_batches'),
    'ptx': ('batch_size', 'num_micro_batches'),
    'checkpoint': ('every', 'keep'),
    'filter': ('max_rollouts',),
    'reference': ('every',),
    'evaluation': ('num_prompts', 'batch_size'),
    'mesh': ('slices',),
  }  # fmt: skip
  for least, blocks in ((0, zero_is_fine), (1, wanted)):
    for block, fields in blocks.items():
      for field in fields:
        value = getattr(getattr(recipe, block), field)
        if value < least:
          raise ValueError(
            f'{block}.{field}={value}: it must be at least {least}'
          )
  _check_present(recipe)
  if recipe.num_steps < 1:
    raise ValueError(
      'sft.num_steps + preference.num_steps + rl.num_iterations = 0: nothing to'
      ' run'
    )


def _check_present(recipe: Recipe) -> None:
  """Hold counts that may be None against 1."""
  for field, value in (
    ('chunk_size', recipe.chunk_size),
    ('num_row_buckets', recipe.num_row_buckets),
    ('sft.row_length', recipe.sft.row_length),
    ('rl.row_length', recipe.rl.row_length),
    ('sft.num_examples', recipe.sft.num_examples),
    ('ptx.num_examples', recipe.ptx.num_examples),
    ('preference.num_examples', recipe.preference.num_examples),
    ('preference.reference_every', recipe.preference.reference_every),
    ('machine.memory_limit', recipe.machine.memory_limit),
    ('sampling.top_k', recipe.sampling.top_k),
    ('sampling.num_slots', recipe.sampling.num_slots),
    ('sampling.carry_over', recipe.sampling.carry_over),
  ):
    if value is not None and value < 1:
      raise ValueError(f'{field}={value}: it must be at least 1')


def _check_divides(field: str, parts: int, whole: int) -> None:
  if whole % parts:
    raise ValueError(
      f'{field}={parts} does not divide {whole} rows: change it, the number of'
      ' prompts or the number of samples'
    )
