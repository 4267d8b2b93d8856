"""Advantages, value losses, rewards and controllers of TRL and verl."""

from types import SimpleNamespace
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
  tensors,
)

GROUPS = np.array([3, 8, 3, 5, 8, 3, 5, 8])
# Group 3 has 0, 1, 1; group 8 real rewards; group 5 is nearly constant.
REWARDS = np.array([0, 0.5, 1, 0.7, -2, 1, 0.7001, 3])


def grouped(kind: str) -> Arrays:
  """Samples of several prompts, in any order."""
  x = {'rewards': REWARDS, 'mask': rollout(kind)['mask'], 'group_id': GROUPS}
  if kind == 'singleton':
    x['group_id'] = np.where(np.arange(8) == 7, 11, GROUPS)
  rows = np.zeros(x['mask'].shape)
  # The reward of an empty row stands on its first place.
  last = np.where(x['mask'], np.arange(6), 0).max(axis=1)
  rows[np.arange(8), last] = x['rewards']
  return x | {'token_rewards': rows}


def verl(
  name: str,
  estimator: str,
  hyper: Arrays,
  kind: str = 'main',
  more: Arrays | None = None,
  tolerance: dict[str, float] = EXACT,
  **options: Any,
) -> Arrays:
  from verl.trainer.ppo.core_algos import get_adv_estimator_fn

  x = grouped(kind) | (more or {})
  given = tensors({k: v for k, v in x.items() if k != 'group_id'})
  options = {
    k: torch.as_tensor(v) if isinstance(v, np.ndarray) else v
    for k, v in options.items()
  }
  found, returns = get_adv_estimator_fn(estimator)(
    token_level_rewards=given['token_rewards'],
    response_mask=given['mask'].double(),
    index=x['group_id'],
    **options,
  )
  outputs = dict(advantages=found.numpy(), returns=returns.numpy())
  if hyper.get('outcome', True):
    del outputs['returns']  # verl's name for the same numbers
  hyper = {k: v for k, v in hyper.items() if k != 'outcome'}
  return case(f'adv_{name}__verl', 'advantage', hyper, x, outputs, tolerance)


def outcome() -> list[Arrays]:
  found = []
  std = dict(eps=1e-6, ddof=1, scale='group')
  for kind, tail in (('main', ''), ('empty', '_empty_row')):
    baselines = normal(20, 8)
    found += [
      verl(f'grpo_std{tail}', 'grpo', std, kind),
      verl(f'grpo_centred{tail}', 'grpo', dict(scale='none'), kind,
           norm_adv_by_std_in_grpo=False),
      verl(f'rloo{tail}', 'rloo', {}, kind),
      verl(f'opo{tail}', 'opo', {}, kind),
      verl(f'gpg{tail}', 'gpg', dict(f_norm=1.0), kind),
      verl(f'remax{tail}', 'remax', {}, kind, {'baselines': baselines},
           reward_baselines=baselines),
      verl(f'reinforce_pp_baseline{tail}', 'reinforce_plus_plus_baseline',
           dict(whiten='token'), kind, tolerance=PLUS_1E8),
    ]  # fmt: skip
  for normalized in (True, False):
    hyper = dict(eps=1e-6, std=normalized)
    config = {'norm_adv_by_std_in_grpo': normalized}
    name = f'grpo_passk_{"std" if normalized else "nostd"}'
    found.append(verl(name, 'grpo_passk', hyper, config=config))
  eps = dict(eps=1e-6)
  return [
    *found,
    verl('grpo_singleton_group', 'grpo', eps, 'singleton'),
    verl('rloo_singleton_group', 'rloo', eps, 'singleton'),
    verl('rloo_vectorized_singleton_group', 'rloo_vectorized', eps,
         'singleton'),
  ]  # fmt: skip


