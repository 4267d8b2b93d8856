"""GRPO from a real pretrained model: short stories that name an animal.

  python experiments/train.py --config=configs/stories.py \\
    --workdir=runs/stories \\
    --config.model.directory=DIR --config.environment.tokenizer.directory=DIR
"""

from ml_collections import ConfigDict

from configs import base

NAMES = ('Lily', 'Tom', 'Ben', 'Mia', 'Anna', 'Max', 'Sue', 'Tim')
OPENINGS = (
  'Once upon a time, there was a child named {0}. In the garden, {0} saw a',
  '{0} lost a ball in the park and was very sad. Then {0} met a',
  'It was raining, and {0} was sad. Then the sun came out. {0} saw a',
  '{0} went to the zoo with Dad. Best of all, {0} liked a',
  '{0} lived on a farm. On the farm there was a',
  '{0} was lost in the woods and began to cry. Then {0} saw a',
  'Mom gave {0} a big box. In the box there was a',
  'One day, {0} went to the lake to swim. In the water, {0} saw a',
)
OTHER_NAMES = ('Sara', 'Jack', 'Amy', 'Sam')
OTHER_OPENINGS = (
  'After a long day, {0} was tired but happy. On the way home, {0} met a',
  'One night, {0} heard a noise. Under the bed, {0} found a',
  '{0} had no friends to play with. One day, {0} found a',
  'High in a tree, {0} saw a',
)


def get_config() -> ConfigDict:
  config = base.get_config()
  config.environment = dict(
    name='text',
    train=tuple(o.format(n) for n in NAMES for o in OPENINGS),
    held_out=tuple(o.format(n) for n in OTHER_NAMES for o in OTHER_OPENINGS),
    tokenizer=dict(directory=''),
    prompt='prompt',
    max_prompt_length=40,
    max_length=256,
    stop_ids=(1, 2),
  )
  config.model = dict(name='pretrained', directory='')
  config.rewards = dict(
    story=dict(name='animal_story', min_words=40, weight=1.0),
    named=dict(name='names_animal', mention=0.0, weight=0.5),
    finished=dict(name='finished', weight=0.5),
  )
  config.kl.loss_coef = 0.05
  config.sampling.num_samples = 8
  config.sampling.max_new_tokens = 192
  config.rl.num_iterations = 60
  config.rl.num_prompts = 8
  config.rl.num_micro_batches = 8
  config.rl.num_score_slices = 8
  config.rl.optimizer = base.adamw(
    learning_rate=4e-4, schedule='linear', total_steps=60
  )
  config.evaluation.every = 30
  config.evaluation.grader = 'story'
  config.evaluation.num_prompts = 16
  config.evaluation.batch_size = 16
  config.evaluation.num_samples = 4
  config.logging.table_every = 25
  config.checkpoint.every = 20
  return config
