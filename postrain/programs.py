"""The jitted functions of a run."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import sharding
from postrain.algorithm import Algorithm
from postrain.batches import minibatch_rows
from postrain.compilation import make_jit
from postrain.environments import Environment, Units
from postrain.evaluator import Evaluator
from postrain.keys import minibatch_key, run_key
from postrain.masks import informative_groups
from postrain.packing import layouts, real_tokens, with_slots
from postrain.pair_evaluation import Judging
from postrain.preferring import Preferring, comparisons
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
    self.layouts = layouts(recipe, environment)
    self.shapes = Shapes(recipe, states, self.layouts)

    def packed(name: str, fn: Callable) -> Callable:
      layout = self.layouts.get(name)
      return fn if layout is None else layout.reading(fn)

    # What comes out is laid out as it goes in: said, not left to the compiler,
    # for all is compiled before anything exists, and once.
    rows, same = sharding.rows(states.mesh), sharding.replicated(states.mesh)
    online, supervised = map(sharding.of, self.shapes.states)
    self.sample, self.extend, self.greedy = map(
      _sampler, (algorithm.sample, algorithm.extend, algorithm.greedy)
    )

    def prepare(kl_coef: Any, *rest: Any) -> tuple:
      return algorithm.prepare(*rest, kl_coef=kl_coef)

    jit = make_jit()
    self.jit_prepare = jit(
      self._to_leaves(packed('prepare', prepare)),
      out_shardings=(rows, same, None),
    )
    self.jit_update = jit(
      self._from_leaves(packed('update', algorithm.update)),
      donate_argnums=0,
      out_shardings=(apart(online)[0], same),
    )
    self.jit_imitate = jit(
      packed('imitate', algorithm.imitate),
      donate_argnums=0,
      out_shardings=(supervised, same),
    )
    self.jit_prefer, self.judging = None, None
    if algorithm.preferring is not None:
      self._make_preferring(algorithm.preferring, algorithm.write)
    self.move_reference = algorithm.move_reference
    if recipe.reference.update != 'frozen':
      self.move_reference = jit(
        algorithm.move_reference, out_shardings=online.ref_params
      )
    self.control: Any = algorithm.control and jit(
      algorithm.control, out_shardings=same
    )
    self.informative, self.merge = jit(informative_groups), jit(_merge)
    self.minibatches = jit(
      functools.partial(_minibatches, recipe), out_shardings=same
    )

  def _make_preferring(
    self, preferring: Preferring, write: Callable[..., Samples] | None
  ) -> None:
    jit, mesh, recipe = make_jit(), self.states.mesh, self.recipe
    changed, _ = apart(sharding.of(self.shapes.preferring))
    self.jit_prefer: Any = jit(
      preferring.prefer,
      donate_argnums=0,
      out_shardings=(changed, sharding.replicated(mesh)),
    )
    self.write = _sampler(write)
    self.refer = jit(preferring.refer)
    self.refresh: Any = jit(
      lambda params: jax.tree.map(jnp.copy, params['actor']),
      out_shardings=sharding.of(self.shapes.preferring.ref_params),
    )
    held_out = comparisons(recipe, self.environment).held_out
    if recipe.evaluation.every and held_out is not None:
      self.judging: Judging | None = Judging(recipe, preferring, held_out)

  # Of the three that may be packed: arrays of the host in, which are placed.

  def imitate(
    self, state: TrainState, tokens: Any, valid: Any, mask: Any
  ) -> tuple[TrainState, Metrics]:
    """That of `Algorithm`; the state is donated."""
    arrays, packing = (tokens, valid, mask), None
    if layout := self.layouts.get('imitate'):
      widths = ((0, 0), (0, layout.length - tokens.shape[1]))
      arrays = tuple(np.pad(x, widths) for x in arrays)
      packing = layout.pack(arrays[1])
    return self.jit_imitate(state, *self._put((*arrays, packing)))

  def prefer(
    self, state: TrainState, units: Units
  ) -> tuple[TrainState, Metrics]:
    """That of `postrain.preferring.Preferring`; the state is donated."""
    state, reference = apart(state)
    state, figures = self.jit_prefer(state, reference, *self._put(units))
    return dataclasses.replace(state, ref_params=reference), figures

  def prepare(
    self, params: dict[str, Params], ref_params: Params | None, prompts: Any,
    prompt_mask: Any, samples: Samples, rewards: Any, signals: Any,
    kl_coef: Any = None,
  ) -> tuple[Batch, Metrics, dict[str, Any]]:  # fmt: skip
    """That of `Algorithm`."""
    packing, arrays = None, (prompts, prompt_mask, samples)
    if 'update' in self.layouts:
      arrays = with_slots(*arrays, self.environment.prompt_length)
    if layout := self.layouts.get('prepare'):
      packing = layout.pack(real_tokens(*arrays[1:]))
    placed = self._put((*arrays, rewards, signals, packing))
    leaves, *others = self.jit_prepare(kl_coef, params, ref_params, *placed)
    return self._batch(leaves), *others

  def update(
    self, state: TrainState, batch: Batch, rows: Any, key: Any, number: int
  ) -> tuple[TrainState, Metrics]:
    """That of `Algorithm`, the update of this number; donates the state."""
    packing, shown = None, self._put(self._demonstrations(number))
    if layout := self.layouts.get('update'):  # waits for the scores
      valid, chosen = sharding.on_host((batch.valid, rows))
      packing = self._put(layout.pack(valid[chosen]))
    state, reference = apart(state)
    leaves = jax.tree.leaves(batch)
    state, figures = self.jit_update(state, leaves, rows, key, shown, packing)
    return dataclasses.replace(state, ref_params=reference), figures

  def _demonstrations(self, number: int) -> Any:
    """Those beside an update, all of one shape; behind those of the warm-up."""
    choices = self.recipe.ptx
    if choices.coef is None:
      return None
    draw: Any = self.environment.demonstrations  # some, says check_assembly
    step = self.recipe.sft.num_steps + number
    arrays = draw(step, choices.batch_size, choices.num_examples)
    more = self.environment.demonstration_length - arrays[0].shape[1]
    return tuple(np.pad(x, ((0, 0), (0, more))) for x in arrays)

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


def apart(state: TrainState) -> tuple[TrainState, Any]:
  """What an update changes, and the reference, which it need not carry."""
  return dataclasses.replace(state, ref_params=None), state.ref_params


def _sampler(fn: Callable | None) -> Any:
  return fn and make_jit()(sharding.for_sampling(fn))


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
