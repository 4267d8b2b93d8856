"""The jitted functions of a run, and what each of them will be called with."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import sharding
from postrain.adapted import trainable
from postrain.algorithm import Algorithm
from postrain.batches import minibatch_rows
from postrain.compilation import Program
from postrain.environments import Environment
from postrain.evaluator import Evaluator
from postrain.keys import minibatch_key, run_key
from postrain.masks import informative_groups
from postrain.recipe import Recipe
from postrain.states import States
from postrain.train_step import merge
from postrain.types import Batch, Metrics, TrainState

PARTS = ('a larger sampling.num_parts', 'mesh.data', 'model.dtype=bfloat16')
SCORES = ('a larger rl.num_score_slices', 'a smaller chunk_size', 'mesh.fsdp')
WHOLE = ('mesh.fsdp', 'mesh.tensor', 'model.lora')
REMAT = 'model.remat=nothing_saveable'
EXAMS = (
  'a smaller evaluation.batch_size',
  'a smaller evaluation.num_samples',
  'a smaller sampling.max_new_tokens',
)
REMEDIES = {
  'sample': PARTS,
  'greedy': ('a smaller rl.num_prompts', *PARTS[1:]),
  'prepare': SCORES,
  'update': ('a larger rl.num_micro_batches', REMAT, 'mesh.fsdp'),
  'imitate': ('a larger sft.num_micro_batches', REMAT, 'mesh.fsdp'),
  'move_reference': WHOLE,
  'begin': WHOLE,
}
SMALL = ('a smaller rl.num_prompts',)


class Programs:
  """Everything of a step that runs on the device.

  Shapes follow from the recipe and from the slots of the prompts, so that all
  that a run needs can be compiled before its first step.
  """

  def __init__(
    self, recipe: Recipe, environment: Environment, algorithm: Algorithm,
    states: States, evaluator: Evaluator,
  ):  # fmt: skip
    self.recipe, self.environment = recipe, environment
    self.states, self.evaluator = states, evaluator
    self._batches: dict[tuple, Any] = {}  # structures, by shape of the tokens
    # What comes out is laid out as it goes in: said, not left to the compiler,
    # for all is compiled before anything exists, and once.
    rows, same = sharding.rows(states.mesh), sharding.replicated(states.mesh)
    online, supervised = map(sharding.of, self._states)
    self.sample = jax.jit(algorithm.sample)
    self.greedy = algorithm.greedy and jax.jit(algorithm.greedy)
    self._prepare = jax.jit(
      self._to_leaves(algorithm.prepare), out_shardings=(rows, None, None)
    )
    self._update = jax.jit(
      self._from_leaves(algorithm.update),
      donate_argnums=0,
      out_shardings=(_apart(online)[0], same),
    )
    self.imitate = jax.jit(
      algorithm.imitate, donate_argnums=0, out_shardings=(supervised, same)
    )
    self.move_reference = algorithm.move_reference
    if recipe.reference.update != 'frozen':
      self.move_reference = jax.jit(
        algorithm.move_reference, out_shardings=online.ref_params
      )
    self.informative = jax.jit(informative_groups)
    self.minibatches = jax.jit(
      functools.partial(_minibatches, recipe), out_shardings=same
    )
    self.merge = jax.jit(_merge)

  def prepare(self, *arguments: Any) -> tuple[Batch, Metrics, dict[str, Any]]:
    """That of `Algorithm`."""
    leaves, *rest = self._prepare(*arguments)
    return self._batch(leaves), *rest

  def update(
    self, state: TrainState, batch: Batch, rows: Any, key: Any
  ) -> tuple[TrainState, Metrics]:
    """That of `Algorithm`; the state is donated."""
    state, reference = _apart(state)
    state, figures = self._update(state, jax.tree.leaves(batch), rows, key)
    return dataclasses.replace(state, ref_params=reference), figures

  # Arrays pass between the two as they are: a batch holds arrays, not shapes.

  def _to_leaves(self, prepare: Callable) -> Callable:
    def prepared(*arguments: Any) -> tuple:
      batch, *rest = prepare(*arguments)
      leaves, structure = jax.tree.flatten(batch)
      self._batches[leaves[0].shape] = structure
      return leaves, *rest

    return prepared

  def _from_leaves(self, update: Callable) -> Callable:
    def updated(state: TrainState, leaves: list, *rest: Any) -> tuple:
      return update(state, self._batch(leaves), *rest)

    return updated

  def _batch(self, leaves: list) -> Batch:
    return jax.tree.unflatten(self._batches[leaves[0].shape], leaves)

  def rehearse(self) -> None:
    """Trace a step of each kind on shapes alone: nothing is compiled or run.

    What one part asks of another, a loss of arrays that nobody makes, is so
    known before any compilation.
    """
    if self.recipe.sft.num_steps:
      self._supervised(self.environment.demonstration_length)
    if self.recipe.rl.num_iterations:
      self._iteration(self.environment.prompt_length)

  def needed(self, start: int) -> list[Program]:
    """What steps from ``start`` on will call, the slowest to compile first."""
    recipe, environment = self.recipe, self.environment
    supervised, iterations = recipe.sft.num_steps, recipe.rl.num_iterations
    found: list[Program] = []
    if iterations:
      first = max(start - supervised, 0) * recipe.rollouts
      lengths = environment.prompt_lengths(
        range(first, iterations * recipe.rollouts), recipe.rl.num_prompts
      )
      for length in sorted(lengths, reverse=True):
        found += self._iteration(length)
      found += self._small(found[0])
      if start <= supervised:
        found.append(self._beginning())
    if start < supervised:
      lengths = environment.demonstration_lengths(
        range(start, supervised), recipe.sft.batch_size, recipe.sft.num_examples
      )
      found += map(self._supervised, sorted(lengths, reverse=True))
    if recipe.evaluation.every:
      found += self._exams()
    return found

  def _iteration(self, slots: int) -> list[Program]:
    """The functions of an iteration whose prompts have so many slots."""
    recipe, state = self.recipe, self._states[0]
    num_prompts, num_parts = recipe.rl.num_prompts, recipe.sampling.num_parts
    shape = (num_prompts, recipe.sampling.num_samples)
    part = (state.params, *self._prompts(num_prompts // num_parts, slots))
    drawn = self.sample.trace(*part)
    samples = self._rows(drawn.out_info, num_parts)
    self._rehearse_rewards(slots, samples)
    signals = {'reward_parts': _floats(*shape, len(recipe.rewards))}
    whole = self._prompts(num_prompts, slots)
    scored = (state.params, state.ref_params)
    greedy = []
    if self.greedy is not None:
      signals['baselines'] = _floats(num_prompts)
      best = self.greedy.trace(state.params, *whole)
      greedy = [self._program(f'greedy[{slots}]', best, state, state.params)]
    prepared = self._prepare.trace(
      *scored, *whole[:2], samples, *self._rows((_floats(*shape), signals))
    )
    leaves = self._rows(prepared.out_info[0])
    size = math.prod(shape) // recipe.rl.num_minibatches
    rows = self._same(jax.ShapeDtypeStruct((size,), jnp.int32))
    changed, _ = _apart(state)
    update = self._update.trace(changed, leaves, rows, self._key)
    return [
      self._program(f'update[{slots}]', update, state, changed),
      self._program(f'sample[{slots}]', drawn, state, state.params),
      self._program(f'prepare[{slots}]', prepared, state, scored),
      *greedy,
    ]

  def _small(self, update: Program) -> list[Program]:
    """The other functions of an iteration: nothing in them has prompts."""
    recipe, state = self.recipe, self._states[0]
    choices, zero = recipe.rl, np.int32(0)
    figures = [self._same(update.traced.out_info[1])]
    figures *= choices.num_epochs * choices.num_minibatches
    rewards = _floats(choices.num_prompts, recipe.sampling.num_samples)
    cut = self.minibatches.trace(zero, zero, state.step)
    found = [
      self._program('minibatches', cut, state, state.step),
      self._program('merge', self.merge.trace(figures), state, None),
      self._program(
        'informative', self.informative.trace(rewards), state, None
      ),
    ]
    if state.ref_params is not None and recipe.reference.update != 'frozen':
      moved = (state.ref_params, state.params['actor'])
      traced = self.move_reference.trace(*moved, zero)
      found += [self._program('move_reference', traced, state, moved)]
    return found

  def _beginning(self) -> Program:
    state = self._states[0]
    traced = self.states.begin.trace(trainable(state.params))
    made = (state.opt_state, state.ref_params, trainable(state.params))
    return self._program('begin', traced, state, made)

  def _supervised(self, length: int) -> Program:
    state = self._states[1]
    shape = (self.recipe.sft.batch_size, length)
    tokens, valid = (
      jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, bool)
    )
    traced = self.imitate.trace(state, *self._rows((tokens, valid, valid)))
    return self._program(f'imitate[{length}]', traced, state, state)

  def _exams(self) -> list[Program]:
    # The stage with a reference is the one that has less room.
    state = self._states[not self.recipe.rl.num_iterations]
    return [
      self._program(f'evaluate {name}', traced, state, state.params, EXAMS)
      for name, traced in self.evaluator.traced(state.params, self._key)
    ]

  def _rehearse_rewards(self, slots: int, samples: Any) -> None:
    if self.environment.device_task is None:
      return
    shape = (len(samples.tokens), slots)
    prompts = jax.ShapeDtypeStruct(shape, jnp.int32)
    for reward in self.environment.device_task.rewards.values():
      jax.eval_shape(reward, prompts, samples.tokens, samples.mask)

  def _program(
    self, name: str, traced: Any, state: TrainState, held: Any,
    remedies: tuple[str, ...] = SMALL,
  ) -> Program:  # fmt: skip
    """A program that has a part of the state among its arguments."""
    beside = sharding.device_bytes(state) - sharding.device_bytes(held)
    kind = name.partition('[')[0]
    return Program(name, traced, beside, REMEDIES.get(kind, remedies))

  @functools.cached_property
  def _key(self) -> Any:
    return self._same(jax.eval_shape(jax.random.key, 0))

  @functools.cached_property
  def _states(self) -> tuple[TrainState, TrainState]:
    """Those of the two stages, the online one first."""
    supervised = self.recipe.sft.num_steps
    return self.states.abstract(supervised + 1), self.states.abstract(1)

  def _prompts(self, num_prompts: int, slots: int) -> tuple[Any, ...]:
    """What a sampler takes beside parameters: prompts, mask, key, ids."""
    shape = (num_prompts, slots)
    tokens, mask = self._rows(
      tuple(jax.ShapeDtypeStruct(shape, d) for d in (jnp.int32, bool))
    )
    return tokens, mask, self._key, np.arange(num_prompts, dtype=np.int32)

  def _same(self, shapes: Any) -> Any:
    """The shapes of arrays that are the same on every device."""
    same = sharding.replicated(self.states.mesh)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=same), shapes
    )

  def _rows(self, shapes: Any, repeats: int = 1) -> Any:
    """The shapes of arrays whose rows, so many times, are cut over devices."""
    rows = sharding.rows(self.states.mesh)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        (x.shape[0] * repeats, *x.shape[1:]), x.dtype, sharding=rows
      ),
      shapes,
    )


def _apart(state: TrainState) -> tuple[TrainState, Any]:
  """What an update changes, and the reference, which it need not carry."""
  return dataclasses.replace(state, ref_params=None), state.ref_params


def _minibatches(
  recipe: Recipe, iteration: Any, epoch: Any, step: Any
) -> tuple[list[Any], list[Any]]:
  """Rows and key of each update of an epoch, the first of them number step."""
  choices = recipe.rl
  rows = minibatch_rows(
    minibatch_key(recipe.seed, iteration, epoch),
    choices.num_prompts * recipe.sampling.num_samples,
    choices.num_minibatches,
    unit_size=recipe.unit_size,
  )
  steps = step + jnp.arange(choices.num_minibatches)
  keys = jax.vmap(lambda s: run_key(recipe.seed, 'selection', s))(steps)
  return [*rows], [*keys]


def _merge(updates: list[Metrics]) -> Metrics:
  """The figures of all updates as those of one."""
  return merge(jax.tree.map(lambda *x: jnp.stack(x), *updates))


def _floats(*shape: int) -> Any:
  return jax.ShapeDtypeStruct(shape, jnp.float32)
