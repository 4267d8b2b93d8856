"""TRL's side: its trainers of GRPO, PPO, DPO and supervised steps."""

import os
import types
from typing import Any

from datasets import Dataset
import torch
from transformers import (
  AutoModelForSequenceClassification,
  PreTrainedTokenizerFast,
  TrainerCallback,
)  # fmt: skip
import trl

from benchmarks.peers import hf, protocol
from benchmarks.shapes import (
  BETA,
  DPO_BETA,
  LEARNING_RATE,
  PPO_BETA,
  PPO_EPOCHS,
  SGD_RATE,
)  # fmt: skip

tokens = {}


def even(completions: list, completion_ids: list, **_: Any) -> list[float]:
  """The reward of every side."""
  tokens['tokens'] = sum(map(len, completion_ids))
  return [protocol.even_share(text) for text in completions]


class Even(torch.nn.Module):
  """The same reward as a model, which PPO asks for."""

  base_model_prefix = 'read'

  def __init__(self, tokenizer: Any, prompt_length: int) -> None:
    super().__init__()
    self.tokenizer, self.prompt_length = tokenizer, prompt_length

  def read(self, input_ids: torch.Tensor, **_: Any) -> Any:
    return types.SimpleNamespace(hidden_states=[input_ids])

  def score(self, input_ids: torch.Tensor) -> torch.Tensor:
    """The same at every token: the last one's is taken."""
    completions = input_ids[:, self.prompt_length :]
    texts = self.tokenizer.batch_decode(completions)
    rewards = torch.tensor(even(texts, completions.tolist()))
    return rewards[:, None, None].expand(*input_ids.shape, 1)


class Pace(TrainerCallback):
  """Reports a step where it is logged, its last act, and waits."""

  def __init__(self) -> None:
    self.losses: list[float] = []
    self.chosen: list[float] = []

  def on_log(self, args, state, control, logs, **_: Any) -> None:
    if tokens:  # losses hang on what was sampled
      return protocol.session().answer(**tokens)
    self.losses.append(float(logs['loss']))
    figures = {'losses': self.losses}
    if 'logps/chosen' in logs:
      self.chosen.append(logs['logps/chosen'])
      figures['chosen_logprobs'] = self.chosen
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
  tokenizer = PreTrainedTokenizerFast.from_pretrained(given.folder)
  if given.job == 'grpo':
    rows = [{'prompt': row['prompt']} for row in rows]
  if given.job == 'ppo':
    rows = [{'input_ids': protocol.ids(row['prompt'])} for row in rows]
  common = dict(
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[Pace()],
  )
  if given.job == 'ppo':
    return ppo(given, model, tokenizer, common)
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


def ppo(given: Any, model: Any, tokenizer: Any, common: dict) -> Any:
  """PPO, which left the library behind its version 1.12.

  Raises:
    ValueError: this is a later one.
  """
  try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
  except ImportError as error:
    raise ValueError(
      f'trl {trl.__version__} has no PPO: have trl==1.12.0 in the environment'
      ' of the peers, or leave trl out of --sides'
    ) from error
  shape = given.shape
  # One that is never sampled: a sampled one would end a completion.
  tokenizer.add_special_tokens({'pad_token': '<none>'})
  chosen = arguments(given, shape.num_rows)
  args = PPOConfig(
    **chosen,
    total_episodes=chosen['max_steps'] * shape.num_rows,
    num_sample_generations=0,
    local_rollout_forward_batch_size=shape.num_rows,
    response_length=shape.completion_length,
    temperature=1.0,
    num_ppo_epochs=PPO_EPOCHS,
    kl_coef=PPO_BETA,
    vf_coef=1.0,
  )
  return PPOTrainer(
    args,
    model=model,
    ref_model=None,
    reward_model=Even(tokenizer, shape.prompt_length),
    value_model=load_critic(given.folder),
    **common,
  )


def load_critic(folder: str) -> torch.nn.Module:
  return AutoModelForSequenceClassification.from_pretrained(
    os.path.join(folder, 'critic'), dtype=torch.float32
  )


@torch.no_grad()
def values(critic: torch.nn.Module, folder: str) -> list[float]:
  prompts, completions = map(torch.tensor, protocol.checked(folder))
  states = critic.model(torch.cat([prompts, completions], dim=1))[0]
  found = critic.score(states[:, prompts.shape[1] - 1 : -1])
  return found.flatten().tolist()


def main() -> None:
  given, session = protocol.options(), protocol.session()
  model = hf.load(given.folder)
  made = trainer(given, model)
  torch.set_num_threads(1)
  told = dict(logprobs=hf.sequence_logprobs(model, given.folder))
  if given.job == 'ppo':
    told['values'] = values(made.value_model, given.folder)
  session.answer(
    versions=protocol.versions('torch', 'transformers', 'trl'), **told
  )
  made.train()


if __name__ == '__main__':
  main()
