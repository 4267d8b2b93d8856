"""The schema of a config: what a run needs, by name and type.

A recipe has no defaults: a missing field is an error that says which, and so
is one too many. Blocks with a ``name`` choose a function of a module and are
checked by `postrain.binding.bind`.
"""

from collections.abc import Mapping
import dataclasses
import typing
from typing import Any

from postrain.binding import check_arguments
from postrain.types import Scalar

Block = dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised:
  """The warm-up, or the whole run: ``num_steps`` steps on demonstrations."""

  num_steps: int
  batch_size: int
  num_examples: int | None  # distinct demonstrations; None for all there are
  num_micro_batches: int
  optimizer: Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforcement:
  """The online part: ``num_iterations`` rollouts and their updates."""

  num_iterations: int
  num_prompts: int  # of a rollout
  num_epochs: int  # passes over a rollout
  num_minibatches: int  # optimiser steps of a pass
  num_micro_batches: int  # slices of an optimiser step
  num_score_slices: int
  rescore: bool  # old log-probs have a pass of their own; see `checks`
  share_prompts: bool  # the model reads a prompt once for all its completions
  optimizer: Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How completions are drawn."""

  num_samples: int  # of a prompt: the group
  num_parts: int  # of a rollout: one is rewarded while the next is sampled
  max_new_tokens: int
  temperature: Scalar
  top_k: int | None
  top_p: Scalar | None
  min_p: Scalar | None
  num_slots: int | None  # that are refilled as sequences end; None for a loop
  num_halvings: int  # of the slots, when no sequence waits


@dataclasses.dataclass(frozen=True, kw_only=True)
class KL:
  """The penalty for leaving the reference; a coefficient of None removes it."""

  estimator: Block
  reward_coef: Scalar | None
  loss_coef: Scalar | None
  aggregation: Block | None  # None: the one of the policy loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
  """How the reference moves: ``frozen``, ``ema`` or ``refresh``."""

  update: typing.Literal['frozen', 'ema', 'refresh']
  decay: float  # of ema, per iteration
  every: int  # iterations between refreshes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
  """Which data trains."""

  overlong: typing.Literal['keep', 'mask']  # truncated completions
  informative_only: bool  # dynamic sampling: groups of unequal rewards
  max_rollouts: int  # sampled to fill an iteration with such groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
  """What a mixture of experts needs beside; of a dense model nothing.

  Replay has the learner visit recorded experts: those of the sampler (R3), for
  the old log-probs too, or those of the pass that made the old log-probs (R2).
  The reference always routes by itself.
  """

  record: bool  # the sampler's routing, to measure where the learner's differs
  replay: typing.Literal['sampler', 'old'] | None
  balance_coef: Scalar | None
  balance_over: typing.Literal['minibatch', 'sequence']  # shares of the load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """Held-out figures, graded by one of the rewards."""

  every: int  # steps; 0 for never
  grader: str  # label of a reward
  threshold: float  # a reward of at least this counts as correct
  num_prompts: int
  batch_size: int  # prompts that are sampled at once
  num_samples: int  # for pass@k; 0 for greedy alone
  ks: tuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
  """What people see; no part of a run's identity."""

  table_every: int  # steps between sample tables; 0 for never
  tensorboard: bool
  wandb_project: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """When the state is saved and how many stay."""

  every: int
  keep: int
  export: bool  # a Hugging Face directory at the end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """What it runs on; no part of a run's identity."""

  memory_limit: int | None  # bytes of a device; None for what it reports


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
  """Devices along each axis."""

  data: int
  fsdp: int
  expert: int
  tensor: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """One choice per axis, and the numbers of a run."""

  seed: int
  environment: Block
  model: Block
  rewards: Block  # label -> block with name and weight
  sampling: Sampling
  advantage: Block
  loss: Block
  aggregation: Block
  selection: Block | None  # of `masks`, over each minibatch: see `couplings`
  correction: Block | None
  kl: KL
  entropy_coef: Scalar | None
  reference: Reference
  routing: Routing
  filter: Filter
  sft: Supervised
  rl: Reinforcement
  evaluation: Evaluation
  logging: Logging
  checkpoint: Checkpoint
  machine: Machine
  mesh: Mesh
  chunk_size: int  # time positions whose logits exist at once

  @property
  def unit_size(self) -> int:
    """Rows of a rollout that stay together in minibatches."""
    return self.sampling.num_samples if self.rl.share_prompts else 1

  @property
  def num_steps(self) -> int:
    """Steps of the run: supervised ones, then rollout iterations."""
    return self.sft.num_steps + self.rl.num_iterations

  @property
  def rollouts(self) -> int:
    """Rollouts of an iteration, at most."""
    return self.filter.max_rollouts if self.filter.informative_only else 1


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
  if recipe.evaluation.grader not in recipe.rewards:
    raise ValueError(
      f'evaluation.grader={recipe.evaluation.grader!r} is none of the rewards:'
      f' {", ".join(recipe.rewards)}'
    )
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
  if _is_number(sampling.temperature) and sampling.temperature <= 0:
    raise ValueError(
      f'sampling.temperature={sampling.temperature}: it must be positive'
      ' (evaluation is greedy by itself)'
    )
  for field, value in (('top_p', sampling.top_p), ('min_p', sampling.min_p)):
    if isinstance(value, int | float) and not 0 < value <= 1:
      raise ValueError(f'sampling.{field}={value}: it must be in (0, 1]')


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
    'sampling': ('num_halvings',),
    'rl': ('num_iterations',),
    'evaluation': ('every', 'num_samples'),
    'logging': ('table_every',),
  }
  wanted = {
    'sampling': ('num_samples', 'num_parts', 'max_new_tokens'),
    'rl': (
      'num_prompts', 'num_epochs', 'num_minibatches', 'num_micro_batches',
      'num_score_slices',
    ),
    'sft': ('batch_size', 'num_micro_batches'),
    'checkpoint': ('every', 'keep'),
    'filter': ('max_rollouts',),
    'reference': ('every',),
    'evaluation': ('num_prompts', 'batch_size'),
    'mesh': ('data', 'fsdp', 'expert', 'tensor'),
  }  # fmt: skip
  for least, blocks in ((0, zero_is_fine), (1, wanted)):
    for block, fields in blocks.items():
      for field in fields:
        value = getattr(getattr(recipe, block), field)
        if value < least:
          raise ValueError(
            f'{block}.{field}={value}: it must be at least {least}'
          )
  for field, value in (
    ('chunk_size', recipe.chunk_size),
    ('sft.num_examples', recipe.sft.num_examples),
    ('machine.memory_limit', recipe.machine.memory_limit),
    ('sampling.top_k', recipe.sampling.top_k),
    ('sampling.num_slots', recipe.sampling.num_slots),
  ):
    if value is not None and value < 1:
      raise ValueError(f'{field}={value}: it must be at least 1')
  if recipe.num_steps < 1:
    raise ValueError('sft.num_steps + rl.num_iterations = 0: nothing to run')


def _check_divides(field: str, parts: int, whole: int) -> None:
  if whole % parts:
    raise ValueError(
      f'{field}={parts} does not divide {whole} rows: change it, the number of'
      ' prompts or the number of samples'
    )
