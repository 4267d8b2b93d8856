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
from postrain.compilation import make_jit
from postrain.keys import run_key
from postrain.recipe import Recipe
from postrain.types import Carried, Model, Params, Samples, TrainState


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
    if not self._online(step + 1):
      opt_state, reference = self.begin_preference(trainable(params))
      digest = None
      if self.recipe.preference.ref_logprobs == 'cached':
        place = sharding.replicated(self.mesh)
        digest = jax.device_put(np.zeros(8, np.uint32), place)
      return TrainState(
        self._counter(step), params, opt_state, reference, ref_digest=digest
      )
    critic, given = self.algorithm.critic, None
    if critic is not None and critic.read is not None:
      given = critic.read(self._param_shardings()['critic'])
    opt_state, reference, begun = self.begin(trainable(params), given)
    if critic is not None:
      params = {**params, 'critic': begun if given is None else given}
    place = sharding.replicated(self.mesh)
    moving = jax.device_put(self._moving, place)
    counter = self._counter(step)
    return TrainState(counter, params, opt_state, reference, **moving)

  @property
  def _moving(self) -> dict[str, Any]:
    """Numbers of the online stage that move, at its beginning."""
    kl, moving = self.recipe.kl, {}
    if kl.controller is not None:
      coef = kl.reward_coef if kl.loss_coef is None else kl.loss_coef
      moving['kl_coef'] = np.float32(coef)
    if self.recipe.rl.kl_stop is not None:
      moving['stopped'] = np.bool_(False)
    return moving

  @functools.cached_property
  def begin_preference(self) -> Any:
    """Jitted: trained parameters -> (optimiser's state, reference)."""
    step = self.recipe.sft.num_steps + 1
    optimizer, keeps = self._optimizer(step), self._keeps_reference(step)

    def begin(params: Any) -> tuple[Any, Params | None]:
      reference = jax.tree.map(jnp.copy, params['actor']) if keeps else None
      return optimizer.init(params), reference

    state = self.abstract(step)
    placed = sharding.of((state.opt_state, state.ref_params))
    return make_jit()(begin, out_shardings=placed)

  @functools.cached_property
  def begin(self) -> Any:
    """Jitted: trained parameters -> (optimiser's state, reference, critic).

    The critic is None where there is none, or its parameters were ``given``.
    """
    algorithm = self.algorithm

    critic = algorithm.critic

    def begin(params: Any, given: Params | None) -> tuple[Any, ...]:
      keeps = algorithm.uses_reference
      reference = jax.tree.map(jnp.copy, params['actor']) if keeps else None
      begun = None
      if critic is not None and critic.begin is not None:
        begun = critic.begin(params['actor'])
      if critic is not None:
        params = {**params, 'critic': begun if given is None else given}
      return algorithm.rl_optimizer.init(params), reference, begun

    state = self.abstract(self.recipe.num_offline_steps + 1)
    made = None
    if critic is not None and critic.begin is not None:
      made = state.params['critic']
    placed = sharding.of((state.opt_state, state.ref_params, made))
    return make_jit()(begin, out_shardings=placed)

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
    online, models = self._online(step), self._models
    if not online:
      models = {'actor': models['actor']}
    shapes = {role: model.shapes for role, model in models.items()}
    shardings = self._param_shardings()
    params = sharding.abstract(shapes, {k: shardings[k] for k in shapes})
    optimizer = self._optimizer(step)
    opt_state = sharding.abstract(
      jax.eval_shape(optimizer.init, trainable(params)),
      self._opt_state_shardings(optimizer, params),
    )
    place = sharding.replicated(self.mesh)

    def number(x: Any) -> Any:
      return jax.ShapeDtypeStruct((), x.dtype, sharding=place)

    moving = jax.tree.map(number, self._moving) if online else {}
    cached = self.recipe.preference.ref_logprobs == 'cached'
    if cached and not online and not self._supervised(step):
      digest = jax.ShapeDtypeStruct((8,), np.uint32, sharding=place)
      moving = {'ref_digest': digest}
    reference = None
    if self._keeps_reference(step):
      reference = trainable(params['actor'])
      if online and self.recipe.reference.memory == 'host':
        reference = sharding.in_host(reference)
    return TrainState(
      step=number(np.int32(0)),
      params=params,
      opt_state=opt_state,
      ref_params=reference,
      **moving,
    )

  def stored(self, step: int) -> TrainState:
    """What a checkpoint holds: `abstract`, and completions under way."""
    begun = self.recipe.num_offline_steps < step < self.recipe.num_steps
    carried = self.carried if begun else None
    return dataclasses.replace(self.abstract(step), carried=carried)

  def all_stored(self, start: int) -> list[Any]:
    """Shapes of all that checkpoints after step ``start`` will hold."""
    recipe = self.recipe
    ends = {recipe.sft.num_steps, recipe.num_offline_steps, recipe.num_steps}
    stages = [self.stored(step) for step in sorted(ends) if step > start]
    # What is under way lies on the host.
    carried = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.carried
    )
    return [*stages, carried]

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
    return {
      role: sharding.param_shardings(self.mesh, model)
      for role, model in self._models.items()
    }

  @property
  def _models(self) -> dict[str, Model]:
    """What has parameters that train, by role."""
    critic = self.algorithm.critic
    others = {} if critic is None else {'critic': critic.model}
    return {'actor': self.actor.model, **others}

  def _opt_state_shardings(self, optimizer: Any, params: Any) -> Any:
    shardings = self._param_shardings()
    shardings = trainable({role: shardings[role] for role in params})
    return sharding.opt_state_shardings(
      self.mesh, optimizer, trainable(params), shardings
    )
