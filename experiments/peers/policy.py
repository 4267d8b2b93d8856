"""Policy losses of TRL and verl."""

from typing import Any

import numpy as np
import torch

from experiments.peers.common import (
  EXACT,
  PLUS_1E8,
  Arrays,
  case,
  differentiated,
  normal,
  rollout,
)
from experiments.peers.stand_ins import grpo_trainer, verl_config

TENSORS = ('logp', 'old_logp', 'advantages', 'mask')
SEQUENCE_MEAN = 'seq-mean-token-mean'


def chosen(kind: str, *more: str, per_token: bool = False) -> Arrays:
  x = rollout(kind)
  if per_token:
    x['advantages'] = x['token_advantages']
  return {name: x[name] for name in (*TENSORS, *more)}


# verl.


def verl(
  name: str,
  loss: str,
  hyper: Arrays,
  kind: str = 'main',
  mode: str = 'token-mean',
  weights: np.ndarray | None = None,
  per_token: bool = False,
  **options: Any,
) -> Arrays:
  from verl.trainer.ppo import core_algos

  x = chosen(kind, per_token=per_token)
  if weights is not None:
    x['weights'] = weights
  reads_clip = loss not in ('gpg', 'dro', 'kl_cov', 'reinforce')
  clips = {'eps_low': 'clip_ratio_low', 'eps_high': 'clip_ratio_high'}
  named = (
    {clips[k]: hyper[k] for k in clips if k in hyper} if reads_clip else {}
  )
  if 'dual_clip' in hyper:  # None: verl has no such switch
    named['clip_ratio_c'] = hyper['dual_clip'] or 1e30
  config = verl_config(**(named | options))
  extra = ('batch_num_tokens', 'global_batch_size', 'loss_scale_factor')
  info = {k: hyper[k] for k in extra if k in hyper}
  config.global_batch_info.update(info)

  def fn(x: Arrays) -> torch.Tensor:
    advantages = x['advantages']
    if advantages.ndim == 1:
      advantages = advantages[:, None].expand(x['mask'].shape)
    call = core_algos.compute_policy_loss_reinforce
    old = {'rollout_log_prob': x['old_logp']}
    if loss != 'reinforce':
      call, old = core_algos.get_policy_loss_fn(loss), {}
      old['old_log_prob'] = x['old_logp']
    return call(
      **old,
      log_prob=x['logp'],
      advantages=advantages,
      response_mask=x['mask'].double(),
      loss_agg_mode=mode,
      config=config,
      rollout_is_weights=x.get('weights'),
    )[0]

  fixed = loss in ('gspo', 'sapo', 'geo_mean') or mode == SEQUENCE_MEAN
  return case(
    f'{name}__verl',
    'policy_loss',
    hyper | {'loss_agg_mode': mode},
    x,
    differentiated(fn, x, 'logp'),
    PLUS_1E8 if fixed else EXACT,
  )


def verl_clipped() -> list[Arrays]:
  plain = dict(eps_low=0.2, eps_high=0.2, dual_clip=None)
  wide = dict(eps_low=0.2, eps_high=0.28, dual_clip=None)
  dual = wide | {'dual_clip': 3.0}
  found = []
  for mode in ('token-mean', 'token-sum', 'seq-mean-token-sum',
               SEQUENCE_MEAN, 'seq-mean-token-sum-norm'):  # fmt: skip
    norm = {'loss_scale_factor': 16} if mode.endswith('norm') else {}
    for kind, tail in (('main', ''), ('empty', '_empty_row')):
      name = f'ppo_clip_{mode.replace("-", "_")}{tail}'
      found.append(verl(name, 'vanilla', plain | norm, kind, mode))
  tokens, rows = {'batch_num_tokens': 400}, {'global_batch_size': 64}
  where = 'global_denominator'
  weights = np.exp(0.4 * normal(6, 8, 6)).clip(max=2).round(6)
  return [
    *found,
    verl('ppo_clip_higher', 'vanilla', wide),
    verl('ppo_clip_on_policy', 'vanilla', dual, 'on_policy'),
    verl('ppo_clip_tool_mask', 'vanilla', plain, 'tool', SEQUENCE_MEAN),
    verl('ppo_clip_token_advantages', 'vanilla', plain, per_token=True),
    verl(f'ppo_clip_token_mean_{where}', 'vanilla', plain | tokens),
    verl(f'ppo_clip_seq_mean_{where}', 'vanilla', plain | rows,
         mode=SEQUENCE_MEAN),
    verl('ppo_clip_weighted', 'vanilla', dual, weights=weights),
    verl('ppo_dual_clip_main', 'vanilla', dual),
    verl('ppo_dual_clip_extreme', 'vanilla', dual, 'extreme'),
  ]  # fmt: skip


