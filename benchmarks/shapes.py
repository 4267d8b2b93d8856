"""The sizes that are measured, and the configs of a run of each.

Decoders in the style of Qwen2 with a tied embedding, in float32, on 8 prompts
of 8 completions, each as long as it may be. Nothing but the standard library is
imported with this file: the programs of other libraries read it too.
"""

import dataclasses
from typing import Any

LEARNING_RATE = 1e-4
BETA = 0.04  # of the KL in GRPO's loss
DPO_BETA = 0.1
PPO_BETA = 0.05  # of the KL in PPO's rewards
PPO_EPOCHS = 4  # over the whole rollout, an update each
SGD_RATE = 0.1  # of the steps whose losses are compared
NUM_BATCHES = 4  # of pairs, which come around again
REMAT = 'dots_with_no_batch_dims_saveable'
PAD, EOS = 0, 1  # the other tokens are words, 't2' and so on


@dataclasses.dataclass(frozen=True)
class Shape:
  """A decoder, and the tokens of a prompt and of a completion."""

  vocab_size: int
  num_layers: int
  model_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  prompt_length: int
  completion_length: int
  num_prompts: int = 8
  num_samples: int = 8
  num_pairs: int = 32

  @property
  def num_rows(self) -> int:
    """Sequences of a batch."""
    return self.num_prompts * self.num_samples

  def model(self) -> dict[str, Any]:
    """Fields of `postrain.models.config.Config`."""
    names = [f.name for f in dataclasses.fields(self)][:7]
    return {
      **{name: getattr(self, name) for name in names},
      **dict(max_length=512, norm_eps=1e-6, tie_embeddings=True),
      **dict(qkv_bias=True, family='qwen2'),
    }

  def forward_flops(self, tokens: int, predicted: int) -> float:
    """Arithmetic of matrices alone: the layers on ``tokens``, the head where
    a token is ``predicted``; without attention over earlier tokens."""
    heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    layer = self.model_dim * (heads + 3 * self.mlp_dim)
    head = self.model_dim * self.vocab_size
    return 2.0 * (tokens * self.num_layers * layer + predicted * head)


SHAPES = {
  'miniature': Shape(16, 1, 16, 32, 2, 1, 8, 4, 5, 2, 2, 2),
  'tiny': Shape(64, 4, 128, 512, 4, 4, 32, 16, 32),
  'small': Shape(4096, 8, 512, 1408, 8, 4, 64, 64, 128),
}


def run_config(
  shape: Shape, folder: str, *, job: str, micro_batches: int = 1
) -> Any:
  """The config of a run of the trainer on what `material.make` wrote.

  Args:
    shape: one of `SHAPES`.
    folder: of `benchmarks.peers.material.make`.
    job: ``sft`` runs supervised steps, ``dpo`` and ``dpo_sgd`` steps on pairs,
      ``ppo`` iterations with a critic, all others iterations of GRPO.
    micro_batches: slices of an optimiser step, and of scoring.
  """
  from configs import base

  config = base.get_config()
  config.environment = dict(
    name='benchmarks.peers.ours:paced',
    folder=folder,
    prompt_length=shape.prompt_length,
    completion_length=shape.completion_length,
  )
  # Products with attention are done again in the backward pass: less memory,
  # and on a CPU no more time.
  config.model = dict(name='pretrained', directory=folder, remat=REMAT)
  config.rewards = dict(
    even=dict(name='benchmarks.peers.ours:even', weight=1.0)
  )
  config.evaluation.grader = 'even'
  config.advantage = dict(name='group_normalized', eps=1e-4)
  config.aggregation = dict(name='sequence_mean')
  config.kl.loss_coef = BETA
  config.sampling.num_samples = shape.num_samples
  config.sampling.max_new_tokens = shape.completion_length
  config.sampling.num_cache_sizes = 4
  optimizer = base.adamw(learning_rate=LEARNING_RATE, b2=0.999)
  steps = 100_000  # the program is ended long before
  config.preference.num_steps = steps if job.startswith('dpo') else 0
  config.preference.batch_size = shape.num_pairs
  config.preference.num_micro_batches = micro_batches
  config.preference.loss = dict(name='dpo', beta=DPO_BETA)
  config.preference.optimizer = (
    dict(name='sgd', learning_rate=SGD_RATE) if job == 'dpo_sgd' else optimizer
  )
  config.sft.num_steps = steps if job == 'sft' else 0
  config.sft.batch_size = shape.num_rows
  config.sft.num_micro_batches = micro_batches
  config.sft.optimizer = optimizer
  offline = job == 'sft' or job.startswith('dpo')
  config.rl.num_iterations = 0 if offline else steps
  config.rl.num_prompts = shape.num_prompts
  config.rl.rescore = False  # one update a rollout, as the others have it
  config.rl.num_micro_batches = micro_batches
  config.rl.num_score_slices = micro_batches
  config.rl.optimizer = optimizer
  config.checkpoint.every = steps
  if job == 'ppo':
    _with_critic(config, f'{folder}/critic', shape, optimizer)
  return config


def _with_critic(
  config: Any, critic: str, shape: Shape, optimizer: dict[str, Any]
) -> None:
  """PPO: a prompt a sample, the KL in the rewards, a network of values."""
  config.critic.network = dict(name='pretrained', directory=critic, remat=REMAT)
  config.critic.optimizer = optimizer
  config.advantage = dict(name='gae', discount=1.0, lambda_=0.95)
  config.whitening = dict(name='whiten')
  config.aggregation = dict(name='token_mean')
  config.kl.update(estimator=dict(name='k1'), loss_coef=None)
  config.kl.reward_coef = PPO_BETA
  config.sampling.num_samples = 1
  config.rl.num_prompts = shape.num_rows
  config.rl.num_epochs = PPO_EPOCHS
  config.rl.share_prompts = False
  config.rl.rescore = True  # the penalty needs log-probs before an update
