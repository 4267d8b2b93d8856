"""Two-digit addition, from nothing: a short warm-up, then GRPO with a verifier.

A small transformer first imitates 700 demonstrations, enough to write numbers
but not to add most of them, and then learns to add from the exact-match reward
alone. Groups whose samples are all right or all wrong are sampled again, up to
four rollouts an iteration.

Held-out exact match, greedy, 1000 prompts: 0.288 after the warm-up (0.331,
0.298, 0.236), 0.938 at the end (0.972, 0.876, 0.966; seeds 0 to 2 on two cores:
the number of cores moves the last bits). About three minutes.

  python experiments/train.py --config=configs/quickstart.py \\
    --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='arithmetic', num_digits=2)
  )
  config.model = dict(
    name='transformer', num_layers=3, model_dim=64, mlp_dim=256,
    num_heads=4, num_kv_heads=4, head_dim=16, max_length=32,
  )  # fmt: skip
  config.rewards = dict(exact=dict(name='exact', weight=1.0))
  config.sampling.num_samples = 8
  config.sampling.max_new_tokens = 4
  config.filter.informative_only = True
  config.filter.max_rollouts = 4
  config.sft.num_steps = 300
  config.sft.batch_size = 64
  config.sft.num_examples = 700
  config.sft.num_micro_batches = 2
  config.sft.optimizer = base.adamw(
    learning_rate=4e-3, schedule='linear', warmup_steps=20, total_steps=300,
    weight_decay=1.0,
  )  # fmt: skip
  config.rl.num_iterations = 800
  config.rl.num_prompts = 64
  config.rl.num_minibatches = 4
  config.rl.share_prompts = False  # minibatches of rows, not of groups
  config.rl.num_micro_batches = 2
  config.rl.num_score_slices = 4
  config.rl.optimizer = base.adamw(
    learning_rate=1e-3, schedule='linear', warmup_steps=20, total_steps=3200
  )
  config.evaluation.every = 100
  config.evaluation.grader = 'exact'
  config.evaluation.num_prompts = 1000
  config.evaluation.batch_size = 1000
  config.logging.table_every = 100
  config.checkpoint.every = 300
  return config
