"""A policy that is taught to keep principles by feedback that no person gave.

  python experiments/pipeline.py --pipeline=configs/constitution.py \\
    --workdir=runs/constitution

Answers of a base policy are criticised and revised by principles, the revisions
imitated; of two answers of the result a judge prefers one by a principle; a
reward model learns what it says, and GRPO or PPO maximises that and help. See
experiments/constitution for what it reaches, over three seeds.
"""

from ml_collections import ConfigDict

from configs import base

PRINCIPLES = (
  dict(name='insult', pattern='X', critique='It insults', weight=1.0),
  dict(name='secret', pattern='Y', critique='It tells secrets', weight=1.0),
  dict(
    name='stutter', pattern=r'([a-h])\1', replacement=r'\1',
    critique='It stutters', weight=1.0,
  ),
)  # fmt: skip
STAGES = 'experiments.constitution.stages'
MAX_NEW_TOKENS, MAX_LENGTH = 14, 24


def _run(seed: int, train: str) -> ConfigDict:
  """What the runs share; it trains nothing."""
  config = base.get_config()
  config.seed = seed
  config.environment = dict(
    name='text',
    train=train,
    held_out='{stages.requests}/held_out.jsonl',
    tokenizer=dict(name='byte_level'),
    prompt='prompt',
    completion='completion',
    max_prompt_length=4,
    max_length=MAX_LENGTH,
    too_long='drop',  # bytes that are no letters take three where they are read
  )
  config.rewards = dict(help=dict(name=f'{STAGES}:helpfulness', weight=1.0))
  config.evaluation.grader = 'help'
  config.sampling.max_new_tokens = MAX_NEW_TOKENS
  config.sft.batch_size = 64
  config.checkpoint.every = 200
  return config


def _base(seed: int) -> ConfigDict:
  """A policy from scratch that helps, and knows no manners."""
  config = _run(seed, '{stages.requests}/train.jsonl')
  config.model = dict(
    name='transformer', num_layers=2, model_dim=32, mlp_dim=128, num_heads=4,
    num_kv_heads=4, head_dim=8, max_length=MAX_LENGTH,
  )  # fmt: skip
  config.sft.num_steps = 600
  config.sft.optimizer = base.adamw(learning_rate=5e-3)
  return config


def _imitation(seed: int) -> ConfigDict:
  config = _run(seed, '{stages.revisions}/revisions.jsonl')
  config.model = dict(name='pretrained', directory='{stages.base}/export')
  config.sft.num_steps = 200
  config.sft.optimizer = base.adamw(learning_rate=2e-3)
  return config


def _preference_model(seed: int, pairs: str) -> ConfigDict:
  """Scores whose differences are the logits of the judge."""
  config = _run(seed, '{stages.requests}/train.jsonl')
  config.environment.preferences = dict(train=pairs, held_out=None, ties='drop')
  config.model = dict(
    name='pretrained', directory='{stages.supervised}/export',
    head='sequence_labels', num_labels=1,
  )  # fmt: skip
  config.preference.update(
    num_steps=300, batch_size=64, learns='reward_model', data='pairs'
  )
  config.preference.loss = dict(name='soft_preference')
  config.preference.optimizer.learning_rate = 2e-3
  return config


def _online(seed: int, helpfulness: float, algorithm: str) -> ConfigDict:
  """The preference model is maximised, and help beside it."""
  config = _run(seed, '{stages.requests}/train.jsonl')
  config.model = dict(name='pretrained', directory='{stages.supervised}/export')
  config.rewards = dict(
    judge=dict(
      name='reward_model', directory='{stages.preference_model}/export',
      weight=1.0,
    ),
    help=dict(name=f'{STAGES}:helpfulness', weight=helpfulness),
  )  # fmt: skip
  config.kl.loss_coef = 0.02
  config.rl.num_iterations = 60
  config.rl.optimizer = base.adamw(learning_rate=1e-3)
  if algorithm == 'ppo':
    _with_critic(config)
  elif algorithm != 'grpo':
    raise ValueError(f"algorithm={algorithm!r}: choose 'grpo' or 'ppo'")
  return config


def _with_critic(config: ConfigDict) -> None:
  """PPO on as many answers, one of each request, from the same KL term."""
  config.advantage = dict(name='gae', discount=1.0, lambda_=0.95)
  config.whitening = dict(name='whiten')
  config.critic.network = dict(name='copied')
  config.critic.loss.clip = 4.0  # scores are of this size
  config.critic.optimizer = base.adamw(learning_rate=2e-3)
  config.sampling.num_samples = 1
  config.rl.update(
    num_prompts=256, num_epochs=2, num_minibatches=2, share_prompts=False
  )


def get_pipeline(
  seed: int = 0,
  pairs: str = 'judge',
  helpfulness: float = 4.0,
  algorithm: str = 'grpo',
) -> dict[str, ConfigDict]:
  """The stages in order.

  ``pairs='revision'`` prefers each revision to what it was made of, in place of
  what a judge says of two answers; ``algorithm='ppo'`` has a critic in place of
  groups.
  """
  trained = '{stages.requests}/train.jsonl'
  principles = dict(principles=PRINCIPLES, seed=seed)
  stages = {
    'requests': dict(program=f'{STAGES}:write_requests', seed=seed),
    'base': _base(seed),
    'responses': dict(
      program=f'{STAGES}:respond', model='{stages.base}/export',
      requests=trained, num_samples=4, seed=seed,
    ),
    'revisions': dict(
      program=f'{STAGES}:revise', num_rounds=4, recall=0.9,
      responses='{stages.responses}/responses.jsonl', **principles,
    ),
    'supervised': _imitation(seed),
  }  # fmt: skip
  if pairs == 'judge':
    stages['comparisons'] = dict(
      program=f'{STAGES}:compare', model='{stages.supervised}/export',
      requests=trained, num_pairs=8,
      judge=dict(scale=2.0, position_bias=1.0, flip=0.1), **principles,
    )  # fmt: skip
  elif pairs != 'revision':
    raise ValueError(f"pairs={pairs!r}: choose 'judge' or 'revision'")
  source = {'judge': 'comparisons', 'revision': 'revisions'}[pairs]
  stages['preference_model'] = _preference_model(
    seed, f'{{stages.{source}}}/pairs.jsonl'
  )
  stages['online'] = _online(seed, helpfulness, algorithm)
  stages['report'] = dict(
    program=f'{STAGES}:report', requests='{stages.requests}/held_out.jsonl',
    models={
      name: f'{{stages.{name}}}/export'
      for name in ('base', 'supervised', 'online')
    },
    num_samples=32, **principles,
  )  # fmt: skip
  return {name: ConfigDict(stage) for name, stage in stages.items()}
