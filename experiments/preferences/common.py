"""The task, the policy, and what all parts of the study measure."""

from collections.abc import Callable
import contextlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from postrain import actors, environments, sharding
from postrain.binding import bind
from postrain.checkpoints import Checkpoints
from postrain.keys import run_key
from postrain.sampling import sample
from postrain.scoring import score
from postrain.states import States
from postrain.trainer import Trainer
from postrain.types import Params

LENGTH = 6  # tokens of a completion
SCALE = 20.0  # of the raters
RULE = '|' + ' --- |' * 4


def run_config(seed: int) -> Any:
  """A policy from scratch on words whose worth is hidden; it trains nothing."""
  config = base.get_config()
  config.seed = seed
  config.environment = dict(
    name='task', task=dict(name='preference'), rater=dict(scale=SCALE)
  )
  config.rewards = dict(gold=dict(name='gold', weight=1.0))
  config.model = dict(
    name='transformer', num_layers=2, model_dim=32, mlp_dim=64, num_heads=2,
    num_kv_heads=2, head_dim=16, max_length=8,
  )  # fmt: skip
  config.sampling.max_new_tokens = LENGTH
  config.evaluation.grader = 'gold'
  return config


def made(config: Any) -> tuple[Any, Any]:
  """The environment and the model of a config."""
  environment = bind(environments, config.environment.to_dict())(
    config.seed, config.rewards.to_dict()
  )
  return environment, bind(actors, config.model.to_dict())(environment).model


def make_measure(
  config: Any, num_prompts: int = 512
) -> Callable[[Params, Params], tuple[float, float]]:
  """Make (params, reference) -> gold and KL of held-out completions."""
  environment, model = made(config)
  task = environment.device_task
  prompts = environment.held_out(num_prompts)

  def measure(params: Params, reference: Params) -> tuple[Any, Any]:
    drawn = sample(
      model, params, prompts.tokens, prompts.mask, run_key(0, 'evaluation'),
      num_samples=4, max_new_tokens=LENGTH, stop_ids=task.stop_ids,
      pad_id=task.pad_id,
    )  # fmt: skip
    given = jnp.repeat(prompts.tokens, 4, axis=0)
    tokens = jnp.concatenate([given, drawn.tokens], axis=1)
    behind = ((0, 0), (given.shape[1], 0))
    mask = jnp.pad(drawn.mask, behind)
    valid = mask | (jnp.arange(tokens.shape[1]) < given.shape[1])
    theirs = score(model, reference, tokens, valid, mask).logprobs
    own = jnp.where(drawn.mask, drawn.model_logprobs, 0).sum(-1)
    gold = task.rewards['gold'](given, drawn.tokens, drawn.mask)
    return gold.mean(), (own - theirs.sum(-1)).mean()

  compiled = jax.jit(measure)
  return lambda *params: tuple(float(x) for x in compiled(*params))


def policies(config: Any, directory: pathlib.Path) -> dict[int, Params]:
  """Run a config; its policy at the start and in each checkpoint."""
  trainer = Trainer(config, str(directory))
  trainer.run()
  states = States(
    trainer.recipe, trainer.actor, trainer.algorithm, trainer.mesh
  )
  found = {0: trainer.actor.init(run_key(config.seed, 'init'), None)}
  checkpoints = Checkpoints(
    trainer.path('checkpoints'), keep=None, read_only=True
  )
  with contextlib.closing(checkpoints), sharding.on(trainer.mesh):
    for step in checkpoints.steps():
      state = checkpoints.restore(step, states.stored(step))
      found[step] = state.params['actor']
  return found


def spread(values: Any) -> str:
  """Mean, least and most over seeds."""
  known = [v for v in values if v is not None]
  if len(known) < len(values):
    return f'{len(known)} of {len(values)} seeds get there'
  return f'{np.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})'
