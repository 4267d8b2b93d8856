"""PPO with a critic on the toy sort task: one sample of a prompt, no groups.

Actor, critic and frozen reference; the KL is paid by each token, at a
coefficient that follows its target. A reward model, the fourth role, is a
reward: ``dict(name='reward_model', directory=..., weight=1.0)``. Reward of the
last rollout 6.66 of 7, exact sorts 0.660 of held-out prompts decoded greedily
(seed 0).

  python experiments/train.py --config=configs/ppo_sort.py \\
    --workdir=runs/ppo_sort
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.environment = dict(name='task', task=dict(name='sort', hold_out=False))
  config.model = dict(name='sort_policy', embed_dim=64)
  config.rewards = dict(
    multiset_ordering=dict(name='multiset_ordering', weight=1.0),
    exact=dict(name='exact', weight=0.0),
  )
  config.advantage = dict(name='gae', discount=1.0, lambda_=0.95)
  config.whitening = dict(name='whiten')
  config.loss = dict(name='ppo_clip', clip_low=0.2, clip_high=0.2)
  config.critic.network = dict(name='copied')
  config.critic.loss.clip = 0.5
  config.critic.optimizer = base.adamw(learning_rate=5e-3)
  config.kl.estimator = dict(name='k1')
  config.kl.reward_coef = 0.05
  config.kl.controller = dict(name='adaptive_coef', target=11.0, horizon=4000.0)
  config.sampling.num_samples = 1
  config.sampling.max_new_tokens = 4
  config.rl.num_iterations = 150
  config.rl.num_prompts = 512
  config.rl.num_epochs = 2
  config.rl.num_minibatches = 4
  config.rl.kl_stop = 0.05
  config.rl.share_prompts = False
  config.rl.optimizer = base.adamw(learning_rate=5e-3)
  config.evaluation.every = 50
  config.evaluation.grader = 'exact'
  config.evaluation.num_prompts = 1024
  config.evaluation.batch_size = 1024
  config.logging.table_every = 50
  config.checkpoint.every = 150
  config.checkpoint.export = False
  return config