def verl_variants() -> list[Arrays]:
  narrow = dict(eps_low=0.06, eps_high=0.09)
  sapo = dict(tau_pos=1.0, tau_neg=1.05)
  weights = np.exp(0.4 * normal(6, 8, 6)).clip(max=2).round(6)
  found = []
  for kind in ('main', 'empty', 'extreme', 'on_policy', 'tool'):
    form = f'gspo_token_form_{kind}'
    found += [
      verl(form, 'gspo', narrow, kind, SEQUENCE_MEAN),
      verl(f'sapo_{kind}', 'sapo', sapo, kind, SEQUENCE_MEAN, **sapo),
    ]
  for kind in ('main', 'empty', 'tool'):
    hyper = dict(eps_low=0.4, eps_high=0.4)
    found.append(verl(f'gmpo_geo_mean_{kind}', 'geo_mean', hyper, kind))
  for divergence, low, high in (('tv', 0.15, 0.2), ('kl', 0.05, 0.07)):
    hyper = dict(div_low=low, div_high=high, ratio_cap=20.0)
    for kind in ('main', 'extreme'):
      found.append(
        verl(f'dppo_{divergence}_{kind}', f'dppo_{divergence}', hyper, kind,
             clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=20.0)
      )  # fmt: skip
  tight = dict(eps_low=0.3, eps_high=0.2)
  return [
    *found,
    verl('gspo_token_form_token_mean', 'gspo', narrow),
    verl('gspo_token_form_token_advantages', 'gspo', narrow,
         mode=SEQUENCE_MEAN, per_token=True),
    verl('cispo_offset_caps', 'cispo', dict(eps_low=1.0, eps_high=4.0)),
    verl('cispo_offset_caps_extreme', 'cispo', tight, 'extreme'),
    verl('gpg_token_mean', 'gpg', {}),
    verl('gpg_seq_mean_token_sum', 'gpg', {}, mode='seq-mean-token-sum'),
    verl('reinforce_plain', 'reinforce', {}, mode='seq-mean-token-sum'),
    verl('reinforce_weighted', 'reinforce', {}, mode='seq-mean-token-sum',
         weights=weights),
  ]  # fmt: skip


def verl_anchored() -> list[Arrays]:
  """Covariances, DRO, and losses that reject inside."""
  from verl.workers.config.actor import PolicyLossConfig

  found = []
  # As many tokens are drawn as qualify: the draw does not matter.
  for name, ratio, low, high in (
    ('all_eligible', 1.0, 0.2, 2.0),
    ('half_allowed', 0.5, 0.6, 3.0),
    ('none_eligible', 0.1, 50.0, 60.0),
  ):
    names = dict(clip_cov_ratio=ratio, clip_cov_lb=low, clip_cov_ub=high)
    hyper = dict(eps_low=0.2, eps_high=0.2, clip_cov_ratio=ratio)
    hyper |= dict(cov_lb=low, cov_ub=high)
    options = {'policy_loss': PolicyLossConfig(**names)}
    found.append(verl(f'clip_cov_{name}', 'clip_cov', hyper, **options))
  for kind, coef in (('main', 1.0), ('main', 0.1), ('on_policy', 1.0)):
    hyper = dict(kl_cov_ratio=0.1, coef=coef)
    names = dict(kl_cov_ratio=0.1, ppo_kl_coef=coef)
    options = {'policy_loss': PolicyLossConfig(**names)}
    name = f'kl_cov_{kind}_{"unit" if coef == 1 else "small"}'
    found.append(verl(name, 'kl_cov', hyper, kind, **options))
  for kind in ('main', 'on_policy'):
    options = {'policy_loss': PolicyLossConfig(dro_beta=0.1)}
    found.append(verl(f'dro_{kind}', 'dro', {'beta': 0.1}, kind, **options))
  clip = dict(eps_low=0.2, eps_high=0.28, dual_clip=3.0)
  for loss, inner in (
    ('ppo_clip', dict(rollout_is=None, rollout_rs='token_k2',
                      rollout_rs_threshold=0.4)),
    ('reinforce', dict(rollout_is='token', rollout_is_threshold=2.0,
                       rollout_rs='seq_mean_k3', rollout_rs_threshold=0.2)),
  ):  # fmt: skip
    hyper = clip | inner | {'loss_type': loss}
    options = {'policy_loss': PolicyLossConfig(rollout_correction=hyper)}
    found.append(verl(f'bypass_{loss}', 'bypass_mode', hyper, **options))
  return found


