"""From the start of a process to its first update, cold and warm.

  python benchmarks/startup.py

`experiments/train.py` in a fresh process, one iteration of the least run of a
decoder of 4 layers, 128 wide (1 M parameters), 8 prompts of 8 samples; once
with an empty compilation cache and then with the files that it left. Wall
seconds until `metrics.jsonl` has its first line, the least of the rounds: it
needs a machine that does nothing else.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from configs import base

def get_config():
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='arithmetic', num_digits=2))
  config.model = dict(
    name='transformer', num_layers=4, model_dim=128, mlp_dim=512, num_heads=4,
    num_kv_heads=4, head_dim=32, max_length=64)
  config.rewards = dict(exact=dict(name='exact', weight=1.0))
  config.evaluation.grader = 'exact'
  config.sampling.max_new_tokens = 4
  config.rl.num_prompts = 8
  config.rl.num_iterations = 1
  config.checkpoint.export = False
  return config
"""


def first_update(folder: pathlib.Path, name: str) -> float:
  """Wall seconds of a fresh process until its first metrics are written."""
  command = [
    sys.executable, str(ROOT / 'experiments/train.py'),
    f'--config={folder}/config.py', f'--workdir={folder / name}',
  ]  # fmt: skip
  env = {
    **os.environ,
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    'PYTHONPATH': str(ROOT),
  }
  metrics = folder / name / 'metrics.jsonl'
  start = time.perf_counter()
  process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
  taken = None
  while process.poll() is None:
    if taken is None and metrics.exists() and metrics.stat().st_size:
      taken = time.perf_counter() - start
    time.sleep(0.01)
  if process.returncode:
    raise RuntimeError(f'{" ".join(command)} ended with {process.returncode}')
  return taken or time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  flags = parser.parse_args()
  cold, warm = [], []
  for _ in range(flags.rounds):
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      (folder / 'config.py').write_text(CONFIG)
      cold.append(first_update(folder, 'cold'))
      warm.append(first_update(folder, 'warm'))
  print('| compilation cache | start to first update |')
  print('| --- | --- |')
  print(f'| empty | {min(cold):.1f} s |')
  print(f'| filled | {min(warm):.1f} s |')


if __name__ == '__main__':
  main()
