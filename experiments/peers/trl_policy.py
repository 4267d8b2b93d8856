"""Policy losses of TRL."""

from typing import Any

import numpy as np
import torch

from experiments.peers.common import (
  Arrays,
  case,
  chosen,
  differentiated,
  normal,
)
from experiments.peers.stand_ins import grpo_trainer


def batch(x: Arrays) -> Arrays:
  blank = torch.zeros((len(x['mask']), 1), dtype=torch.long)
  old = x['old_logp']
  found = {
    'prompt_ids': blank,
    'prompt_mask': blank + 1,
    'completion_ids': torch.zeros(x['mask'].shape, dtype=torch.long),
    'completion_mask': x['mask'].long(),
    'advantages': x['advantages'],
    'num_items_in_batch': x['mask'].sum(),
    'old_per_token_logps': old,
    'old_logps': torch.where(x['mask'], old, 0.0).sum(-1),
  }
  names = {
    'ref_logp': 'ref_per_token_logps',
    'rollout_logp': 'sampling_per_token_logps',
    'weights': 'importance_sampling_ratio',
  }
  return found | {names[k]: x[k] for k in names if k in x}


def loss_of(
  x: Arrays,
  logprobs: torch.Tensor,
  entropies: torch.Tensor,
  kind: Any,
  **changes: Any,
) -> torch.Tensor:
  trainer = grpo_trainer(length=16, **changes)
  scored = (logprobs, entropies, None)
  trainer._get_per_token_logps_and_entropies = lambda *_, **__: scored
  return kind._compute_loss(trainer, None, batch(x))


def loss_case(
  name: str,
  loss_type: str,
  hyper: Arrays,
  kind: str = 'main',
  inputs: tuple[str, ...] = (),
  weights: np.ndarray | None = None,
  category: str = 'policy_loss',
  **changes: Any,
) -> Arrays:
  from trl import GRPOTrainer

  x = chosen(kind, *inputs)
  if weights is not None:
    x['weights'] = weights
    use = dict(use_vllm=True, vllm_importance_sampling_correction=True)
    changes |= use
  clips = {'eps_low': 'epsilon_low', 'eps_high': 'epsilon_high'}
  changes |= {v: hyper[k] for k, v in clips.items() if k in hyper}

  def fn(x: Arrays) -> torch.Tensor:
    entropies = torch.zeros_like(x['logp'])
    return loss_of(
      x, x['logp'], entropies, GRPOTrainer, loss_type=loss_type, **changes
    )

  hyper = hyper | {'loss_type': loss_type}
  if loss_type == 'dr_grpo':
    hyper['max_completion_length'] = 16
  outputs = differentiated(fn, x, 'logp')
  return case(f'{name}__trl', category, hyper, x, outputs)


def policy() -> list[Arrays]:
  clip = dict(eps_low=0.2, eps_high=0.28)
  found = []
  for loss in ('grpo', 'bnpo', 'dapo', 'dr_grpo', 'luspo'):
    for kind, tail in (('main', ''), ('empty', '_empty_row')):
      found.append(loss_case(f'ppo_clip_{loss}{tail}', loss, clip, kind))
  narrow = dict(eps_low=0.06, eps_high=0.09)
  level = {'importance_sampling_level': 'sequence'}
  for loss, kind in (
    ('grpo', 'main'),
    ('grpo', 'empty'),
    ('dapo', 'main'),
    ('luspo', 'main'),
  ):
    name = f'gspo_sequence_{loss}_{kind}'
    found.append(loss_case(name, loss, narrow | level, kind, **level))
  for kind in ('main', 'empty', 'on_policy'):
    hyper = dict(tau_pos=1.0, tau_neg=1.05)
    found.append(loss_case(f'sapo_{kind}', 'sapo', hyper, kind))
  vespo = dict(k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0)
  weights = np.exp(0.4 * normal(6, 8, 6)).round(6)
  opsm = {'delta': 0.05}
  masked = dict(inputs=('rollout_logp',), off_policy_mask_threshold=0.05)
  return [
    *found,
    loss_case('ppo_clip_grpo_on_policy', 'grpo', clip, 'on_policy'),
    loss_case('ppo_clip_grpo_tool_mask', 'grpo', clip, 'tool'),
    loss_case(
      'ppo_two_sided_delta', 'dapo', clip | {'delta': 4.0}, args={'delta': 4.0}
    ),
    loss_case('cispo_absolute_cap', 'cispo', {'cap': 5.0}, epsilon_high=5.0),
    loss_case('vespo_main', 'vespo', vespo),
    loss_case('vespo_extreme', 'vespo', vespo, 'extreme'),
    loss_case('ppo_clip_importance_weighted', 'dapo', clip, weights=weights),
    loss_case('ppo_clip_opsm', 'dapo', clip | opsm, **masked),
    rloo(),
  ]


def rloo() -> Arrays:
  from trl import RLOOTrainer

  x, hyper = chosen('main'), dict(eps_low=0.2, eps_high=0.28)

  def fn(x: Arrays) -> torch.Tensor:
    entropies = torch.zeros_like(x['logp'])
    clips = dict(epsilon_low=0.2, epsilon_high=0.28)
    return loss_of(x, x['logp'], entropies, RLOOTrainer, **clips)

  outputs = differentiated(fn, x, 'logp')
  return case('rloo_sequence_clip__trl', 'policy_loss', hyper, x, outputs)
