"""Wall time from the start of a process to the first update, cold and warm.

  python benchmarks/startup.py

GRPO with a reference on a decoder of a million parameters (4 layers of 128,
vocabulary 64, 8 prompts of 16 tokens, 8 completions of 32 tokens each, four
micro-batches). Each side is a process of its own; cold has an empty cache of
compiled programs, warm the one that cold left. Least of the rounds: another
process on the same cores doubles these times.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import base
from postrain.types import Task

ROOT = pathlib.Path(__file__).resolve().parents[1]


def get_config() -> ConfigDict:
  """This file is the config of the runs that it times."""
  config = base.get_config()
  config.environment = dict(name='task', task=dict(name='startup:echo'))
  config.model = dict(
    name='transformer', num_layers=4, model_dim=128, mlp_dim=512, num_heads=4,
    num_kv_heads=4, head_dim=32, max_length=64, family='qwen2', qkv_bias=True,
  )  # fmt: skip
  config.rewards = dict(echo=dict(name='echo', weight=1.0))
  config.sampling.max_new_tokens = 32
  config.rl.num_iterations = 2
  config.rl.num_prompts = 8
  config.rl.num_micro_batches = 4
  config.kl.loss_coef = 0.04
  config.evaluation.grader = 'echo'
  config.checkpoint.export = False
  return config


def echo(*, prompt_length: int = 16, length: int = 32) -> Task:
  """Say the first token of the prompt again and again."""

  def prompt(key, held_out=False):
    tokens = jax.random.randint(key, (prompt_length,), 1, 64)
    return tokens, jnp.ones(prompt_length, bool)

  def reward(prompts, completions, mask):
    return jnp.float32(completions == prompts[:, :1]).mean(-1)

  return Task(64, 0, (), prompt_length, length, prompt, {'echo': reward}, str)


def first_update(cache: str) -> float:
  """Seconds until the row of the first step is printed."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [
      sys.executable, str(ROOT / 'experiments' / 'train.py'),
      f'--config={ROOT / "benchmarks" / "startup.py"}',
      f'--workdir={workdir}/run',
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT / 'benchmarks'), str(ROOT)])
    settings = {'JAX_COMPILATION_CACHE_DIR': cache, 'PYTHONPATH': paths}
    start = time.perf_counter()
    with subprocess.Popen(
      command,
      env={**os.environ, **settings},
      stdout=subprocess.PIPE,
      text=True,
    ) as process:
      for line in process.stdout:
        if line.startswith('step 0/'):
          seconds = time.perf_counter() - start
    if process.returncode:
      raise RuntimeError(f'{command} ended with {process.returncode}')
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  sides = {'cold': [], 'warm': []}
  for _ in range(parser.parse_args().rounds):
    with tempfile.TemporaryDirectory() as cache:
      for side in sides.values():
        side.append(first_update(cache))
  print('| cache | start to first update |')
  print('| --- | --- |')
  for name, found in sides.items():
    print(f'| {name} | {min(found):.1f} s |')


if __name__ == '__main__':
  main()
