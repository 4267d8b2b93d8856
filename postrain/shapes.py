"""What the programs of a run will be called with, as shapes with shardings."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import sharding
from postrain.adapted import trainable
from postrain.environments import Comparisons
from postrain.packing import Layout
from postrain.recipe import Recipe
from postrain.states import States
from postrain.types import TrainState


class Shapes:
  """Shapes that follow from the recipe, the mesh and the slots of prompts."""

  def __init__(
    self, recipe: Recipe, states: States, layouts: dict[str, Layout]
  ):
    self._recipe, self._states, self._layouts = recipe, states, layouts

  @functools.cached_property
  def key(self) -> Any:
    """A key of the run."""
    return self.same(jax.eval_shape(jax.random.key, 0))

  @functools.cached_property
  def states(self) -> tuple[TrainState, TrainState]:
    """Those of the online stage and of the first step."""
    online = self._recipe.num_offline_steps + 1
    return self._states.abstract(online), self._states.abstract(1)

  @functools.cached_property
  def preferring(self) -> TrainState:
    """That of the stage on preferences."""
    return self._states.abstract(self._recipe.sft.num_steps + 1)

  def prompts(self, num_prompts: int, slots: int) -> tuple[Any, ...]:
    """What a sampler takes beside parameters: prompts, mask, key, ids."""
    shape = (num_prompts, slots)
    tokens, mask = self.rows(
      tuple(jax.ShapeDtypeStruct(shape, d) for d in (jnp.int32, bool))
    )
    return tokens, mask, self.key, np.arange(num_prompts, dtype=np.int32)

  def demonstrations(self, num: int, length: int) -> tuple[Any, ...]:
    """Tokens, which are real, and which are trained."""
    shape = (num, length)
    return self.rows(
      tuple(jax.ShapeDtypeStruct(shape, d) for d in (jnp.int32, bool, bool))
    )

  def preferences(
    self, comparisons: Comparisons, length: int
  ) -> tuple[Any, ...]:
    """Those of a step: tokens, which are real, which count, and arrays."""
    num_rows = self._recipe.preference.batch_size * comparisons.unit_size
    tokens, valid, mask = (
      jax.ShapeDtypeStruct((num_rows, length), d)
      for d in (jnp.int32, bool, bool)
    )
    arrays = {
      name: jax.ShapeDtypeStruct((num_rows,), dtype)
      for name, dtype in comparisons.dtypes.items()
    }
    if self._recipe.preference.ref_logprobs == 'cached':
      scored = jax.ShapeDtypeStruct((num_rows, length), jnp.float32)
      arrays['ref_logprobs'] = scored
    return self.rows((tokens, valid, mask, arrays))

  def packings(self, program: str) -> dict[str, Any]:
    """The packings that a program may meet, by name, the largest first."""
    if program not in self._layouts:
      return {'': None}
    shapes = self._layouts[program].shapes()
    return {
      f', {num_rows} rows': self.rows(shapes[num_rows])
      for num_rows in sorted(shapes, reverse=True)
    }

  def same(self, shapes: Any) -> Any:
    """The shapes of arrays that are the same on every device."""
    same = sharding.replicated(self._states.mesh)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=same), shapes
    )

  def rows(self, shapes: Any, repeats: int = 1) -> Any:
    """The shapes of arrays whose rows, so many times, are cut over devices."""
    rows = sharding.rows(self._states.mesh)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        (x.shape[0] * repeats, *x.shape[1:]), x.dtype, sharding=rows
      ),
      shapes,
    )

  def roles(self, frozen: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Bytes on a device: parameters, gradients, the optimiser's state.

    Of the last stage. Gradients are those of a whole update, in at least
    float32; they live inside of it.

    Args:
      frozen: parameters of what else stands beside, by name.
    """
    if self._recipe.rl.num_iterations:
      state = self.states[0]
    elif self._recipe.preference.num_steps:
      state = self.preferring
    else:
      state = self.states[1]
    optimizers = {'actor': state.opt_state}
    if len(state.params) > 1:
      optimizers = state.opt_state.inner_states
    gradients = jax.tree.map(_widened, trainable(state.params))
    found = {
      role: tuple(
        map(sharding.device_bytes, (params, gradients[role], optimizers[role]))
      )
      for role, params in state.params.items()
    }
    if state.ref_params is not None:
      frozen = {'reference': state.ref_params, **frozen}
    for role, params in frozen.items():
      found[role] = sharding.device_bytes(params), 0, 0
    return found


def _widened(leaf: Any) -> Any:
  dtype = jnp.promote_types(leaf.dtype, jnp.float32)
  return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
