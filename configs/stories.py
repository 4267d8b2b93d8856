"""GRPO from a real pretrained model: short stories that name an animal.

GRPO (Shao et al. 2024, arXiv:2402.03300), advantages normalised by group, KL to
the frozen reference (k3) in the loss, mean over the tokens of the batch. A
Llama of 260K parameters, trained on TinyStories, learns to tell a story that
ends by itself within 192 tokens, where its own take about 300, and in which an
animal has a name. Its stories are separated by BOS and have no end of their
own: both ids stop a completion. Half a point each for ending and for naming
show the way while whole successes are rare.

Expected, sampled at temperature 1 from openings and names that training never
sees (16 prompts, 32 samples each), mean of seeds 0, 1, 2: share of stories
0.005 before, 0.779 after (0.805, 0.752, 0.779), paired gain 0.773 with the 95 %
interval [0.735, 0.811]; KL to the reference 25.6 nats a story, 0.22 a token;
log-prob per token under the reference -1.41 before, -1.50 after. Greedy
completions may loop to the limit: 0.25, 0.81, 1.00 of them are stories. See
experiments/stories. Time on two cores, shared with other work: 5 to 12 minutes.

  python experiments/train.py --config=configs/stories.py \\
    --workdir=runs/stories \\
    --config.model.directory=DIR --config.environment.tokenizer.directory=DIR
"""

from ml_collections import ConfigDict

from configs import base

NAMES = ('Lily', 'Tom', 'Ben', 'Mia', 'Anna', 'Max', 'Sue', 'Tim')
OPENINGS = (
  'Once upon a time, a child named {0} met a',
  '{0} lost a ball in the park. Then {0} met a',
  'It was raining. In the garden, {0} saw a',
  'At the zoo with Dad, {0} met a',
  '{0} lived on a farm. On the farm, {0} met a',
  '{0} was lost in the woods. Then {0} met a',
  'Mom and {0} had a pet',
  'One day, {0} went to the lake. In the lake, {0} saw a',
)
OTHER_NAMES = ('Sara', 'Jack', 'Amy', 'Sam')
OTHER_OPENINGS = (
  'After a long day, {0} was tired. Then {0} met a',
  '{0} heard a noise. Under the bed, {0} found a',
  '{0} had no friends. Then {0} met a',
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
    max_prompt_length=32,
    max_length=224,
    stop_ids=(1, 2),
  )
  config.model = dict(name='pretrained', directory='')
  config.rewards = dict(
    story=dict(name='animal_story', min_words=30, weight=1.0),
    named=dict(name='names_animal', mention=0.0, weight=0.5),
    finished=dict(name='finished', weight=0.5),
  )
  config.kl.loss_coef = 0.03
  config.sampling.num_samples = 8
  config.sampling.max_new_tokens = 192
  config.rl.num_iterations = 60
  config.rl.num_prompts = 8
  config.rl.num_micro_batches = 8
  config.rl.num_score_slices = 8
  config.rl.optimizer = base.adamw(
    learning_rate=3e-4, schedule='linear', total_steps=60
  )
  config.evaluation.every = 30
  config.evaluation.grader = 'story'
  config.evaluation.num_prompts = 16
  config.evaluation.batch_size = 16
  config.evaluation.num_samples = 4
  config.logging.table_every = 25
  config.checkpoint.every = 10
  return config
