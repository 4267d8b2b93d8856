"""What a mesh does not divide is an error before any compilation."""

import math
from typing import Any

import jax

from postrain import sharding
from postrain.environments import Environment
from postrain.preferring import comparisons
from postrain.recipe import Recipe
from postrain.types import Model

# Logical axis -> what people call it.
DIVIDED = {
  'heads': 'heads (model.num_heads)',
  'kv_heads': 'heads of keys (model.num_kv_heads)',
  'mlp': 'inner units (model.mlp_dim)',
  'vocab': 'ids of the vocabulary',
  'experts': 'experts (model.num_experts)',
  'width': 'dimensions (model.model_dim)',
}


def check_mesh(recipe: Recipe, environment: Environment, model: Model) -> None:
  """Hold a model and its rows against the mesh that cuts them.

  An axis of -1, of which nobody knows yet what it becomes, counts as 1.

  Raises:
    ValueError: an axis does not divide what it cuts; names both.
  """
  check_model(recipe, model)
  if recipe.mesh.expert > 1 and not model.num_experts:
    raise ValueError(
      f'mesh.expert={recipe.mesh.expert}, but model {recipe.model["name"]!r}'
      ' has no experts: set it to 1, and mesh.data or mesh.fsdp in its place'
    )
  for what, length in _lengths(recipe, environment).items():
    if length % max(recipe.mesh.context, 1):
      raise ValueError(
        f'mesh.context={recipe.mesh.context} does not divide the {length}'
        f' tokens of {what}: take a divisor, or other lengths'
      )


def check_model(recipe: Recipe, model: Model) -> None:
  """Refuse axes that would leave matrices whole on each of their devices.

  Fewer heads of keys than `mesh.tensor` are repeated, if they divide it.

  Raises:
    ValueError: an axis does not divide the model; names both.
  """
  if model.logical_axes is None:
    return
  largest: dict[str, int] = {}  # scales of quantised matrices are smaller

  def measure(leaf: jax.ShapeDtypeStruct, names: tuple) -> None:
    for name, size in zip(names, leaf.shape, strict=True):
      largest[name] = max(size, largest.get(name, 0))

  jax.tree.map(measure, model.shapes, model.logical_axes())
  for name in (name for name in DIVIDED if name in largest):
    axis: Any = dict(sharding.RULES)[name]  # of these names one each
    size = largest[name]
    parts = max(getattr(recipe.mesh, axis), 1)
    if size % parts and (name != 'kv_heads' or parts % size):
      raise ValueError(
        f'mesh.{axis}={parts} does not divide the {size} {DIVIDED[name]}: each'
        ' of its devices would hold them all; take a divisor, and other axes'
        ' for the rest of the devices'
      )


def num_row_shards(recipe: Recipe) -> int:
  """Devices that share the rows of a batch, so far as they are known."""
  sizes = (getattr(recipe.mesh, axis) for axis in sharding.BATCH_AXES)
  return math.prod(max(size, 1) for size in sizes)


def _lengths(recipe: Recipe, environment: Environment) -> dict[str, int]:
  """The longest rows whose tokens are cut, by what they are."""
  rl, sft, preference = recipe.rl, recipe.sft, recipe.preference
  completion, found = recipe.sampling.max_new_tokens, {}
  if rl.num_iterations and rl.row_length:
    found['rl.row_length'] = rl.row_length
  elif rl.num_iterations and rl.share_prompts:
    found['sampling.max_new_tokens'] = completion
  elif rl.num_iterations:
    length = environment.prompt_length + completion
    found['a prompt with sampling.max_new_tokens'] = length
  if sft.num_steps and sft.row_length:
    found['sft.row_length'] = sft.row_length
  elif sft.num_steps:
    found['a demonstration'] = environment.demonstration_length
  if recipe.ptx.coef is not None:
    found['a demonstration'] = environment.demonstration_length
  if preference.num_steps and preference.learns == 'policy':
    found['preferences'] = comparisons(recipe, environment).length
  return found
