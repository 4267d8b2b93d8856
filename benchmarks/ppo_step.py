"""A step of PPO with four roles: what each role keeps, what each phase takes.

  python benchmarks/ppo_step.py [--layers=4 --width=256 --prompts=32 ...]

Phases run one after the other, each waited for; least CPU seconds of the
rounds, on one thread. A step has the first six in a row and the update
``epochs x minibatches`` times: `prepare` is what the trainer calls for old
log-probs, reference, values and advantages, whose parts stand above it.
"""

import argparse
from collections.abc import Callable
import functools
import os
import sys
import tempfile
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from benchmarks import timing

if __name__ == '__main__':
  timing.one_thread()

import jax
import numpy as np

from configs import ppo_preferences
from postrain import hub
from postrain.compilation import by_role
from postrain.keys import run_key
from postrain.models.config import Config
from postrain.models.heads import with_labels
from postrain.models.transformer import transformer
from postrain.preparation import join_prompts
from postrain.scoring import score
from postrain.trainer import Trainer
from postrain.values import token_values


def make_trainer(flags: argparse.Namespace, directory: str) -> Trainer:
  """The four roles, all of one architecture; the reward model scores 0."""
  judge = os.path.join(directory, 'judge')
  config = ppo_preferences.get_config(judge)
  config.environment.task.completion_length = flags.tokens
  config.sampling.max_new_tokens = flags.tokens
  config.model = dict(
    name='transformer', num_layers=flags.layers, model_dim=flags.width,
    mlp_dim=4 * flags.width, num_heads=4, num_kv_heads=4,
    head_dim=flags.width // 4, max_length=flags.tokens + 2,
  )  # fmt: skip
  config.rl.num_prompts = flags.prompts
  config.rl.num_minibatches = 1
  shape = {k: v for k, v in config.model.to_dict().items() if k != 'name'}
  plain = Config(vocab_size=8, **shape)
  trunk = jax.jit(transformer(plain).init)(jax.random.key(0))
  labelled, params = with_labels(plain, trunk)
  hub.save(judge, labelled, params, source={'pad_token_id': 6})
  return Trainer(config, os.path.join(directory, 'run'))


def phases(trainer: Trainer) -> dict[str, Callable[[], Any]]:
  """Each phase as a function of nothing, on the same rollout."""
  recipe, programs = trainer.recipe, trainer._programs
  (judge,) = trainer._rehearsal.judges.values()
  state = trainer._states.fresh()
  prompts = trainer.environment.prompts(0, recipe.rl.num_prompts)
  key, ids = run_key(0, 'sample', 0), np.arange(recipe.rl.num_prompts)
  ids = ids.astype(np.int32)

  def sample() -> Any:
    return programs.sample(state.params, prompts.tokens, prompts.mask, key, ids)

  samples = jax.device_get(sample())
  rewards = judge(prompts, samples)()
  rows = join_prompts(prompts.tokens, prompts.mask, samples)
  scores = jax.jit(functools.partial(score, trainer.actor.model))
  critic: Any = trainer.algorithm.critic
  values = jax.jit(functools.partial(token_values, critic.model))
  parts = np.stack([rewards, rewards], -1)[:, None]

  def prepare() -> Any:
    return programs.prepare(
      state.params, state.ref_params, prompts.tokens, prompts.mask, samples,
      rewards[:, None], {'reward_parts': parts}, state.kl_coef,
    )  # fmt: skip

  batch, *_ = prepare()
  (cut,), (draw,) = programs.minibatches(np.int32(0), np.int32(0), state.step)
  moving = [trainer._states.fresh()]

  def update() -> Any:
    moving[0], figures = programs.update(moving[0], batch, cut, draw, 0)
    return figures

  return {
    'sampling': sample,
    'reward model': lambda: judge(prompts, samples)(),
    'old log-probs': lambda: scores(state.params['actor'], *rows),
    'reference': lambda: scores(state.ref_params, *rows),
    'values': lambda: values(state.params['critic'], *rows),
    'prepare': prepare,
    'update': update,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, number in (
    ('layers', 4), ('width', 256), ('prompts', 32), ('tokens', 64),
    ('rounds', 3),
  ):  # fmt: skip
    parser.add_argument(f'--{name}', type=int, default=number)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    trainer = make_trainer(flags, directory)
    print(by_role(trainer._rehearsal.roles()))
    times = timing.least(phases(trainer), flags.rounds)
  print(f'\n{"phase":17}{"CPU seconds":>12}')
  for name, seconds in times.items():
    print(f'{name:17}{seconds:12.4f}')


if __name__ == '__main__':
  main()
