"""The schema of a config: what a run needs, by name and type.

A recipe has no defaults: a missing field is an error that says which, and so
is one too many. Blocks with a ``name`` choose a function of a module and are
checked by `postrain.binding.bind`.
"""

from collections.abc import Mapping
import dataclasses
import typing

from postrain.types import Scalar

Block = dict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised:
  """The warm-up, or the whole run: ``num_steps`` steps on demonstrations."""

  num_steps: int
  batch_size: int
  num_examples: int | None  # distinct demonstrations; None for all there are
  num_micro_batches: int
  row_length: int | None  # tokens of a packed row; None pads a row for each
  optimizer: Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference:
  """``num_steps`` steps on what is preferred to what.

  Its reference is the policy at its start, or that of a later step.
  """

  num_steps: int
  batch_size: int  # units: pairs, rankings or single completions
  num_examples: int | None  # distinct units; None for all there are
  num_micro_batches: int
  learns: typing.Literal['policy', 'reward_model']
  # Given pairs; two completions of the policy, compared by raters or rewards;
  # or demonstrations, preferred to completions of the reference.
  source: typing.Literal['dataset', 'raters', 'rewards', 'self_play']
  reference_every: int | None  # steps between its refreshes; None: it stays
  # Scored at each step, or once for all units: then no reference is kept.
  ref_logprobs: typing.Literal['live', 'cached']
  data: typing.Literal['pairs', 'rankings', 'unpaired']
  loss: Block
  sft_coef: Scalar | None  # of the likelihood of the chosen, a mean over tokens
  centering_coef: Scalar | None  # of `losses.score_centering`, for scores
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
  staleness: int  # iterations that a rollout is sampled ahead of its update
  row_length: int | None  # tokens of a packed row; None pads a row for each
  kl_stop: Scalar | None  # nats a token; past 1.5 of it an iteration is over
  optimizer: Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How completions are drawn."""

  num_samples: int  # of a prompt: the group
  num_parts: int  # of a rollout: one is rewarded while the next is sampled
  max_new_tokens: int
  carry_over: int | None  # tokens of an iteration; what has not ended goes on
  temperature: Scalar
  top_k: int | None
  top_p: Scalar | None
  min_p: Scalar | None
  num_cache_sizes: int  # of completions: the cache grows through them
  num_slots: int | None  # that are refilled as sequences end; None for a loop
  num_halvings: int  # of the slots, when no sequence waits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ptx:
  """The likelihood of demonstrations beside each update, as in PPO-ptx."""

  coef: Scalar | None  # of its mean over tokens; None for none
  batch_size: int  # demonstrations of an update
  num_examples: int | None  # distinct demonstrations; None for all there are
  num_micro_batches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class KL:
  """The penalty for leaving the reference; a coefficient of None removes it."""

  estimator: Block
  reward_coef: Scalar | None
  loss_coef: Scalar | None
  aggregation: Block | None  # None: the one of the policy loss
  controller: Block | None  # of `kl`, once an iteration; None leaves it fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critic:
  """What estimates values, for advantages that read them."""

  network: Block | None  # of `critics`; None for no critic
  returns: Block  # of `advantages`: what its values are trained towards
  loss: Block
  coef: Scalar
  optimizer: Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
  """How the reference moves: ``frozen``, ``ema`` or ``refresh``."""

  update: typing.Literal['frozen', 'ema', 'refresh']
  decay: float  # of ema, per iteration
  every: int  # iterations between refreshes
  memory: typing.Literal['device', 'host']  # where it lies between programs


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
  exploit_threshold: float | None  # weighted reward that only right ones earn
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
  """Devices along each axis; -1 for one of them takes what the others leave."""

  slices: int  # over which data is cut first
  data: int
  fsdp: int
  expert: int
  context: int
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
  whitening: Block | None  # of `advantages`, over the tokens of a rollout
  loss: Block
  aggregation: Block
  selection: Block | None  # of `masks`, over each minibatch: see `couplings`
  correction: Block | None
  critic: Critic
  kl: KL
  entropy_coef: Scalar | None
  ptx: Ptx
  reference: Reference
  routing: Routing
  filter: Filter
  sft: Supervised
  preference: Preference
  rl: Reinforcement
  evaluation: Evaluation
  logging: Logging
  checkpoint: Checkpoint
  machine: Machine
  mesh: Mesh
  chunk_size: int  # time positions whose logits exist at once
  num_row_buckets: int  # numbers of packed rows that are compiled for

  def on(self, sizes: Mapping[str, int]) -> 'Recipe':
    """The same, of a mesh of these sizes: -1 stands for none any more."""
    mesh = dataclasses.replace(self.mesh, **sizes)
    return dataclasses.replace(self, mesh=mesh)

  @property
  def unit_size(self) -> int:
    """Rows of a rollout that stay together in minibatches."""
    return self.sampling.num_samples if self.rl.share_prompts else 1

  @property
  def num_steps(self) -> int:
    """Steps of the run: offline ones, then rollout iterations."""
    return self.num_offline_steps + self.rl.num_iterations

  @property
  def num_offline_steps(self) -> int:
    """Steps without rollouts: supervised ones, then those on preferences."""
    return self.sft.num_steps + self.preference.num_steps

  @property
  def rollouts(self) -> int:
    """Rollouts of an iteration, at most."""
    return self.filter.max_rollouts if self.filter.informative_only else 1
