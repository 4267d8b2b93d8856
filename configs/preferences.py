"""Learning from preferences: a method by its name, on a task of seconds.

  python experiments/train.py --config=configs/preferences.py:dpo \
    --workdir=runs/dpo

The task is `postrain.tasks.preference`: raters prefer by a hidden reward
``gold``, which the figures of a policy show and no learner sees. The losses
are those of `configs.presets.PREFERENCES`, as in the papers; beside them stand
two reward models, and DPO of pairs that the policy writes.
"""

from ml_collections import ConfigDict

from configs import base, presets

DATA = {'kto': 'unpaired', 'plackett_luce': 'rankings'}
REWARD_MODELS = ('bradley_terry', 'plackett_luce')
NAMES = (*presets.PREFERENCES, *REWARD_MODELS)
# DPO of pairs that the policy writes.
WRITTEN = {
  'online': dict(source='raters'),
  'iterative': dict(source='raters', reference_every=50),
  'spin': dict(source='self_play', reference_every=50),
}


def get_config(name: str = 'dpo') -> ConfigDict:
  names = (*NAMES, *WRITTEN)
  if name not in names:
    raise ValueError(f'{name!r} is no method; there are: {", ".join(names)}')
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='preference'), rater=dict(scale=20.0)
  )
  config.rewards = dict(gold=dict(name='gold', weight=1.0))
  config.model = dict(
    name='transformer', num_layers=2, model_dim=32, mlp_dim=64, num_heads=2,
    num_kv_heads=2, head_dim=16, max_length=8,
  )  # fmt: skip
  config.sampling.max_new_tokens = 6
  config.preference.num_steps = 200
  config.preference.batch_size = 64
  config.preference.num_examples = 2048
  config.preference.data = DATA.get(name, 'pairs')
  if name in REWARD_MODELS:
    config.preference.learns = 'reward_model'
    config.preference.loss = dict(name=name)
    config.model.update(head='sequence_labels', num_labels=1)
  elif name in WRITTEN:
    config.preference.update(**WRITTEN[name], num_examples=None)
  else:
    config.preference.loss = presets.preset(f'{name}/paper')['loss']
  config.evaluation.every = 50
  config.evaluation.grader = 'gold'
  config.evaluation.threshold = 0.75
  config.checkpoint.every = 100
  return config
