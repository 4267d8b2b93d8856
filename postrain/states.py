"""The state of a run: fresh, of its next stage, and as shapes to restore."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import sharding
from postrain.actors import Actor
from postrain.adapted import trainable
from postrain.algorithm import Algorithm
from postrain.keys import run_key
from postrain.recipe import Recipe
from postrain.types import Carried, Params, Samples, TrainState


class States:
  """Makes the states of a run, each leaf placed in its shards.

  A frozen base is in ``params`` alone: the reference shares it.

  Each stage has an optimiser of its own, so the structure of a state follows
  from the number of steps done.
  """

  def __init__(
    self, recipe: Recipe, actor: Actor, algorithm: Algorithm, mesh: Any
  ):
    self.recipe, self.actor, self.algorithm = recipe, actor, algorithm
    self.mesh = mesh

  def fresh(self) -> TrainState:
    """The state before the first step."""
    shardings = self._param_shardings()
    key = run_key(self.recipe.seed, 'init')
    params = {'actor': self.actor.init(key, shardings['actor'])}
    if not self.recipe.sft.num_steps:
      return self.begin_next(params, 0)
    optimizer = self.algorithm.sft_optimizer
    placed = self._opt_state_shardings(optimizer, params)
    init = jax.jit(optimizer.init, out_shardings=placed)
    return TrainState(self._counter(0), params, init(trainable(params)))

  def begin_next(self, params: dict[str, Params], step: int) -> TrainState:
    """A new optimiser, and the policy of this moment as the reference."""
    begin = self.begin if self._online(step + 1) else self.begin_preference
    opt_state, reference = begin(trainable(params))
    return TrainState(self._counter(step), params, opt_state, reference)

  @functools.cached_property
  def begin(self) -> Any:
    """Jitted: trained parameters -> (optimiser's state, reference)."""
    return self._beginning(self.recipe.num_offline_steps + 1)

  @functools.cached_property
  def begin_preference(self) -> Any:
    """Likewise, of the stage on preferences."""
    return self._beginning(self.recipe.sft.num_steps + 1)

  def _beginning(self, step: int) -> Any:
    optimizer, keeps = self._optimizer(step), self._keeps_reference(step)

    def begin(params: Any) -> tuple[Any, Params | None]:
      reference = jax.tree.map(jnp.copy, params['actor']) if keeps else None
      return optimizer.init(params), reference

    state = self.abstract(step)
    placed = sharding.of((state.opt_state, state.ref_params))
    return jax.jit(begin, out_shardings=placed)

  # What stage the state after so many steps is of.

  def _online(self, step: int) -> bool:
    return not 0 < step <= self.recipe.num_offline_steps

  def _supervised(self, step: int) -> bool:
    return 0 < step <= self.recipe.sft.num_steps

  def _optimizer(self, step: int) -> Any:
    algorithm: Any = self.algorithm
    if self._supervised(step):
      return algorithm.sft_optimizer
    if self._online(step):
      return algorithm.rl_optimizer
    return algorithm.preferring.optimizer  # there is one: it has steps

  def _keeps_reference(self, step: int) -> bool:
    if self._supervised(step):
      return False
    if self._online(step):
      return self.algorithm.uses_reference
    preferring = self.algorithm.preferring
    return preferring is not None and preferring.uses_reference

  def _counter(self, step: int) -> jax.Array:
    return jax.device_put(np.int32(step), sharding.replicated(self.mesh))

  def abstract(self, step: int) -> TrainState:
    """Shapes, dtypes and shardings of the state after ``step`` steps."""
    shardings = self._param_shardings()
    params = sharding.abstract({'actor': self.actor.model.shapes}, shardings)
    optimizer = self._optimizer(step)
    opt_state = sharding.abstract(
      jax.eval_shape(optimizer.init, trainable(params)),
      self._opt_state_shardings(optimizer, params),
    )
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    reference = None
    if self._keeps_reference(step):
      reference = trainable(params['actor'])
      if self._online(step) and self.recipe.reference.memory == 'host':
        reference = sharding.in_host(reference)
    return TrainState(
      step=sharding.abstract(counter, sharding.replicated(self.mesh)),
      params=params,
      opt_state=opt_state,
      ref_params=reference,
    )

  def stored(self, step: int) -> TrainState:
    """What a checkpoint holds: `abstract`, and completions under way."""
    begun = self.recipe.num_offline_steps < step < self.recipe.num_steps
    carried = self.carried if begun else None
    return dataclasses.replace(self.abstract(step), carried=carried)

  @functools.cached_property
  def carried(self) -> Carried | None:
    """Shapes of what is under way between iterations, if anything is."""
    recipe, sampling = self.recipe, self.recipe.sampling
    if sampling.carry_over is None and not recipe.rl.staleness:
      return None
    rows = recipe.rl.num_prompts * sampling.num_samples
    shape = (rows, sampling.max_new_tokens)

    def of(dtype: Any, shape: tuple[int, ...] = shape) -> Any:
      place = sharding.replicated(self.mesh)
      return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    samples = Samples(
      tokens=of(np.int32),
      mask=of(bool),
      sampler_logprobs=of(np.float32),
      model_logprobs=of(np.float32),
      truncated=of(bool, (rows,)),
      version=of(np.int32),
    )
    if sampling.carry_over is None:
      return Carried(samples)
    return Carried(samples, of(np.int32, (recipe.rl.num_prompts,)))

  def _param_shardings(self) -> dict[str, Any]:
    return {'actor': sharding.param_shardings(self.mesh, self.actor.model)}

  def _opt_state_shardings(self, optimizer: Any, params: Any) -> Any:
    shardings = trainable(self._param_shardings())
    return sharding.opt_state_shardings(
      self.mesh, optimizer, trainable(params), shardings
    )
