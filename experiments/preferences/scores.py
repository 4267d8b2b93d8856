"""Reward models: held-out pair accuracy beside that of the hidden reward."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.preferences.common import RULE, made, run_config, spread
from postrain.tasks.labels import pair_accuracy
from postrain.trainer import Trainer
from postrain.types import Batch

# Data, and units of a step: pairs, or rankings of four.
LOSSES = {'bradley_terry': ('pairs', 256), 'plackett_luce': ('rankings', 128)}
NUM_STEPS, NUM_PAIRS = 1500, 4096


def config_of(loss: str, seed: int) -> Any:
  config = run_config(seed)
  config.model.update(head='sequence_labels', num_labels=1)
  config.preference.num_steps = NUM_STEPS
  config.preference.learns = 'reward_model'
  config.preference.data, config.preference.batch_size = LOSSES[loss]
  config.preference.loss = dict(name=loss)
  config.preference.optimizer.update(
    learning_rate=3e-3, schedule='cosine', b2=0.999, total_steps=NUM_STEPS
  )
  config.evaluation.update(every=500, num_prompts=NUM_PAIRS, batch_size=512)
  return config


def oracle(config: Any) -> float:
  """The accuracy of the hidden reward on the pairs of the evaluation."""
  environment, _ = made(config)
  task = environment.device_task
  pairs = environment.preferences('pairs').held_out(NUM_PAIRS)
  prompts, tokens = jnp.split(pairs.tokens, [task.prompt_length], axis=1)
  mask = pairs.mask[:, task.prompt_length :]
  gold = task.rewards['gold'](prompts, tokens, mask)
  batch = Batch(*map(jnp.asarray, pairs[:3]), {}, {}, unit_size=2)
  return float(pair_accuracy(batch, gold))


def study(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  found = {'oracle': [oracle(run_config(seed)) for seed in seeds]}
  for loss in LOSSES:
    found[loss] = []
    for seed in seeds:
      directory = path / f'{loss}-{seed}'
      Trainer(config_of(loss, seed), str(directory)).run()
      rows = (directory / 'metrics.jsonl').read_text().splitlines()
      row = json.loads(rows[-1])
      found[loss].append({
        'accuracy': row['eval/pair_accuracy'], 'ece': row['eval/pair_ece']
      })  # fmt: skip
      print(loss, seed, found[loss][-1], found['oracle'][seed], flush=True)
  return found


def table(found: dict[str, Any]) -> str:
  lines = [
    '| | held-out pair accuracy | less that of gold | ECE | within 2 points |',
    f'{RULE} --- |',
  ]
  oracle = found.pop('oracle')
  lines.append(f'| gold | {spread(oracle)} | | | |')
  for loss, rows in found.items():
    accuracy = [row['accuracy'] for row in rows]
    gaps = np.subtract(accuracy, oracle).tolist()
    ece = spread([row['ece'] for row in rows])
    near = f'{sum(gap >= -0.02 for gap in gaps)} of {len(gaps)} seeds'
    cells = f'{spread(accuracy)} | {spread(gaps)} | {ece} | {near}'
    lines.append(f'| `{loss}` | {cells} |')
  return '\n'.join(lines)
