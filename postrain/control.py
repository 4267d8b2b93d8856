"""What moves beside the parameters: a coefficient, an end, a reference."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from postrain import kl, sharding
from postrain.adapted import trainable
from postrain.binding import bind
from postrain.recipe import Recipe
from postrain.train_step import value
from postrain.types import Mean, Metrics, Params


def make_stop(recipe: Recipe) -> Callable[..., Any] | None:
  """Make ``stop`` of `postrain.train_step.make_train_step`.

  It holds from the update on at which the policy is found too far from that of
  the rollout, until the next iteration; None without a limit.
  """
  limit = recipe.rl.kl_stop
  if limit is None:
    return None
  num_updates = recipe.rl.num_epochs * recipe.rl.num_minibatches

  def stop(state: Any, metrics: Metrics) -> Any:
    first = (state.step - recipe.num_offline_steps) % num_updates == 0
    over = value(metrics['policy/old_k1']) > 1.5 * limit
    return over | (state.stopped & ~first)

  return stop


def make_control(recipe: Recipe) -> Callable[..., Any] | None:
  """Make ``control`` of `postrain.algorithm.Algorithm`.

  Raises:
    ValueError: the coefficient could change its sign.
  """
  if recipe.kl.controller is None:
    return None
  number = recipe.rl.num_prompts * recipe.sampling.num_samples
  move = bind(kl, {'num_sequences': number, **recipe.kl.controller})
  jax.eval_shape(move, *[jax.ShapeDtypeStruct((), jnp.float32)] * 2)  # refuses

  def control(kl_coef: Any, divergence: Mean) -> Any:
    return move(kl_coef, value(divergence))

  return control


def make_move_reference(recipe: Recipe) -> Callable[..., Params]:
  """Make ``move_reference`` of `postrain.algorithm.Algorithm`."""
  choices = recipe.reference

  def move(ref_params: Params, params: Params, iteration: Any) -> Params:
    """The reference after ``iteration`` (from 0) has updated ``params``."""
    if choices.update == 'frozen':
      return ref_params
    if choices.memory == 'host':
      ref_params = sharding.fetched(ref_params)
    params = trainable(params)
    if choices.update == 'ema':
      return jax.tree.map(
        lambda r, p: choices.decay * r + (1 - choices.decay) * p,
        ref_params,
        params,
      )
    due = (iteration + 1) % choices.every == 0
    return jax.tree.map(lambda r, p: jnp.where(due, p, r), ref_params, params)

  return move