def per_token() -> list[Arrays]:
  from verl.trainer.ppo import core_algos
  from verl.utils.torch_functional import masked_whiten

  found = []
  for name, kind, discount, lambda_ in (
    ('gae', 'main', 1.0, 0.95),
    ('gae_empty_row', 'empty', 1.0, 0.95),
    ('gae_tool_mask', 'tool', 0.97, 0.8),
    ('gae_tool_mask_mc', 'tool', 1.0, 1.0),
  ):
    mask = rollout(kind)['mask']
    rewards = np.where(mask, normal(21, 8, 6), 0)
    x = dict(token_rewards=rewards, values=normal(22, 8, 6), mask=mask)
    given = tensors(x)
    advantages, returns = core_algos.compute_gae_advantage_return(
      given['token_rewards'], given['values'], given['mask'].double(),
      discount, lambda_,
    )  # fmt: skip
    outputs = dict(advantages=advantages.numpy(), returns=returns.numpy())
    outputs['advantages_unwhitened'] = outputs['returns'] - x['values']
    hyper = dict(gamma=discount, lam=lambda_)
    full = f'adv_{name}__verl'
    found.append(case(full, 'advantage', hyper, x, outputs, PLUS_1E8))
  for kind, discount in (('main', 1.0), ('tool', 0.95)):
    config = SimpleNamespace(gamma=discount)
    made = verl(
      f'reinforce_pp_{kind}', 'reinforce_plus_plus',
      dict(gamma=discount, outcome=False), kind, tolerance=PLUS_1E8,
      config=config,
    )  # fmt: skip
    del made['inputs']['rewards'], made['inputs']['group_id']
    found.append(made)
  more = dict(old_logp=rollout()['old_logp'])
  more |= dict(sum_pi_squared=np.abs(normal(23, 8, 6)).clip(max=1))
  options = dict(old_log_probs=more['old_logp'])
  options |= dict(sum_pi_squared=more['sum_pi_squared'])
  hyper = dict(eps=1e-8, outcome=False)
  name = 'optimal_token_baseline'
  made = verl(name, name, hyper, more=more, **options)
  del made['inputs']['rewards']
  found.append(made)
  for shifted in (True, False):
    x = dict(values=normal(24, 8, 6), mask=rollout('tool')['mask'])
    values = masked_whiten(*tensors(x).values(), shift_mean=shifted)
    name = f'masked_whiten_{"zero" if shifted else "keep"}_mean__verl'
    hyper, outputs = {'shift_mean': shifted}, {'whitened': values.numpy()}
    found.append(case(name, 'advantage', hyper, x, outputs, PLUS_1E8))
  return found


def trl_groups() -> list[Arrays]:
  """TRL has these lines inside a method that also samples: retyped here.

  Only the deviation is a function of the peer.
  """
  from trl.trainer.utils import nanstd

  x = dict(rewards=REWARDS, group_id=np.repeat([0, 1], 4))
  rewards = torch.as_tensor(REWARDS).view(2, 4)
  centered = rewards - rewards.mean(dim=1, keepdim=True)
  divisors = {
    'group': nanstd(rewards, dim=1)[:, None] + 1e-4,
    'batch': nanstd(rewards) + 1e-4,
    'none': torch.ones(()),
  }
  return [
    case(
      f'adv_grpo_scale_{scale}__trl',
      'advantage',
      dict(scale=scale, eps=1e-4),
      x,
      {'advantages_sample': (centered / divisor).flatten().numpy()},
      dict(rtol=2e-7, atol=2e-8),  # nanstd rounds n/(n−1) to float32
    )
    for scale, divisor in divisors.items()
  ]


