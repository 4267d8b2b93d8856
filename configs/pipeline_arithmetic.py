"""Demonstrations, then GRPO from the model that they left: two runs.

  python experiments/pipeline.py --pipeline=configs/pipeline_arithmetic.py \\
    --workdir=runs/pipeline

One-digit addition, in under a minute on two cores.
"""

from ml_collections import ConfigDict

from configs import base


def _run() -> ConfigDict:
  """What the stages share; it trains nothing."""
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='arithmetic', num_digits=1)
  )
  config.rewards = dict(exact=dict(name='exact', weight=1.0))
  config.sampling.max_new_tokens = 3
  config.evaluation.every = 50
  config.evaluation.grader = 'exact'
  return config


def get_pipeline() -> dict[str, ConfigDict]:
  supervised, online = _run(), _run()
  supervised.model = dict(
    name='transformer', num_layers=2, model_dim=32, mlp_dim=128,
    num_heads=2, num_kv_heads=2, head_dim=16, max_length=16,
  )  # fmt: skip
  supervised.sft.num_steps = 100
  supervised.sft.optimizer = base.adamw(learning_rate=4e-3)
  online.model = dict(name='pretrained', directory='{stages.supervised}/export')
  online.rl.num_iterations = 50
  online.rl.optimizer = base.adamw(learning_rate=1e-3)
  return {'supervised': supervised, 'online': online}
