"""What a run will call: every program of it, traced on shapes."""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import sharding
from postrain.adapted import trainable
from postrain.compilation import EXAMS, REMEDIES, SMALL, Program
from postrain.learned_rewards import Judge
from postrain.preferring import comparisons
from postrain.programs import Programs, apart
from postrain.types import Samples, TrainState


class Rehearsal:
  """Traces the programs of a run with what they will be called with."""

  def __init__(
    self, programs: Programs, judges: Mapping[str, Judge] | None = None
  ):
    self.judges = judges or {}
    self.programs, self.shapes = programs, programs.shapes
    self.recipe, self.environment = programs.recipe, programs.environment

  def check(self) -> None:
    """Trace a step of each kind on shapes alone: nothing is compiled or run.

    What one part asks of another, a loss of arrays that nobody makes, is so
    known before any compilation.
    """
    if self.recipe.sft.num_steps:
      self._supervised(self.environment.demonstration_length)
    if self.recipe.preference.num_steps:
      units = comparisons(self.recipe, self.environment)
      self._preferring(units.length)
      self._writing()
    if self.recipe.rl.num_iterations:
      self._learning(self.environment.prompt_length)
      self._drawing(self.environment.prompt_length)

  def needed(self, start: int) -> list[Program]:
    """What steps from ``start`` on will call, the slowest to compile first."""
    recipe, environment = self.recipe, self.environment
    supervised, iterations = recipe.sft.num_steps, recipe.rl.num_iterations
    offline = recipe.num_offline_steps
    found: list[Program] = []
    if iterations:
      first = max(start - offline, 0) * recipe.rollouts
      longest = {environment.prompt_length}
      lengths = longest
      if self.programs.extend is None:
        lengths = environment.prompt_lengths(
          range(first, iterations * recipe.rollouts), recipe.rl.num_prompts
        )
      learnt = longest if 'update' in self.programs.layouts else lengths
      found += _longest_first(self._learning, learnt)
      found += self._small(found[0], found[-1])
      found += _longest_first(self._drawing, lengths)
      if start <= offline:
        found.append(self._beginning())
    if start < offline:
      found += self._preferred(max(start - supervised, 0))
      if start <= supervised < offline:
        found.append(self._beginning_preference())
    if start < supervised:
      lengths = {environment.demonstration_length}
      if 'imitate' not in self.programs.layouts:
        choices = recipe.sft.batch_size, recipe.sft.num_examples
        steps = range(start, supervised)
        lengths = environment.demonstration_lengths(steps, *choices)
      found += _longest_first(self._supervised, lengths)
    if recipe.evaluation.every:
      found += self._exams()
    rewarded = start < offline and recipe.preference.source == 'rewards'
    if iterations or recipe.evaluation.every or rewarded:
      found += self._judges()
    return found

  def roles(self) -> dict[str, tuple[int, ...]]:
    """`Shapes.roles`, with the reward models."""
    return self.shapes.roles(
      {f'reward model {k}': j.abstract for k, j in self.judges.items()}
    )

  def _learning(self, slots: int) -> list[Program]:
    """Scores and updates of a rollout whose prompts have so many slots."""
    recipe, state = self.recipe, self.shapes.states[0]
    num_prompts = recipe.rl.num_prompts
    shape = (num_prompts, recipe.sampling.num_samples)
    *_, samples = self._drawn(slots)
    self._rehearse_rewards(slots, samples)
    signals = {'reward_parts': _floats(*shape, len(recipe.rewards))}
    if self.programs.greedy is not None:
      signals['baselines'] = _floats(num_prompts)
    scored = (state.kl_coef, state.params, state.ref_params)
    arrays = self.shapes.rows((_floats(*shape), signals))
    arrays = *self.shapes.prompts(num_prompts, slots)[:2], samples, *arrays
    prepared = {
      size: self.programs.jit_prepare.trace(*scored, *arrays, packing)
      for size, packing in self.shapes.packings('prepare').items()
    }
    leaves = self.shapes.rows(next(iter(prepared.values())).out_info[0])
    size = math.prod(shape) // recipe.rl.num_minibatches
    rows = self.shapes.same(jax.ShapeDtypeStruct((size,), jnp.int32))
    changed, _ = apart(state)
    more = (leaves, rows, self.shapes.key, self._beside())
    updates = {
      size: self.programs.jit_update.trace(changed, *more, packing)
      for size, packing in self.shapes.packings('update').items()
    }
    kinds = ('update', updates, changed), ('prepare', prepared, scored)
    return [
      self._program(f'{name}[{slots}{size}]', traced, state, held)
      for name, traces, held in kinds
      for size, traced in traces.items()
    ]

  def _beside(self) -> Any:
    """The demonstrations beside an update, where there are some."""
    if self.recipe.ptx.coef is None:
      return None
    length = self.environment.demonstration_length
    return self.shapes.demonstrations(self.recipe.ptx.batch_size, length)

  def _drawn(self, slots: int) -> tuple[str, Any, Samples]:
    """The sampler, traced on prompts of so many slots, and all its samples."""
    recipe, params = self.recipe, self.shapes.states[0].params
    parts, carried = recipe.sampling.num_parts, self.programs.states.carried
    prompts = self.shapes.prompts(recipe.rl.num_prompts // parts, slots)
    samples: Any = carried and self.shapes.rows(carried.samples)
    if (extend := self.programs.extend) is not None:
      traced = extend.trace(params, *prompts, samples, np.int32(0))
      return 'extend', traced, samples
    traced = self.programs.sample.trace(params, *prompts)
    samples = samples or self.shapes.rows(traced.out_info, parts)
    return 'sample', traced, samples

  def _drawing(self, slots: int) -> list[Program]:
    """The samplers of prompts of so many slots."""
    state, (name, drawn, _) = self.shapes.states[0], self._drawn(slots)
    found = [self._program(f'{name}[{slots}]', drawn, state, state.params)]
    if self.programs.greedy is not None:
      prompts = self.shapes.prompts(self.recipe.rl.num_prompts, slots)
      best = self.programs.greedy.trace(state.params, *prompts)
      found.append(self._program(f'greedy[{slots}]', best, state, state.params))
    return found

  def _small(self, update: Program, prepare: Program) -> list[Program]:
    """The other functions of an iteration: nothing in them has prompts."""
    recipe, state = self.recipe, self.shapes.states[0]
    choices, zero = recipe.rl, np.int32(0)
    figures = [self.shapes.same(update.traced.out_info[1])]
    figures *= choices.num_epochs * choices.num_minibatches
    rewards = _floats(choices.num_prompts, recipe.sampling.num_samples)
    cut = self.programs.minibatches.trace(zero, zero, state.step)
    judged = self.programs.informative.trace(rewards)
    found = [
      self._program('minibatches', cut, state, state.step),
      self._program('merge', self.programs.merge.trace(figures), state, None),
      self._program('informative', judged, state, None),
    ]
    if self.programs.control is not None:
      measured = prepare.traced.out_info[1]['reference/kl_sequence']
      arguments = state.kl_coef, self.shapes.same(measured)
      traced = self.programs.control.trace(*arguments)
      found.append(self._program('control', traced, state, state.kl_coef))
    if state.ref_params is not None and recipe.reference.update != 'frozen':
      moved = (state.ref_params, state.params['actor'])
      traced = self.programs.move_reference.trace(*moved, zero)
      found += [self._program('move_reference', traced, state, moved)]
    return found

  def _preferred(self, start: int) -> list[Program]:
    """Steps on preferences from number ``start`` of them on."""
    choices = self.recipe.preference
    if not choices.num_steps:
      return []
    steps = range(start, choices.num_steps)
    lengths = comparisons(self.recipe, self.environment).lengths(
      steps, choices.batch_size, choices.num_examples
    )
    return self._writing() + _longest_first(self._preferring, lengths)

  def _writing(self) -> list[Program]:
    """What writes the pairs of a step, and what refreshes the reference."""
    choices, state = self.recipe.preference, self.shapes.preferring
    found: list[Program] = []
    if choices.source != 'dataset':
      slots = self.environment.prompt_length
      prompts = self.shapes.prompts(choices.batch_size, slots)
      params = (state.params, state.ref_params)
      traced = self.programs.write.trace(*params, *prompts)
      found.append(self._program('write', traced, state, params))
    if choices.ref_logprobs == 'cached':
      found += self._referring()
    if choices.reference_every is not None:
      params = trainable(state.params)
      traced = self.programs.refresh.trace(params)
      found.append(self._program('refresh', traced, state, params))
    return found

  def _referring(self) -> list[Program]:
    """The reference on a micro-batch of given units, and of held-out ones."""
    choices, state = self.recipe.preference, self.shapes.preferring
    known = comparisons(self.recipe, self.environment)
    rows = choices.batch_size // choices.num_micro_batches * known.unit_size
    lengths, judging = {known.length}, self.programs.judging
    if judging is not None:
      lengths.add(judging.pairs.tokens.shape[1])
    found = []
    for length in lengths:
      arrays = self.shapes.rows(
        tuple(
          jax.ShapeDtypeStruct((rows, length), d)
          for d in (jnp.int32, bool, bool)
        )
      )
      reference = state.params['actor']
      traced = self.programs.refer.trace(reference, *arrays)
      found.append(self._program(f'refer[{length}]', traced, state, reference))
    return found

  def _preferring(self, length: int) -> list[Program]:
    state = self.shapes.preferring
    units = comparisons(self.recipe, self.environment)
    arrays = self.shapes.preferences(units, length)
    changed, reference = apart(state)
    traced = self.programs.jit_prefer.trace(changed, reference, *arrays)
    return [self._program(f'prefer[{length}]', traced, state, state)]

  def _beginning(self) -> Program:
    state = self.shapes.states[0]
    params, given = trainable(state.params), None
    critic = params.pop('critic', None)
    network = self.programs.states.algorithm.critic
    if network is not None and network.read is not None:
      given = critic
    return self._begun(state, self.programs.states.begin.trace(params, given))

  def _beginning_preference(self) -> Program:
    state, begin = self.shapes.preferring, self.programs.states.begin_preference
    return self._begun(state, begin.trace(trainable(state.params)))

  def _begun(self, state: TrainState, traced: Any) -> Program:
    made = (state.opt_state, state.ref_params, trainable(state.params))
    return self._program('begin', traced, state, made)

  def _supervised(self, length: int) -> list[Program]:
    state = self.shapes.states[1]
    arrays = self.shapes.demonstrations(self.recipe.sft.batch_size, length)
    return [
      self._program(
        f'imitate[{length}{size}]',
        self.programs.jit_imitate.trace(state, *arrays, packing),
        state,
        state,
      )
      for size, packing in self.shapes.packings('imitate').items()
    ]

  def _exams(self) -> list[Program]:
    found: list[Program] = []
    if self.programs.judging is not None:
      state = self.shapes.preferring
      traced = self.programs.judging.traced(state)
      found += [self._program('evaluate pairs', traced, state, state, EXAMS)]
    if self.recipe.preference.learns == 'reward_model':
      return found
    # The stage with a reference is the one that has less room.
    state = self.shapes.states[not self.recipe.rl.num_iterations]
    exams = self.programs.evaluator.traced(state.params, self.shapes.key)
    return found + [
      self._program(f'evaluate {name}', traced, state, state.params, EXAMS)
      for name, traced in exams
    ]

  def _judges(self) -> list[Program]:
    state = self.shapes.states[0]
    return [
      self._program(f'reward model {k}', j.traced(), state, j.abstract)
      for k, j in self.judges.items()
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
    frozen = [judge.abstract for judge in self.judges.values()]
    whole = sharding.device_bytes((state, frozen))
    beside = whole - sharding.device_bytes(held)
    kind = name.partition('[')[0]
    return Program(name, traced, beside, REMEDIES.get(kind, remedies))


def _longest_first(
  programs: Callable[[int], list[Program]], lengths: set[int]
) -> list[Program]:
  """The programs of each length."""
  longest_first = sorted(lengths, reverse=True)
  return [each for length in longest_first for each in programs(length)]


def _floats(*shape: int) -> Any:
  return jax.ShapeDtypeStruct(shape, jnp.float32)