def critics() -> list[Arrays]:
  from verl.trainer.ppo.core_algos import compute_value_loss

  x = dict(
    vpred=normal(25, 8, 6),
    old_values=normal(26, 8, 6),
    returns=normal(27, 8, 6),
    mask=rollout('tool')['mask'],
  )
  found = []
  for mode, clip in (
    ('token-mean', 0.5), ('seq-mean-token-mean', 0.2), ('token-mean', 1e9),
  ):  # fmt: skip

    def fn(x: Arrays, mode: str = mode, clip: float = clip) -> torch.Tensor:
      args = (x[k] for k in ('vpred', 'returns', 'old_values'))
      return compute_value_loss(*args, x['mask'].double(), clip, mode)[0]

    hyper = dict(cliprange_value=clip, loss_agg_mode=mode)
    name = f'value_loss_{clip:g}_{mode.replace("-", "_")}__verl'
    outputs = differentiated(fn, x, 'vpred')
    found.append(case(name, 'value_loss', hyper, x, outputs, PLUS_1E8))
  return found


def penalised() -> list[Arrays]:
  """verl's `apply_kl_penalty`, retyped: its module needs a serving engine.

  The estimator, the mean and the controller are functions of the peer.
  """
  from verl.trainer.ppo.core_algos import AdaptiveKLController, kl_penalty
  from verl.utils.torch_functional import masked_mean

  found = []
  for kind in ('kl', 'low_var_kl'):
    for drawn in ('main', 'tool'):
      x = {k: rollout(drawn)[k] for k in ('old_logp', 'ref_logp', 'mask')}
      x['token_scores'] = grouped(drawn)['token_rewards']
      given = tensors(x)
      mask = given['mask'].double()
      penalty = kl_penalty(given['old_logp'], given['ref_logp'], kind) * mask
      current = masked_mean(penalty, mask, axis=-1).mean().item()
      made = AdaptiveKLController(0.05, 0.1, 100)
      made.update(current, len(mask))
      rewards = (given['token_scores'] - 0.05 * penalty).numpy()
      outputs = dict(token_rewards=rewards, current_kl=current)
      outputs['beta_after'] = made.value
      hyper = dict(kind=kind, beta=0.05, target=0.1, horizon=100)
      name = f'kl_in_reward_{kind}_{drawn}__verl'
      found.append(case(name, 'kl_in_reward', hyper, x, outputs, PLUS_1E8))
  return found


def controller() -> Arrays:
  from verl.trainer.ppo.core_algos import AdaptiveKLController

  x = dict(kl=0.2 * np.abs(normal(28, 12)), n_steps=np.arange(1, 13) * 16)
  made, values = AdaptiveKLController(0.2, 0.1, 1000), []
  for kl, steps in zip(*x.values(), strict=True):
    made.update(kl, int(steps))
    values.append(made.value)
  hyper = dict(init=0.2, target=0.1, horizon=1000)
  name, outputs = 'adaptive_kl_controller__verl', {'coef': values}
  return case(name, 'kl_controller', hyper, x, outputs)


def shaped() -> list[Arrays]:
  from trl.rewards import (
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
  )

  lengths = np.array([0, 1, 15, 16, 17, 20, 23, 24, 25, 40])
  fn = get_soft_overlong_punishment(24, 8)
  penalty = fn(completion_ids=[[1] * n for n in lengths])
  hyper = dict(max_len=24, cache=8)
  soft = ('overlong_soft__trl', 'reward_shaping', hyper, {'length': lengths})
  tokens = np.random.default_rng(29).integers(3, size=(8, 6))
  tokens[~rollout()['mask']] = -1
  ids = [row[row >= 0].tolist() for row in tokens]
  hyper = dict(ngram_size=2, max_penalty=-0.5)
  rows = get_repetition_penalty_reward(**hyper)(completion_ids=ids)
  repeated = ('repetition__trl', 'reward_shaping', hyper, {'tokens': tokens})
  return [
    case(*soft, {'penalty': penalty}),
    case(*repeated, {'penalty': rows}),
  ]


def advantages() -> list[Arrays]:
  families = (outcome, per_token, trl_groups, critics, penalised, shaped)
  return [*(made for fn in families for made in fn()), controller()]
