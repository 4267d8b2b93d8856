"""Policy losses of verl."""

from typing import Any

import numpy as np
import torch

from experiments.peers.common import (
  EXACT,
  PLUS_1E8,
  SEQUENCE_MEAN,
  Arrays,
  case,
  chosen,
  differentiated,
  normal,
)
from experiments.peers.stand_ins import verl_config


def loss_case(
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


def clipped() -> list[Arrays]:
  plain = dict(eps_low=0.2, eps_high=0.2, dual_clip=None)
  wide = dict(eps_low=0.2, eps_high=0.28, dual_clip=None)
  dual = wide | {'dual_clip': 3.0}
  found = []
  for mode in (
    'token-mean',
    'token-sum',
    'seq-mean-token-sum',
    SEQUENCE_MEAN,
    'seq-mean-token-sum-norm',
  ):
    norm = {'loss_scale_factor': 16} if mode.endswith('norm') else {}
    for kind, tail in (('main', ''), ('empty', '_empty_row')):
      name = f'ppo_clip_{mode.replace("-", "_")}{tail}'
      found.append(loss_case(name, 'vanilla', plain | norm, kind, mode))
  tokens, rows = {'batch_num_tokens': 400}, {'global_batch_size': 64}
  where = 'global_denominator'
  weights = np.exp(0.4 * normal(6, 8, 6)).clip(max=2).round(6)
  return [
    *found,
    loss_case('ppo_clip_higher', 'vanilla', wide),
    loss_case('ppo_clip_on_policy', 'vanilla', dual, 'on_policy'),
    loss_case('ppo_clip_tool_mask', 'vanilla', plain, 'tool', SEQUENCE_MEAN),
    loss_case('ppo_clip_token_advantages', 'vanilla', plain, per_token=True),
    loss_case(f'ppo_clip_token_mean_{where}', 'vanilla', plain | tokens),
    loss_case(
      f'ppo_clip_seq_mean_{where}', 'vanilla', plain | rows, mode=SEQUENCE_MEAN
    ),
    loss_case('ppo_clip_weighted', 'vanilla', dual, weights=weights),
    loss_case('ppo_dual_clip_main', 'vanilla', dual),
    loss_case('ppo_dual_clip_extreme', 'vanilla', dual, 'extreme'),
  ]


def variants() -> list[Arrays]:
  narrow = dict(eps_low=0.06, eps_high=0.09)
  sapo = dict(tau_pos=1.0, tau_neg=1.05)
  weights = np.exp(0.4 * normal(6, 8, 6)).clip(max=2).round(6)
  found = []
  for kind in ('main', 'empty', 'extreme', 'on_policy', 'tool'):
    form = f'gspo_token_form_{kind}'
    found += [
      loss_case(form, 'gspo', narrow, kind, SEQUENCE_MEAN),
      loss_case(f'sapo_{kind}', 'sapo', sapo, kind, SEQUENCE_MEAN, **sapo),
    ]
  for kind in ('main', 'empty', 'tool'):
    hyper = dict(eps_low=0.4, eps_high=0.4)
    found.append(loss_case(f'gmpo_geo_mean_{kind}', 'geo_mean', hyper, kind))
  for divergence, low, high in (('tv', 0.15, 0.2), ('kl', 0.05, 0.07)):
    hyper = dict(div_low=low, div_high=high, ratio_cap=20.0)
    for kind in ('main', 'extreme'):
      found.append(
        loss_case(
          f'dppo_{divergence}_{kind}',
          f'dppo_{divergence}',
          hyper,
          kind,
          clip_ratio_low=low,
          clip_ratio_high=high,
          clip_ratio_c=20.0,
        )
      )
  tight = dict(eps_low=0.3, eps_high=0.2)
  return [
    *found,
    loss_case('gspo_token_form_token_mean', 'gspo', narrow),
    loss_case(
      'gspo_token_form_token_advantages',
      'gspo',
      narrow,
      mode=SEQUENCE_MEAN,
      per_token=True,
    ),
    loss_case('cispo_offset_caps', 'cispo', dict(eps_low=1.0, eps_high=4.0)),
    loss_case('cispo_offset_caps_extreme', 'cispo', tight, 'extreme'),
    loss_case('gpg_token_mean', 'gpg', {}),
    loss_case('gpg_seq_mean_token_sum', 'gpg', {}, mode='seq-mean-token-sum'),
    loss_case('reinforce_plain', 'reinforce', {}, mode='seq-mean-token-sum'),
    loss_case(
      'reinforce_weighted',
      'reinforce',
      {},
      mode='seq-mean-token-sum',
      weights=weights,
    ),
  ]


def anchored() -> list[Arrays]:
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
    found.append(loss_case(f'clip_cov_{name}', 'clip_cov', hyper, **options))
  for kind, coef in (('main', 1.0), ('main', 0.1), ('on_policy', 1.0)):
    hyper = dict(kl_cov_ratio=0.1, coef=coef)
    names = dict(kl_cov_ratio=0.1, ppo_kl_coef=coef)
    options = {'policy_loss': PolicyLossConfig(**names)}
    name = f'kl_cov_{kind}_{"unit" if coef == 1 else "small"}'
    found.append(loss_case(name, 'kl_cov', hyper, kind, **options))
  for kind in ('main', 'on_policy'):
    options = {'policy_loss': PolicyLossConfig(dro_beta=0.1)}
    found.append(
      loss_case(f'dro_{kind}', 'dro', {'beta': 0.1}, kind, **options)
    )
  clip = dict(eps_low=0.2, eps_high=0.28, dual_clip=3.0)
  for loss, inner in (
    (
      'ppo_clip',
      dict(rollout_is=None, rollout_rs='token_k2', rollout_rs_threshold=0.4),
    ),
    (
      'reinforce',
      dict(
        rollout_is='token',
        rollout_is_threshold=2.0,
        rollout_rs='seq_mean_k3',
        rollout_rs_threshold=0.2,
      ),
    ),
  ):
    hyper = clip | inner | {'loss_type': loss}
    options = {'policy_loss': PolicyLossConfig(rollout_correction=hyper)}
    found.append(loss_case(f'bypass_{loss}', 'bypass_mode', hyper, **options))
  return found


def policy() -> list[Arrays]:
  return [*clipped(), *variants(), *anchored()]
