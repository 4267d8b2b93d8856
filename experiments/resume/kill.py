"""Does a killed run end with the bits of one that was never killed?

  python experiments/resume/kill.py --kills=10

Runs tiny configs (this file is their config file) to the end, then again with
SIGKILL: each killed run dies once at a named point (inside a rollout, between
the files of a step, before, inside and after the write of a checkpoint, before
and after the export) and once at a random moment, is started again each time,
and must end with the same parameters, optimiser state, reference, metrics and
samples. Exits with 1 if one does not.
"""

import argparse
from collections.abc import Mapping
import hashlib
import itertools
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from ml_collections import ConfigDict

from configs import base

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAVE_EVERY = 3
NUM_ITERATIONS = 12
# The switch lies off, on, off a checkpoint.
SFT_STEPS = {'refresh': 4, 'ema': 6, 'late': 4, 'critic': 4}


def get_config(variant: str = 'refresh') -> ConfigDict:
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='arithmetic', num_digits=1)
  )
  config.model = dict(
    name='transformer', num_layers=1, model_dim=16, mlp_dim=32, num_heads=2,
    num_kv_heads=1, head_dim=8, max_length=16,
  )  # fmt: skip
  config.rewards = dict(
    digits=dict(name='digits', weight=1.0),
    exact=dict(name='exact', weight=1.0),
  )
  config.sampling.num_samples = 4
  config.sampling.max_new_tokens = 3
  config.sft.num_steps = SFT_STEPS[variant]
  config.sft.batch_size = 16
  config.rl.num_iterations = NUM_ITERATIONS
  config.rl.num_prompts = 4
  config.rl.num_epochs = 2
  config.rl.num_minibatches = 2
  config.filter.informative_only = True
  config.filter.max_rollouts = 3
  config.checkpoint.every = SAVE_EVERY
  config.evaluation = dict(
    every=5, grader='exact', threshold=1.0, exploit_threshold=None,
    num_prompts=8, batch_size=8, num_samples=0, ks=(1,),
  )  # fmt: skip
  if variant == 'refresh':
    config.kl.loss_coef = 0.05
    config.reference = dict(
      update='refresh', decay=0.0, every=4, memory='device'
    )
  elif variant == 'ema':
    config.kl.reward_coef = 0.05
    config.reference = dict(update='ema', decay=0.9, every=1, memory='device')
  elif variant == 'critic':
    config.advantage = dict(name='gae')
    config.critic.network = dict(name='copied')
    config.kl.reward_coef = 0.05
    config.kl.controller = dict(name='adaptive_coef', target=0.1, horizon=100.0)
    config.rl.kl_stop = 0.01
  else:  # completions are under way when a checkpoint is written
    config.filter.informative_only = False
    config.rl.num_minibatches = 1
    config.sampling.carry_over = config.rl.staleness = 1
    config.correction = dict(name='truncated')
  return config


def num_steps(variant: str) -> int:
  """Steps of a run: supervised ones and iterations."""
  return SFT_STEPS[variant] + NUM_ITERATIONS


class Fault(NamedTuple):
  """Death at a named point, see `postrain.workdir.die_at`."""

  point: str
  step: int


class Moment(NamedTuple):
  """Death so many seconds after the line of a step, or after the start."""

  step: int | None
  seconds: float


def start(
  directory: str, variant: str, cache: str, kill: Fault | Moment | None = None
) -> tuple[int, str]:
  """Run the command until it ends or is killed: exit status, last line."""
  command = [
    sys.executable, str(ROOT / 'experiments' / 'train.py'),
    f'--config={pathlib.Path(__file__).resolve()}:{variant}',
    f'--workdir={directory}',
  ]  # fmt: skip
  fault = {}
  if isinstance(kill, Fault):
    fault['POSTRAIN_FAULT'] = f'{kill.point}:{kill.step}'
  with subprocess.Popen(
    command, env={**environment(cache), **fault}, stdout=subprocess.PIPE,
    text=True,
  ) as process:  # fmt: skip
    lines = iter(process.stdout)
    last = ''
    if isinstance(kill, Moment):
      wanted = () if kill.step is None else lines
      for last in wanted:
        if last.split()[:2] == ['step', f'{kill.step}/{num_steps(variant)}']:
          break
      time.sleep(kill.seconds)
      process.kill()
    for line in lines:
      last = line
  return process.returncode, last.strip()


