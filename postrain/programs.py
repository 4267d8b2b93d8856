"""The jitted functions of a run, and what each of them will be called with."""

from collections.abc import Callable
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
from postrain.compilation import EXAMS, REMEDIES, SMALL, Program
from postrain.environments import Environment
from postrain.evaluator import Evaluator
from postrain.keys import minibatch_key, run_key
from postrain.masks import informative_groups
from postrain.packing import layouts, real_tokens, with_slots
from postrain.recipe import Recipe
from postrain.shapes import Shapes
from postrain.states import States
from postrain.train_step import merge
from postrain.types import Batch, Metrics, Params, Samples, TrainState


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
    self._layouts = layouts(recipe, environment)
    self._shapes = Shapes(recipe, states, self._layouts)

    def packed(name: str, fn: Callable) -> Callable:
      layout = self._layouts.get(name)
      return fn if layout is None else layout.reading(fn)

    # What comes out is laid out as it goes in: said, not left to the compiler,
    # for all is compiled before anything exists, and once.
    rows, same = sharding.rows(states.mesh), sharding.replicated(states.mesh)
    online, supervised = map(sharding.of, self._shapes.states)
    self.sample = jax.jit(algorithm.sample)
    self.extend: Any = algorithm.extend and jax.jit(algorithm.extend)
    self.greedy = algorithm.greedy and jax.jit(algorithm.greedy)
    self._prepare = jax.jit(
      self._to_leaves(packed('prepare', algorithm.prepare)),
      out_shardings=(rows, None, None),
    )
    self._update = jax.jit(
      self._from_leaves(packed('update', algorithm.update)),
      donate_argnums=0,
      out_shardings=(online, same),
    )
    self._imitate = jax.jit(
      packed('imitate', algorithm.imitate),
      donate_argnums=0,
      out_shardings=(supervised, same),
    )
    self.move_reference = jax.jit(
      algorithm.move_reference, out_shardings=online.ref_params
    )
    self.informative = jax.jit(informative_groups)
    self.minibatches = jax.jit(
      functools.partial(_minibatches, recipe), out_shardings=same
    )
    self.merge = jax.jit(_merge)

  # Of the three that may be packed: arrays of the host in, which are placed.

  def imitate(
    self, state: TrainState, tokens: Any, valid: Any, mask: Any
  ) -> tuple[TrainState, Metrics]:
    """That of `Algorithm`; the state is donated."""
    arrays, packing = (tokens, valid, mask), None
    if layout := self._layouts.get('imitate'):
      widths = ((0, 0), (0, layout.length - tokens.shape[1]))
      arrays = tuple(np.pad(x, widths) for x in arrays)
      packing = layout.pack(arrays[1])
    return self._imitate(state, *self._put((*arrays, packing)))

  def prepare(
    self, params: dict[str, Params], ref_params: Params | None, prompts: Any,
    prompt_mask: Any, samples: Samples, *rest: Any,
  ) -> tuple[Batch, Metrics, dict[str, Any]]:  # fmt: skip
    """That of `Algorithm`."""
    packing, arrays = None, (prompts, prompt_mask, samples)
    if 'update' in self._layouts:
      arrays = with_slots(*arrays, self.environment.prompt_length)
    if layout := self._layouts.get('prepare'):
      packing = layout.pack(real_tokens(*arrays[1:]))
    placed = self._put((*arrays, *rest, packing))
    leaves, *others = self._prepare(params, ref_params, *placed)
    return self._batch(leaves), *others

  def update(
    self, state: TrainState, batch: Batch, rows: Any, key: Any
  ) -> tuple[TrainState, Metrics]:
    """That of `Algorithm`; the state is donated."""
    packing = None
    if layout := self._layouts.get('update'):  # waits for the scores
      valid = np.asarray(batch.valid)[np.asarray(rows)]
      packing = self._put(layout.pack(valid))
    return self._update(state, jax.tree.leaves(batch), rows, key, packing)

  def _put(self, arrays: Any) -> Any:
    return sharding.put_rows(self.states.mesh, arrays)

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
      self._learning(self.environment.prompt_length)
      self._drawing(self.environment.prompt_length)

  def needed(self, start: int) -> list[Program]:
    """What steps from ``start`` on will call, the slowest to compile first."""
    recipe, environment = self.recipe, self.environment
    supervised, iterations = recipe.sft.num_steps, recipe.rl.num_iterations
    found: list[Program] = []
    if iterations:
      first = max(start - supervised, 0) * recipe.rollouts
      longest = {environment.prompt_length}
      lengths = longest
      if self.extend is None:
        lengths = environment.prompt_lengths(
          range(first, iterations * recipe.rollouts), recipe.rl.num_prompts
        )
      learnt = longest if 'update' in self._layouts else lengths
      found += _longest_first(self._learning, learnt)
      found += self._small(found[0])
      found += _longest_first(self._drawing, lengths)
      if start <= supervised:
        found.append(self._beginning())
    if start < supervised:
      lengths = {environment.demonstration_length}
      if 'imitate' not in self._layouts:
        choices = recipe.sft.batch_size, recipe.sft.num_examples
        steps = range(start, supervised)
        lengths = environment.demonstration_lengths(steps, *choices)
      found += _longest_first(self._supervised, lengths)
    if recipe.evaluation.every:
      found += self._exams()
    return found

  def _learning(self, slots: int) -> list[Program]:
    """Scores and updates of a rollout whose prompts have so many slots."""
    recipe, state = self.recipe, self._shapes.states[0]
    num_prompts = recipe.rl.num_prompts
    shape = (num_prompts, recipe.sampling.num_samples)
    *_, samples = self._drawn(slots)
    self._rehearse_rewards(slots, samples)
    signals = {'reward_parts': _floats(*shape, len(recipe.rewards))}
    if self.greedy is not None:
      signals['baselines'] = _floats(num_prompts)
    scored = (state.params, state.ref_params)
    arrays = self._shapes.rows((_floats(*shape), signals))
    arrays = *self._shapes.prompts(num_prompts, slots)[:2], samples, *arrays
    prepared = {
      size: self._prepare.trace(*scored, *arrays, packing)
      for size, packing in self._shapes.packings('prepare').items()
    }
    leaves = self._shapes.rows(next(iter(prepared.values())).out_info[0])
    size = math.prod(shape) // recipe.rl.num_minibatches
    rows = self._shapes.same(jax.ShapeDtypeStruct((size,), jnp.int32))
    updates = {
      size: self._update.trace(state, leaves, rows, self._shapes.key, packing)
      for size, packing in self._shapes.packings('update').items()
    }
    kinds = ('update', updates, state), ('prepare', prepared, scored)
    return [
      self._program(f'{name}[{slots}{size}]', traced, state, held)
      for name, traces, held in kinds
      for size, traced in traces.items()
    ]

  def _drawn(self, slots: int) -> tuple[str, Any, Samples]:
    """The sampler, traced on prompts of so many slots, and all its samples."""
    recipe, params = self.recipe, self._shapes.states[0].params
    parts, carried = recipe.sampling.num_parts, self.states.carried
    prompts = self._shapes.prompts(recipe.rl.num_prompts // parts, slots)
    samples: Any = carried and self._shapes.rows(carried.samples)
    if self.extend is not None:
      more = (samples, np.int32(0))
      return 'extend', self.extend.trace(params, *prompts, *more), samples
    traced = self.sample.trace(params, *prompts)
    return (
      'sample',
      traced,
      samples or self._shapes.rows(traced.out_info, parts),
    )

  def _drawing(self, slots: int) -> list[Program]:
    """The samplers of prompts of so many slots."""
    state, (name, drawn, _) = self._shapes.states[0], self._drawn(slots)
    found = [self._program(f'{name}[{slots}]', drawn, state, state.params)]
    if self.greedy is not None:
      prompts = self._shapes.prompts(self.recipe.rl.num_prompts, slots)
      best = self.greedy.trace(state.params, *prompts)
      found.append(self._program(f'greedy[{slots}]', best, state, state.params))
    return found

  def _small(self, update: Program) -> list[Program]:
    """The other functions of an iteration: nothing in them has prompts."""
    recipe, state = self.recipe, self._shapes.states[0]
    choices, zero = recipe.rl, np.int32(0)
    figures = [self._shapes.same(update.traced.out_info[1])]
    figures *= choices.num_epochs * choices.num_minibatches
    rewards = _floats(choices.num_prompts, recipe.sampling.num_samples)
    cut = self.minibatches.trace(zero, zero, state.step)
    judged = self.informative.trace(rewards)
    found = [
      self._program('minibatches', cut, state, state.step),
      self._program('merge', self.merge.trace(figures), state, None),
      self._program('informative', judged, state, None),
    ]
    if state.ref_params is not None:
      moved = (state.ref_params, state.params['actor'])
      traced = self.move_reference.trace(*moved, zero)
      found += [self._program('move_reference', traced, state, moved)]
    return found

  def _beginning(self) -> Program:
    state = self._shapes.states[0]
    traced = self.states.begin.trace(trainable(state.params))
    made = (state.opt_state, state.ref_params, trainable(state.params))
    return self._program('begin', traced, state, made)

  def _supervised(self, length: int) -> list[Program]:
    state = self._shapes.states[1]
    arrays = self._shapes.demonstrations(length)
    return [
      self._program(
        f'imitate[{length}{size}]',
        self._imitate.trace(state, *arrays, packing),
        state,
        state,
      )
      for size, packing in self._shapes.packings('imitate').items()
    ]

  def _exams(self) -> list[Program]:
    # The stage with a reference is the one that has less room.
    state = self._shapes.states[not self.recipe.rl.num_iterations]
    return [
      self._program(f'evaluate {name}', traced, state, state.params, EXAMS)
      for name, traced in self.evaluator.traced(state.params, self._shapes.key)
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


def _longest_first(
  programs: Callable[[int], list[Program]], lengths: set[int]
) -> list[Program]:
  """The programs of each length."""
  longest_first = sorted(lengths, reverse=True)
  return [each for length in longest_first for each in programs(length)]


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
