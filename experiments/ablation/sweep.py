"""Advantage x aggregation x clip, on sorting and on adding: 120 runs.

  python experiments/sweep.py experiments/ablation/sweep.py --workers=2 \\
    --workdir=runs/ablation
  python experiments/report.py runs/ablation --split=task \\
    --figure=reward/exact --last=10

Small models and few steps, so that a run is seconds and no cell is solved: what
differs then is how fast a choice learns. Twelve cells, five seeds, two tasks.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import base
from postrain.sweeps import Row, crossed, named, seeds

NUM_SEEDS = 5


def get_config() -> ConfigDict:
  """Sorting: 100 iterations of four passes over 32 groups of eight."""
  config = base.get_config()
  config.environment = dict(name='task', task=dict(name='sort', hold_out=False))
  config.model = dict(name='sort_policy', embed_dim=64)
  config.rewards = dict(
    multiset_ordering=dict(name='multiset_ordering', weight=1.0),
    exact=dict(name='exact', weight=0.0),
  )
  config.sampling.num_samples = 8
  config.sampling.max_new_tokens = 4
  config.rl.num_iterations = 100
  config.rl.num_prompts = 32
  config.rl.num_epochs = 4
  config.rl.optimizer = base.adamw(
    learning_rate=3e-3, schedule='linear', total_steps=400
  )
  config.evaluation.grader = 'exact'
  config.checkpoint.every = 50
  config.checkpoint.export = False
  return config


ADDING = {
  'environment': dict(name='task', task=dict(name='arithmetic', num_digits=1)),
  'model': dict(
    name='transformer', num_layers=1, model_dim=64, mlp_dim=128, num_heads=4,
    num_kv_heads=4, head_dim=16, max_length=16,
  ),
  'rewards': dict(exact=dict(name='exact', weight=1.0)),
  'sft.num_steps': 150,
  'sft.num_examples': 45,
  'sft.optimizer': base.adamw(learning_rate=4e-3),
  'rl.num_iterations': 60,
  'rl.num_prompts': 32,
  'rl.num_minibatches': 4,
  'rl.num_epochs': 2,
  'rl.optimizer': base.adamw(
    learning_rate=2e-3, schedule='linear', total_steps=480
  ),
}  # fmt: skip


def get_sweep() -> Iterable[Row]:
  return crossed(
    named('task', {'sort': {}, 'add': ADDING}),
    seeds(NUM_SEEDS),  # before the cells: a part of the sweep has some of each
    named('advantage', {
      name: {'advantage': dict(name=name)}
      for name in ('group_normalized', 'group_centered', 'batch_normalized')
    }),
    named('aggregation', {
      name: {'aggregation': dict(name=name)}
      for name in ('token_mean', 'sequence_mean')
    }),
    named('clip', {
      str(clip): {'loss.clip_low': clip, 'loss.clip_high': clip}
      for clip in (0.2, 0.02)
    }),
  )  # fmt: skip
