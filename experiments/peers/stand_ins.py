"""What the functions of the peers read of their trainers and configs."""

import collections
from types import SimpleNamespace
from typing import Any

import torch


def defaults(config: Any) -> dict[str, Any]:
  fields = config.__dataclass_fields__.values()
  return {field.name: field.default for field in fields}


def trainer(**state: Any) -> SimpleNamespace:
  """One process in training; metrics go nowhere."""
  shared = dict(
    aux_loss_enabled=False,
    model=SimpleNamespace(training=True),
    _metrics={'train': collections.defaultdict(list)},
    _total_train_tokens=0,
    _tp_size=1,
    accelerator=SimpleNamespace(
      device=torch.device('cpu'),
      num_processes=1,
      gather=lambda x: x,
      reduce=lambda x, reduction: x,
      gather_for_metrics=lambda x: x,
      pad_across_processes=lambda x, dim, pad_index: x,
      sync_gradients=True,
    ),
  )
  return SimpleNamespace(**(shared | state))


def grpo_trainer(
  length: int, args: dict[str, Any] | None = None, **changes: Any
) -> SimpleNamespace:
  """What `GRPOTrainer._compute_loss` and that of RLOO read."""
  from trl import GRPOConfig, GRPOTrainer

  merged = defaults(GRPOConfig) | {'steps_per_generation': 1} | (args or {})
  args_ = SimpleNamespace(**merged)
  low = changes.get('epsilon_low', args_.epsilon)
  state = dict(
    args=args_,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    importance_sampling_level='token',
    beta=args_.beta,
    loss_type=args_.loss_type,
    epsilon_low=low,
    epsilon_high=args_.epsilon_high or low,
    use_vllm=False,
    vllm_importance_sampling_correction=False,
    current_gradient_accumulation_steps=1,
    max_completion_length=length,
    use_adaptive_entropy=False,
    _entropy_bonus_enabled=False,
    get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
    get_gamma_weights=GRPOTrainer.get_gamma_weights,
  )
  made = trainer(**(state | changes))
  made.get_high_entropy_mask = lambda *rest: GRPOTrainer.get_high_entropy_mask(
    made, *rest
  )
  return made


def verl_config(**changes: Any) -> Any:
  from verl.workers.config import FSDPActorConfig

  return FSDPActorConfig(
    strategy='fsdp', rollout_n=4, ppo_mini_batch_size=4,
    ppo_micro_batch_size_per_gpu=1, **changes,
  )  # fmt: skip