def environment(cache: str) -> Mapping[str, str]:
  """Restarts read what the first run compiled."""
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }


def fingerprints(directory: str) -> dict[str, str]:
  """Digests of all that a run must reproduce."""
  files = [
    pathlib.Path(directory, name)
    for name in ('metrics.jsonl', 'samples.jsonl', 'export/model.safetensors')
  ]
  digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
  return {**digests, 'state': state_digest(directory)}


def state_digest(directory: str) -> str:
  """Digest of the bits of every array in the newest checkpoint."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  path = pathlib.Path(directory, 'checkpoints').resolve()
  newest = max(int(p.name) for p in path.iterdir() if p.name.isdigit())
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(path / str(newest) / 'default')
  digest = hashlib.sha256(str(newest).encode())
  for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    digest.update(jax.tree_util.keystr(leaf_path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def faults(variant: str) -> list[Fault]:
  """Every named point once."""
  end, supervised = num_steps(variant), SFT_STEPS[variant]
  return [
    Fault('in_checkpoint', 2 * SAVE_EVERY),
    Fault('in_rollout', supervised + 1),
    Fault('between_files', supervised + 3),
    Fault('before_checkpoint', 3 * SAVE_EVERY),
    Fault('in_checkpoint', SAVE_EVERY),
    Fault('after_checkpoint', 4 * SAVE_EVERY),
    Fault('between_files', 1),
    Fault('before_export', end),
    Fault('in_checkpoint', end),
    Fault('after_export', end),
  ]


def random_moment(draw: random.Random, variant: str) -> Moment:
  """Most after a random step, some while the process starts or restores."""
  if draw.random() < 0.2:
    return Moment(None, draw.uniform(0.0, 4.0))
  step = draw.randrange(num_steps(variant))
  return Moment(step, draw.uniform(0.0, 0.3) ** 2)


def killed_run(
  directory: str, variant: str, cache: str, kills: list[Fault | Moment]
) -> tuple[int, str]:
  """Start a run as often as it is killed, and once more: deaths, last line."""
  deaths = 0
  for kill in kills:
    status, _ = start(directory, variant, cache, kill)
    deaths += status == -9
  status, last = start(directory, variant, cache)
  if status:
    raise RuntimeError(f'{directory}: the last start ended with {status}')
  return deaths, last


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=10, help='killed runs')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  arguments = parser.parse_args()
  draw = random.Random(arguments.seed)
  with tempfile.TemporaryDirectory() as folder:
    cache = os.path.join(folder, 'cache')
    expected, different = {}, 0
    print('run  config   deaths  kills, and what differs', flush=True)
    for variant, name in itertools.product(SFT_STEPS, ('fresh', 'cached')):
      directory = os.path.join(folder, f'{variant}_{name}')
      killed_run(directory, variant, cache, [])
      found = fingerprints(directory)
      expected.setdefault(variant, found)
      different += report(name, variant, 0, [], found, expected[variant])
    for number in range(arguments.kills):
      variant = list(SFT_STEPS)[number % len(SFT_STEPS)]
      points = faults(variant)
      kills = [points[number % len(points)], random_moment(draw, variant)]
      kills.sort(key=lambda kill: -1 if kill.step is None else kill.step)
      directory = os.path.join(folder, str(number))
      deaths, _ = killed_run(directory, variant, cache, kills)
      found = fingerprints(directory)
      different += report(
        str(number), variant, deaths, kills, found, expected[variant]
      )
  print(f'{different} of {arguments.kills} killed runs differ')
  sys.exit(different > 0)


def report(
  name: str, variant: str, deaths: int, kills: list[Fault | Moment],
  found: dict[str, str], expected: dict[str, str],
) -> bool:  # fmt: skip
  """Print a row of the table; True if anything differs."""
  wrong = [k for k in expected if found[k] != expected[k]]
  shown = ', '.join(
    f'{kill.point}:{kill.step}'
    if isinstance(kill, Fault)
    else f'step {kill.step} + {kill.seconds:.3f} s'
    for kill in kills
  )
  verdict = f'DIFFER: {", ".join(wrong)}' if wrong else 'same bits'
  print(f'{name:>6} {variant:8} {deaths:>4}   {shown or "-"}: {verdict}',
        flush=True)  # fmt: skip
  return bool(wrong)


if __name__ == '__main__':
  main()
