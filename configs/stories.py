"""GRPO from a real pretrained model: short stories that name an animal.

A 260K-parameter Llama of TinyStories learns to tell a story that ends within
the limit and in which an animal has a name. Its stories are separated by BOS
and have no end of sequence of their own: both ids stop a completion.

  python experiments/train.py --config=configs/stories.py \\
    --workdir=runs/stories \\
    --config.model.directory=DIR --config.environment.tokenizer.directory=DIR
"""

from ml_collections import ConfigDict

from configs import base

CHARACTERS = ('Lily', 'Tom', 'Ben', 'Mia', 'Sam', 'Anna', 'Max', 'Sue')
OPENINGS = (
  'Once upon a time, there was a little girl named {}.',
  'One day, {} went to the park.',
  'Once upon a time, {} found a big box.',
  '{} lived in a small house near the woods.',
)


def get_config() -> ConfigDict:
  prompts = [o.format(c) for c in CHARACTERS for o in OPENINGS]
  config = base.get_config()
  config.environment = dict(
    name='text',
    train=tuple(p for i, p in enumerate(prompts) if i % 4 != 3),
    held_out=tuple(p for i, p in enumerate(prompts) if i % 4 == 3),
    tokenizer=dict(directory=''),
    prompt='prompt',
    max_prompt_length=32,
    max_length=224,
    stop_ids=(1, 2),
  )
  config.model = dict(name='pretrained', directory='')
  config.rewards = dict(
    named=dict(name='names_animal', weight=1.0),
    finished=dict(name='finished', weight=0.0),
  )
  config.sampling.num_samples = 8
  config.sampling.max_new_tokens = 192
  config.rl.num_iterations = 100
  config.rl.num_prompts = 16
  config.evaluation.every = 50
  config.evaluation.grader = 'named'
  config.evaluation.num_prompts = 8
  config.evaluation.batch_size = 8
  config.logging.table_every = 25
  return config
