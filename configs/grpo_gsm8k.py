"""GRPO on GSM8K from a Hugging Face directory.

Rewards: the number after ``####`` is right (1), the answer ends in one such
line (0.1). For a model that has learnt GSM8K's format, such as the export of
`sft_gsm8k`; for instruction-tuned checkpoints set the ``extract`` of the
accuracy reward to what they write (``boxed``, ``last``).

Measured from that export, 8 iterations: 1.8 % of 1024 samples end in an answer
line, none is right; about thirty seconds an iteration on two cores. It shows
that the parts fit, not that so small a model learns.

  python experiments/train.py --config=configs/grpo_gsm8k.py:DATA \\
    --workdir=runs/grpo_gsm8k --config.model.directory=DIR \\
    --config.environment.tokenizer.directory=DIR

DATA is a folder with train.jsonl and test.jsonl (question, answer).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(folder: str = 'gsm8k') -> ConfigDict:
  config = base.get_config()
  config.environment = dict(
    name='text',
    train=f'{folder}/train.jsonl',
    held_out=f'{folder}/test.jsonl',
    tokenizer=dict(directory='DIR'),
    prompt='question',
    style='chat',
    max_prompt_length=192,
    max_length=384,
    too_long='drop',
  )
  config.model = dict(
    name='pretrained',
    directory='DIR',
    dtype='float32',
    remat='nothing_saveable',
  )
  config.rewards = dict(
    accuracy=dict(name='accuracy', weight=1.0, extract='marker'),
    format=dict(name='answer_format', weight=0.1),
  )
  config.kl.loss_coef = 0.001
  config.filter.overlong = 'mask'
  config.sampling.max_new_tokens = 192
  config.rl.num_iterations = 100
  config.rl.num_prompts = 16
  config.rl.num_micro_batches = 4
  config.rl.num_score_slices = 4
  config.rl.optimizer = base.adamw(learning_rate=1e-5, warmup_steps=5)
  config.evaluation.every = 20
  config.evaluation.grader = 'accuracy'
  config.evaluation.num_prompts = 64
  config.evaluation.batch_size = 64
  config.logging.table_every = 10
  return config
