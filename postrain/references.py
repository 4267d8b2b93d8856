"""The frozen, averaged or refreshed reference of a run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from postrain import kl, objectives
from postrain.batches import call_by_name
from postrain.recipe import Recipe
from postrain.types import Mean, Metrics, Params


def uses_reference(recipe: Recipe) -> bool:
  """Whether anything reads the reference."""
  coefs = (recipe.kl.reward_coef, recipe.kl.loss_coef)
  return any(coef is not None for coef in coefs)


def make_move_reference(recipe: Recipe) -> Callable[..., Params]:
  """Bind how the reference follows the policy."""
  choices = recipe.reference

  def move(ref_params: Params, params: Params, iteration: Any) -> Params:
    """The reference after ``iteration`` (from 0) has updated ``params``."""
    if choices.update == 'frozen':
      return ref_params
    if choices.update == 'ema':
      return jax.tree.map(
        lambda r, p: choices.decay * r + (1 - choices.decay) * p,
        ref_params,
        params,
      )
    due = (iteration + 1) % choices.every == 0
    return jax.tree.map(lambda r, p: jnp.where(due, p, r), ref_params, params)

  return move


def reference_metrics(figures: dict[str, Any], mask: Any) -> Metrics:
  """KL to the reference, per sequence and per token."""
  k1 = jnp.where(mask, call_by_name(kl.k1, figures), 0)
  k3 = call_by_name(kl.k3, figures)
  sequences = mask.any(-1)
  return {
    'reference/kl_sequence': Mean(k1.sum(), sequences.sum(dtype=jnp.float32)),
    'reference/kl_token': objectives.masked_mean(k3, mask),
  }