# TRL.


def trl_inputs(x: Arrays) -> Arrays:
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


def trl_loss(
  x: Arrays,
  logprobs: torch.Tensor,
  entropies: torch.Tensor,
  kind: Any,
  **changes: Any,
) -> torch.Tensor:
  trainer = grpo_trainer(length=16, **changes)
  scored = (logprobs, entropies, None)
  trainer._get_per_token_logps_and_entropies = lambda *_, **__: scored
  return kind._compute_loss(trainer, None, trl_inputs(x))


def trl(
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
    return trl_loss(
      x, x['logp'], entropies, GRPOTrainer, loss_type=loss_type, **changes
    )

  hyper = hyper | {'loss_type': loss_type}
  if loss_type == 'dr_grpo':
    hyper['max_completion_length'] = 16
  outputs = differentiated(fn, x, 'logp')
  return case(f'{name}__trl', category, hyper, x, outputs)


def trl_policy() -> list[Arrays]:
  clip = dict(eps_low=0.2, eps_high=0.28)
  found = []
  for loss in ('grpo', 'bnpo', 'dapo', 'dr_grpo', 'luspo'):
    for kind, tail in (('main', ''), ('empty', '_empty_row')):
      found.append(trl(f'ppo_clip_{loss}{tail}', loss, clip, kind))
  narrow = dict(eps_low=0.06, eps_high=0.09)
  level = {'importance_sampling_level': 'sequence'}
  for loss, kind in (
    ('grpo', 'main'), ('grpo', 'empty'), ('dapo', 'main'), ('luspo', 'main'),
  ):  # fmt: skip
    name = f'gspo_sequence_{loss}_{kind}'
    found.append(trl(name, loss, narrow | level, kind, **level))
  for kind in ('main', 'empty', 'on_policy'):
    hyper = dict(tau_pos=1.0, tau_neg=1.05)
    found.append(trl(f'sapo_{kind}', 'sapo', hyper, kind))
  vespo = dict(k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0)
  weights = np.exp(0.4 * normal(6, 8, 6)).round(6)
  opsm = {'delta': 0.05}
  masked = dict(inputs=('rollout_logp',), off_policy_mask_threshold=0.05)
  return [
    *found,
    trl('ppo_clip_grpo_on_policy', 'grpo', clip, 'on_policy'),
    trl('ppo_clip_grpo_tool_mask', 'grpo', clip, 'tool'),
    trl('ppo_two_sided_delta', 'dapo', clip | {'delta': 4.0},
        args={'delta': 4.0}),
    trl('cispo_absolute_cap', 'cispo', {'cap': 5.0}, epsilon_high=5.0),
    trl('vespo_main', 'vespo', vespo),
    trl('vespo_extreme', 'vespo', vespo, 'extreme'),
    trl('ppo_clip_importance_weighted', 'dapo', clip, weights=weights),
    trl('ppo_clip_opsm', 'dapo', clip | opsm, **masked),
    rloo(),
  ]  # fmt: skip


def rloo() -> Arrays:
  from trl import RLOOTrainer

  x, hyper = chosen('main'), dict(eps_low=0.2, eps_high=0.28)

  def fn(x: Arrays) -> torch.Tensor:
    entropies = torch.zeros_like(x['logp'])
    clips = dict(epsilon_low=0.2, epsilon_high=0.28)
    return trl_loss(x, x['logp'], entropies, RLOOTrainer, **clips)

  outputs = differentiated(fn, x, 'logp')
  return case('rloo_sequence_clip__trl', 'policy_loss', hyper, x, outputs)


def policy() -> list[Arrays]:
  return [*verl_clipped(), *verl_variants(), *verl_anchored(), *trl_policy()]
