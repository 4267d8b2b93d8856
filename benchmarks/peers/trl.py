"""TRL's side: its trainers of GRPO, DPO and supervised steps."""

from typing import Any

from datasets import Dataset
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback
import trl

from benchmarks.peers import hf, protocol
from benchmarks.shapes import BETA, DPO_BETA, LEARNING_RATE, SGD_RATE

tokens = {}


def even(completions: list, completion_ids: list, **_: Any) -> list[float]:
  """The reward of every side."""
  tokens['tokens'] = sum(map(len, completion_ids))
  return [protocol.even_share(text) for text in completions]


class Pace(TrainerCallback):
  """Reports a step where it is logged, its last act, and waits."""

  def __init__(self) -> None:
    self.losses: list[float] = []
    self.chosen: list[float] = []

  def on_log(self, args, state, control, logs, **_: Any) -> None:
    self.losses.append(float(logs['loss']))
    figures = {'losses': self.losses}
    if 'logps/chosen' in logs:
      self.chosen.append(logs['logps/chosen'])
      figures['chosen_logprobs'] = self.chosen
    if tokens:  # their losses hang on what was sampled
      figures = tokens
    protocol.session().answer(**figures)


def arguments(given: Any, rows: int) -> dict[str, Any]:
  """Of every trainer: float32, AdamW, no schedule, nothing kept."""
  return dict(
    output_dir=given.workdir,
    per_device_train_batch_size=rows // given.micro_batches,
    gradient_accumulation_steps=given.micro_batches,
    learning_rate=LEARNING_RATE,
    lr_scheduler_type='constant',
    max_grad_norm=1.0,
    max_steps=100_000,
    logging_steps=1,
    save_strategy='no',
    report_to='none',
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    train_sampling_strategy='sequential',
  )


def trainer(given: Any, model: Any) -> Any:
  shape = given.shape
  pairs = given.job in ('dpo', protocol.TRAJECTORY)
  name = 'pairs' if pairs else 'demonstrations'
  rows = protocol.rows(given.folder, name)
  if given.job == 'grpo':
    rows = [{'prompt': row['prompt']} for row in rows]
  common = dict(
    train_dataset=Dataset.from_list(rows),
    processing_class=PreTrainedTokenizerFast.from_pretrained(given.folder),
    callbacks=[Pace()],
  )
  if given.job == 'sft':
    args = trl.SFTConfig(**arguments(given, shape.num_rows), max_length=None)
    return trl.SFTTrainer(model, args=args, **common)
  if pairs:
    chosen = arguments(given, shape.num_pairs)
    if given.job == protocol.TRAJECTORY:
      chosen |= dict(optim='sgd', learning_rate=SGD_RATE, max_grad_norm=0.0)
    args = trl.DPOConfig(**chosen, max_length=None, beta=DPO_BETA)
    return trl.DPOTrainer(model, args=args, **common)
  length = shape.completion_length
  args = trl.GRPOConfig(
    **arguments(given, shape.num_rows),
    num_generations=shape.num_samples,
    max_completion_length=length,
    generation_kwargs=dict(min_new_tokens=length),
    temperature=1.0,
    top_k=0,
    beta=BETA,
    loss_type='grpo',
  )
  return trl.GRPOTrainer(model, reward_funcs=even, args=args, **common)


def main() -> None:
  given, session = protocol.options(), protocol.session()
  model = hf.load(given.folder)
  made = trainer(given, model)
  torch.set_num_threads(1)
  session.answer(
    versions=protocol.versions('torch', 'transformers', 'trl'),
    logprobs=hf.sequence_logprobs(model, given.folder),
  )
  made.train()


if __name__ == '__main__':
  main()
