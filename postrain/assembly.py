"""From a config to all that a run consists of, but for its directory."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from postrain import actors, sharding
from postrain.actors import Actor
from postrain.algorithm import Algorithm, make_algorithm
from postrain.binding import bind
from postrain.checks import check_assembly, check_lengths
from postrain.critics import check_vocabulary
from postrain.environments import Environment
from postrain.evaluator import Evaluator
from postrain.learned_rewards import make_environment
from postrain.mesh_checks import check_model
from postrain.programs import Programs
from postrain.recipe import make_recipe
from postrain.rehearsal import Rehearsal
from postrain.schema import Recipe
from postrain.states import States


@dataclasses.dataclass(frozen=True)
class Assembly:
  """The parts of a run, each made of those before it."""

  recipe: Recipe
  mesh: Any
  environment: Environment
  actor: Actor
  algorithm: Algorithm
  states: States
  evaluator: Evaluator
  programs: Programs
  rehearsal: Rehearsal


def assemble(config: Any, devices: Sequence[Any] | None = None) -> Assembly:
  """Assemble a config, and trace a step of each kind.

  Args:
    config: a ConfigDict or dict; see `postrain.schema.Recipe`.
    devices: those of a topology, to compile for what is not here; None for the
      machine's own.

  Raises:
    ValueError: anything that can be known to be wrong before compilation.
  """
  recipe = make_recipe(config)
  mesh = sharding.make_mesh(devices=devices, **vars(recipe.mesh))
  recipe = recipe.on(mesh.shape)
  environment, judges = make_environment(recipe, mesh)
  with sharding.on(mesh):  # which attention and compiler, its devices tell
    actor = bind(actors, recipe.model)(environment)
    algorithm = make_algorithm(
      recipe,
      actor.model,
      pad_id=environment.pad_id,
      stop_ids=environment.stop_ids,
      prompt_length=environment.prompt_length,
    )
    check_assembly(recipe, environment, actor.model)
    check_lengths(recipe, environment, actor.max_length)
    if (critic := algorithm.critic) is not None:
      check_model(recipe, critic.model)
      check_vocabulary(critic, environment.vocab_size)
      check_lengths(recipe, environment, critic.max_length)
    states = States(recipe, actor, algorithm, mesh)
    evaluator = Evaluator(recipe, actor.model, environment)
    programs = Programs(recipe, environment, algorithm, states, evaluator)
    rehearsal = Rehearsal(programs, judges)
    rehearsal.check()
  return Assembly(
    recipe, mesh, environment, actor, algorithm, states, evaluator, programs,
    rehearsal,
  )  # fmt: skip
