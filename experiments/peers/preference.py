"""Preference losses and reward models of TRL."""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from experiments.peers.common import (
  EXACT,
  FLOAT32,
  Arrays,
  case,
  differentiated,
  normal,
)
from experiments.peers.stand_ins import trainer

PAIRS = 8
SUMMED = ('chosen_logps', 'rejected_logps')
CHOSEN = np.array([4, 1, 7, 3, 2, 5, 6, 3])
REJECTED = np.array([3, 6, 1, 3, 4, 2, 5, 1])


def pairs() -> Arrays:
  """Log-ratios of both signs, one pair at the reference, one far from it."""
  chosen, rejected = (-2 * np.abs(normal(k, PAIRS)) - 0.2 for k in (40, 41))
  gaps = 2 * normal(42, 2, PAIRS)
  gaps[:, 3], gaps[:, 5] = 0, [12, -12]
  x = dict(chosen_logps=chosen, rejected_logps=rejected)
  x |= dict(ref_chosen_logps=chosen - gaps[0])
  x |= dict(ref_rejected_logps=rejected - gaps[1])
  x = {k: v.round(6) for k, v in x.items()}
  return x | dict(chosen_len=CHOSEN, rejected_len=REJECTED)


def scored(*logps: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
  """A model whose first completion token carries the sum of each sequence."""
  sums, width = torch.cat(logps), int(max(*CHOSEN, *REJECTED))
  zeros = torch.zeros((len(sums), width - 1))
  outputs = SimpleNamespace(
    log_probs=torch.cat([sums[:, None], zeros], dim=1),
    entropy=torch.zeros((len(sums), width)),
    mean_logits=torch.zeros((len(sums), width)),
    is_top1=torch.zeros((len(sums), width), dtype=torch.bool),
  )
  ids = torch.zeros((len(sums), width + 1), dtype=torch.long)
  inputs = dict(input_ids=ids, attention_mask=ids + 1)
  return lambda **_: outputs, inputs


def dpo(
  name: str,
  loss_type: str,
  divergence: str = 'reverse_kl',
  smoothing: float = 0.0,
  tolerance: dict[str, float] = EXACT,
  **more: Any,
) -> Arrays:
  from trl import DPOTrainer

  x = pairs()
  lengths = torch.as_tensor(np.concatenate([CHOSEN, REJECTED]))
  made = trainer(
    args=SimpleNamespace(discopop_tau=0.05),
    beta=0.1,
    f_alpha_divergence_coef=more.get('alpha', 0.5),
    f_divergence_type=divergence,
    label_smoothing=smoothing,
    ld_alpha=None,
    loss_types=[loss_type],
    loss_weights=[1.0],
    precompute_ref_logps=True,
    use_weighting=False,
  )

  def fn(x: Arrays) -> torch.Tensor:
    model, inputs = scored(x['chosen_logps'], x['rejected_logps'])
    places = torch.arange(inputs['input_ids'].shape[1])
    inputs['completion_mask'] = (places > 0) & (places <= lengths[:, None])
    inputs |= {k: x[k] for k in ('ref_chosen_logps', 'ref_rejected_logps')}
    return DPOTrainer._compute_loss(made, model, inputs, False)

  hyper = dict(loss_type=loss_type, beta=0.1, f_divergence=divergence) | more
  if smoothing:
    hyper['label_smoothing'] = smoothing
  outputs = differentiated(fn, x, *SUMMED)
  return case(f'dpo_{name}__trl', 'preference', hyper, x, outputs, tolerance)


def dpo_family() -> list[Arrays]:
  plain = ('sigmoid', 'sigmoid_norm', 'hinge', 'ipo', 'nca_pair', 'bco_pair',
           'sppo_hard', 'aot', 'apo_zero', 'apo_down', 'discopop')  # fmt: skip
  found = [dpo(name, name) for name in plain]
  smoothed = ('exo_pair', 'robust', 'aot')
  found += [dpo(f'{k}_smoothed', k, smoothing=0.1) for k in smoothed]
  for divergence in ('forward_kl', 'js_divergence'):
    found += [dpo(f'{k}_{divergence}', k, divergence)
              for k in ('sigmoid', 'ipo', 'hinge')]  # fmt: skip
  name = 'sigmoid_label_smoothing_ignored'
  return [*found, dpo(name, 'sigmoid', smoothing=0.3)]


def cpo_trainer(**state: Any) -> SimpleNamespace:
  from trl.experimental.cpo import CPOTrainer

  defaults = dict(alpha=0.0, label_smoothing=0.0, cpo_alpha=1.0)
  made = trainer(**(defaults | state))
  made.cpo_loss = functools.partial(CPOTrainer.cpo_loss, made)
  return made


def cpo() -> list[Arrays]:
  """CPO, SimPO, and losses of a log-ratio which DPO does not have."""
  from trl.experimental.cpo import CPOTrainer

  found = []
  x = {k: v for k, v in pairs().items() if not k.startswith('ref_')}
  for kind in ('sigmoid', 'hinge'):
    made = cpo_trainer(beta=0.1, loss_type=kind)

    def whole(x: Arrays, made: Any = made) -> torch.Tensor:
      nll = -x['chosen_logps'].sum() / x['chosen_len'].sum()
      logits = torch.zeros(())
      args = (x['chosen_logps'], x['rejected_logps'], logits, logits, nll)
      made.concatenated_forward = lambda *_: args
      return CPOTrainer.get_batch_loss_metrics(made, None, {})[0]

    hyper = dict(beta=0.1, cpo_alpha=1.0, loss_type=kind)
    outputs = differentiated(whole, x, *SUMMED)
    found.append(case(f'cpo_{kind}_nll__trl', 'preference', hyper, x, outputs))
  for gamma in (0.0, 1.0):
    made = cpo_trainer(beta=2.0, loss_type='simpo', simpo_gamma=gamma)

    def simpo(x: Arrays, made: Any = made) -> torch.Tensor:
      chosen = x['chosen_logps'] / x['chosen_len']
      return made.cpo_loss(chosen, x['rejected_logps'] / x['rejected_len'])[
        0
      ].mean()

    hyper = dict(beta=2.0, gamma=gamma)
    outputs = differentiated(simpo, x, *SUMMED)
    name = f'simpo_gamma_{gamma:g}__trl'
    found.append(case(name, 'preference', hyper, x, outputs))
  for name, kind, smoothing in (
    ('conservative_label_smoothing', 'sigmoid', 0.1),
    ('ipo_unnormalised', 'ipo', 0.0),
  ):
    options = {'label_smoothing': smoothing} if smoothing else {}
    made = cpo_trainer(beta=0.1, loss_type=kind, **options)

    def ratios(x: Arrays, made: Any = made) -> torch.Tensor:
      args = (x[k] - x[f'ref_{k}'] for k in SUMMED)
      return made.cpo_loss(*args)[0].mean()

    hyper = dict(beta=0.1, loss_type=kind, **options)
    outputs = differentiated(ratios, pairs(), *SUMMED)
    full = f'dpo_{name}__trl'
    found.append(case(full, 'preference', hyper, pairs(), outputs))
  return found


def orpo() -> Arrays:
  from trl.experimental.orpo import ORPOTrainer

  x = {k: v for k, v in pairs().items() if k in SUMMED}
  x = {k.replace('_logps', '_avg_logps'): v for k, v in x.items()}
  x['nll'] = np.array(0.75)
  made = trainer(beta=0.1)
  made.odds_ratio_loss = functools.partial(ORPOTrainer.odds_ratio_loss, made)

  def fn(x: Arrays) -> torch.Tensor:
    logits = torch.zeros(())
    args = (*(x[k] for k in x if k != 'nll'), logits, logits, x['nll'])
    made.concatenated_forward = lambda *_: args
    return ORPOTrainer.get_batch_loss_metrics(made, None, {})[0]

  outputs = differentiated(fn, x, *x)
  made = ('orpo__trl', 'preference', {'beta': 0.1}, x, outputs)
  return case(*made, FLOAT32)


MIXED = [1, 0, 1, 1, 0, 0, 1, 0]


def kto() -> list[Arrays]:
  from trl import KTOTrainer

  policy = (-2 * np.abs(normal(43, PAIRS)) - 0.2).round(6)
  ref = (policy - 2 * normal(44, PAIRS)).round(6)
  found = []
  for name, shift, weight, labels in (
    ('positive', 1.0, 1.0, MIXED),
    ('clamped', -1.0, 1.0, MIXED),
    ('weighted', 1.0, 1.33, MIXED),
    ('all_desirable', 0.5, 1.0, [1] * PAIRS),
    ('none_desirable', 0.5, 1.0, [0] * PAIRS),
  ):
    x = dict(policy_logps=policy, ref_logps=ref, label=np.array(labels))
    x |= dict(kl_policy_logps=normal(45, PAIRS) - 4)
    x |= dict(kl_ref_logps=(x['kl_policy_logps'] - shift).round(6))
    made = trainer(
      beta=0.1, calculate_KL=True, desirable_weight=weight, loss_type='kto',
      precompute_ref_logps=True, undesirable_weight=1.0,
    )  # fmt: skip

    def fn(x: Arrays, made: Any = made) -> torch.Tensor:
      model, inputs = scored(x['policy_logps'])
      inputs |= dict(label=x['label'].bool(), ref_logps=x['ref_logps'])
      inputs |= dict(ref_KL_logps=x['kl_ref_logps'])
      inputs['completion_mask'] = inputs['attention_mask']
      made._compute_kl_logps = lambda *_: x['kl_policy_logps']
      return KTOTrainer._compute_loss(made, model, inputs, False)

    hyper = dict(beta=0.1, desirable_weight=weight, undesirable_weight=1.0)
    outputs = differentiated(fn, x, 'policy_logps')
    outputs['z0'] = made._metrics['train']['kl'][-1]
    found.append(case(f'kto_{name}__trl', 'preference', hyper, x, outputs))
  return found


def reward_models() -> list[Arrays]:
  from trl import RewardTrainer

  found = []
  for name, margin, coef in (
    ('', False, None), ('_margin', True, None),
    ('_centred', False, 0.01), ('_margin_centred', True, 0.01),
  ):  # fmt: skip
    x = dict(chosen=3 * normal(46, PAIRS), rejected=3 * normal(47, PAIRS))
    if margin:
      x['margin'] = np.abs(normal(48, PAIRS))
    made = trainer(args=SimpleNamespace(center_rewards_coefficient=coef))

    def fn(x: Arrays, made: Any = made) -> torch.Tensor:
      logits = torch.cat([x['chosen'], x['rejected']])[:, None]
      inputs = {'attention_mask': torch.ones((2 * PAIRS, 1))}
      inputs |= {k: x[k] for k in x if k == 'margin'}
      model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
      return RewardTrainer.compute_loss(made, model, inputs)

    hyper = dict(margin=margin, center_coef=coef)
    outputs = differentiated(fn, x, 'chosen', 'rejected')
    full = f'reward_bradley_terry{name}__trl'
    found.append(case(full, 'reward_model', hyper, x, outputs))
  return found


def preferences() -> list[Arrays]:
  return [*dpo_family(), *cpo(), orpo(), *kto(), *reward_models()]
