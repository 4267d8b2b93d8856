"""Addition in writing, its rewards on the host: the config of test_hosts.py.

``get_config(folder)`` reads ``folder/train.jsonl``, made by `write`.
"""

import json
import os
import pathlib
import time

from ml_collections import ConfigDict

from configs import base

NUM_STEPS = 7
SAVE_EVERY = 3


def write(folder: pathlib.Path) -> None:
  """All sums of two digits."""
  rows = (
    {'question': f'{a}+{b}=', 'answer': f'{a + b}'}
    for a in range(10)
    for b in range(10)
  )
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'train.jsonl').write_text(text)


def patient(completions: list, examples: list) -> list[float]:
  """The length, after as many seconds as a test wants a step to last."""
  time.sleep(float(os.environ.get('HOSTS_WAIT', '0')))
  return [float(len(each.tokens)) for each in completions]


def get_config(folder: str) -> ConfigDict:
  config = base.get_config()
  path = str(pathlib.Path(folder) / 'train.jsonl')
  config.environment = dict(
    name='text', train=path, held_out=path, tokenizer=dict(name='byte_level'),
    prompt='question', completion='answer', max_prompt_length=8, max_length=12,
    # Many, so that a fresh model meets one within the limit.
    stop_ids=(1, *range(5, 261, 2)),
  )  # fmt: skip
  config.model = dict(
    name='transformer', num_layers=1, model_dim=16, mlp_dim=32, num_heads=2,
    num_kv_heads=1, head_dim=8, max_length=16,
  )  # fmt: skip
  config.rewards = dict(
    length=dict(name='hosts_config:patient', weight=0.1),
    finished=dict(name='finished', weight=1.0),
  )
  config.filter.informative_only = True
  config.filter.max_rollouts = 2
  config.sampling.num_samples = 4
  config.sampling.max_new_tokens = 4
  config.sft.num_steps = 2
  config.sft.batch_size = 8
  config.rl.num_iterations = NUM_STEPS - 2
  config.rl.num_prompts = 8
  config.evaluation.update(
    every=4, grader='finished', num_prompts=8, batch_size=8
  )
  config.checkpoint.every = SAVE_EVERY
  config.mesh.data, config.mesh.fsdp = 2, 4
  return config
