"""Corrections of the sampler's mismatch by verl, and TRL's sequence mask."""

import torch

from experiments.peers.common import (
  PLUS_1E8,
  Arrays,
  case,
  rollout,
  tensors,
)

NAMES = ('old_logp', 'rollout_logp', 'mask')


def drawn(kind: str) -> tuple[Arrays, torch.Tensor, torch.Tensor]:
  x = {k: rollout(kind)[k] for k in NAMES}
  given = tensors(x)
  ratio = given['old_logp'] - given['rollout_logp']
  return x, ratio, given['mask'].double()


def weighted() -> list[Arrays]:
  from verl.trainer.ppo.rollout_corr_helper import (
    compute_rollout_correction_weights,
  )

  found = []
  for level, short in (('token', 'token'), ('sequence', 'seq')):
    for threshold, batch_norm, kind in (
      (1.3, False, 'main'), (1.3, True, 'main'), (1.3, True, 'empty'),
      (1.3, False, 'tool'), ('0.7_1.3', False, 'main'), (1.3, False, 'extreme'),
    ):  # fmt: skip
      x, ratio, mask = drawn(kind)
      hyper = dict(level=level, threshold=threshold)
      values, _ = compute_rollout_correction_weights(
        ratio, mask, level, threshold, batch_norm
      )
      name = 'tis' if threshold == 1.3 else 'mask'
      name = f'rollout_{short}_{name}_{kind}' + '_batch_norm' * batch_norm
      hyper |= {'batch_normalize': batch_norm}
      outputs = {'weights': values.numpy()}
      made = (f'{name}__verl', 'rollout_correction', hyper, x, outputs)
      found.append(case(*made, PLUS_1E8))
  return found


def rejected() -> list[Arrays]:
  from verl.trainer.ppo.rollout_corr_helper import (
    compute_rollout_rejection_mask,
  )

  found = []
  for option, threshold in (
    ('token_k1', '0.7_1.4'), ('token_k1', '0.6_1.2'), ('token_k2', 0.05),
    ('token_k3', 0.05), ('seq_sum_k1', '0.6_1.5'), ('seq_sum_k2', 0.1),
    ('seq_sum_k3', 0.1), ('seq_mean_k1', '0.9_1.12'), ('seq_mean_k2', 0.04),
    ('seq_mean_k3', 0.04), ('seq_max_k2', 0.1), ('seq_max_k3', 0.1),
  ):  # fmt: skip
    kind = 'tool' if option.startswith('seq') else 'main'
    x, ratio, mask = drawn(kind)
    kept, metrics = compute_rollout_rejection_mask(
      ratio, mask, option, threshold
    )
    fraction = metrics['rollout_rs_masked_fraction']
    outputs = dict(mask=kept.bool().numpy(), masked_fraction=fraction)
    name = f'rollout_reject_{option}_{threshold}__verl'
    hyper = dict(option=option, threshold=threshold)
    found.append(case(name, 'rollout_rejection', hyper, x, outputs, PLUS_1E8))
  return found


def measured() -> list[Arrays]:
  from verl.trainer.ppo.rollout_corr_helper import compute_offpolicy_metrics

  found = []
  for kind in ('main', 'empty', 'tool'):
    x, _, mask = drawn(kind)
    given = tensors(x)
    old, sampler = given['old_logp'], given['rollout_logp']
    outputs = compute_offpolicy_metrics(old, sampler, mask)
    name = f'offpolicy_metrics_{kind}__verl'
    found.append(case(name, 'offpolicy_metrics', {}, x, outputs, PLUS_1E8))
  return found


def off_policy() -> list[Arrays]:
  from trl import GRPOTrainer

  found = []
  for kind in ('main', 'empty', 'tool'):
    names = ('logp', 'rollout_logp', 'advantages', 'mask')
    x = {k: rollout(kind)[k] for k in names}
    given = tensors(x)
    args = (given['advantages'][:, None], given['logp'], given['rollout_logp'])
    kept = GRPOTrainer.get_off_policy_mask(*args, given['mask'].double(), 0.05)
    outputs = {'keep': kept[:, 0].bool().numpy()}
    name, hyper = f'opsm_mask_{kind}__trl', {'delta': 0.05}
    found.append(case(name, 'opsm', hyper, x, outputs))
  return found


def corrections() -> list[Arrays]:
  return [*weighted(), *rejected(), *measured(), *off_policy()]
