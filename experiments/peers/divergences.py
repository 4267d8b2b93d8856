"""Divergences, entropies and log-probs of TRL and verl."""

from collections.abc import Callable

import numpy as np
import torch

from experiments.peers.common import (
  EXACT,
  PLUS_1E8,
  SEQUENCE_MEAN,
  Arrays,
  case,
  differentiated,
  normal,
  rollout,
  tensors,
)
from experiments.peers.stand_ins import grpo_trainer
from experiments.peers.trl_policy import loss_case, loss_of


def verl_kl() -> list[Arrays]:
  from verl.trainer.ppo.core_algos import agg_loss, kl_penalty

  grid = dict(
    logp=np.zeros(9) - 1.0,
    ref_logp=np.array([-26, -6, -2, -1.25, -1, -0.75, 0.5, 1.5, 21]),
  )
  main = {k: rollout()[k] for k in ('logp', 'ref_logp', 'mask')}
  found = []
  for kind in ('k1', 'k2', 'k3', 'abs', 'k1+', 'k3+'):
    name = f'kl_{kind.replace("+", "_straight_through")}'

    def penalty(x: Arrays, kind: str = kind) -> torch.Tensor:
      return kl_penalty(x['logp'], x['ref_logp'], kind)

    outputs = differentiated(lambda x, fn=penalty: fn(x).sum(), grid, 'logp')
    # The peer clamps k3 at 10, so that a sum is not comparable.
    outputs['per_token'] = penalty(tensors(grid)).numpy()
    del outputs['loss']
    found.append(
      case(f'{name}_grid__verl', 'kl', {'kind': kind}, grid, outputs)
    )
    for mode in ('token-mean', SEQUENCE_MEAN):

      def fn(x: Arrays, mode: str = mode, fn: Callable = penalty):
        return agg_loss(fn(x), x['mask'].double(), mode)

      hyper = dict(kind=kind, loss_agg_mode=mode)
      outputs = differentiated(fn, main, 'logp')
      rounding = PLUS_1E8 if mode == SEQUENCE_MEAN else EXACT
      full = f'{name}_{mode.replace("-", "_")}__verl'
      found.append(case(full, 'kl', hyper, main, outputs, rounding))
  return found


def trl_kl() -> list[Arrays]:
  """The penalty inside of the loss; where A is 0, the penalty alone."""
  clip = dict(eps_low=0.2, eps_high=0.28)
  found = []
  for corrected in (False, True):
    kind = 'ratio_corrected' if corrected else 'plain'
    args = {'args': {'use_bias_correction_kl': corrected}}
    for loss, beta in (('grpo', 0.04), ('dapo', 1.0)):
      hyper = clip | dict(beta=beta, bias_correction=corrected)
      name = f'ppo_clip_k3_{kind}_{loss}'
      found.append(
        loss_case(name, loss, hyper, inputs=('ref_logp',), beta=beta, **args)
      )
  level = {'importance_sampling_level': 'sequence'}
  hyper = clip | dict(beta=1.0, bias_correction=True) | level
  name = 'gspo_sequence_k3_ratio_corrected'
  args = {'args': {'use_bias_correction_kl': True}}
  found.append(
    loss_case(
      name, 'grpo', hyper, inputs=('ref_logp',), beta=1.0, **args, **level
    )
  )
  return found


def entropies() -> list[Arrays]:
  from trl import GRPOTrainer
  from trl.trainer.utils import selective_log_softmax_and_entropy
  from verl.trainer.ppo.core_algos import compute_entropy_loss

  x = dict(logits=2 * normal(7, 8, 6, 5), mask=rollout('tool')['mask'])
  found = []
  for mode in ('token-mean', SEQUENCE_MEAN):

    def plain(x: Arrays, mode: str = mode) -> torch.Tensor:
      return compute_entropy_loss(x['logits'], x['mask'].double(), mode)

    outputs = differentiated(plain, x, 'logits')
    name = f'entropy_{mode.replace("-", "_")}__verl'
    rounding = PLUS_1E8 if mode == SEQUENCE_MEAN else EXACT
    hyper = {'loss_agg_mode': mode}
    found.append(case(name, 'entropy', hyper, x, outputs, rounding))
  ids = np.random.default_rng(8).integers(5, size=(8, 6))
  given = {k: rollout()[k] for k in ('old_logp', 'advantages')}
  x = x | given | {'token_ids': ids}
  # TRL rounds its threshold to float32: it must not lie on a token's entropy.
  for fraction in (1.0, 0.33):
    hyper = dict(eps_low=0.2, eps_high=0.28, entropy_coef=0.01)
    options = dict(
      epsilon_low=0.2, epsilon_high=0.28, loss_type='bnpo', entropy_coef=0.01,
      _entropy_bonus_enabled=True, top_entropy_quantile=fraction,
    )  # fmt: skip

    def bonus(x: Arrays, options: Arrays = options) -> torch.Tensor:
      scored = selective_log_softmax_and_entropy(x['logits'], x['token_ids'])
      return loss_of(x, *scored, GRPOTrainer, **options)

    outputs = differentiated(bonus, x, 'logits')
    name = f'grpo_from_logits_top_{fraction}__trl'
    hyper = hyper | {'top_fraction': fraction}
    found.append(case(name, 'entropy', hyper, x, outputs))
  heat = np.abs(normal(9, 8, 6))
  x = dict(entropy=heat, mask=rollout('tool')['mask'])
  made, given = grpo_trainer(16), tensors(x)
  kept = made.get_high_entropy_mask(given['entropy'], given['mask'], 1 - 0.33)
  hyper, outputs = {'top_fraction': 0.33}, {'mask': kept.numpy()}
  return [*found, case('top_entropy__trl', 'entropy', hyper, x, outputs)]


def log_softmax() -> list[Arrays]:
  from trl.trainer.utils import selective_log_softmax_and_entropy

  ids = np.random.default_rng(8).integers(5, size=(8, 6))
  x = dict(logits=4 * normal(7, 8, 6, 5), token_ids=ids)
  x |= dict(cotangent=normal(10, 2, 8, 6))
  found = []
  for temperature in (1.0, 0.7):

    def scored(x: Arrays, temperature: float = temperature):
      return selective_log_softmax_and_entropy(
        x['logits'], x['token_ids'], temperature=temperature
      )

    def fn(x: Arrays, scored: Callable = scored) -> torch.Tensor:
      return (x['cotangent'] * torch.stack(scored(x))).sum()

    logp, heat = (v.numpy() for v in scored(tensors(x)))
    outputs = differentiated(fn, x, 'logits') | dict(logp=logp, entropy=heat)
    hyper, name = {'temperature': temperature}, f'log_softmax_{temperature}'
    found.append(case(f'{name}__trl', 'logprob', hyper, x, outputs))
  return found


def divergences() -> list[Arrays]:
  return [*verl_kl(), *trl_kl(), *entropies(), *log_softmax()]
