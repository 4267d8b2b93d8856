"""Distillation losses of TRL, and the chance of a success in k tries."""

from fractions import Fraction
import math

import numpy as np
import torch

from experiments.peers.common import (
  FLOAT32,
  Arrays,
  case,
  differentiated,
  normal,
  rollout,
  tensors,
  token_mean,
)

MASK = rollout('tool')['mask']
BETAS = {'forward_kl': 0.0, 'low': 0.1, 'mid': 0.5, 'reverse_kl': 1.0}


def drawn() -> Arrays:
  logits = [2 * normal(seed, *MASK.shape, 5) for seed in (60, 61)]
  logits[1][0] = logits[0][0]  # a row where the two agree
  return dict(student_logits=logits[0], teacher_logits=logits[1], mask=MASK)


def made(
  name: str, hyper: Arrays, x: Arrays, outputs: Arrays, *tolerance: dict
) -> Arrays:
  parts = (f'distill_{name}__trl', 'distillation', hyper, x, outputs)
  return case(*parts, *tolerance)


def divergences() -> list[Arrays]:
  from trl.experimental.gkd import GKDTrainer

  found, x = [], drawn()
  for name, beta in BETAS.items():
    for temperature in (1.0, 2.0):

      def fn(x: Arrays, beta: float = beta, heat: float = temperature):
        labels = torch.where(x['mask'], 0, -100)
        args = (x['student_logits'], x['teacher_logits'], labels)
        return GKDTrainer.generalized_jsd_loss(*args, beta, heat)

      hyper = dict(beta=beta, temperature=temperature)
      outputs = differentiated(fn, x, 'student_logits')
      found.append(made(f'jsd_{name}_{temperature:g}', hyper, x, outputs))
  return found


def self_distillation() -> list[Arrays]:
  """Values per token; their mean over tokens is taken here."""
  from trl.experimental.sdft import loss_utils

  found, x = [], drawn()
  for name, beta in BETAS.items():
    for kind in ('full', 'topk_renorm', 'topk_tail'):
      hyper, options = {'alpha': beta}, {'distillation_alpha': beta}
      call = loss_utils.compute_full_logit_self_distillation_loss
      if kind != 'full':
        call = loss_utils.compute_topk_self_distillation_loss
        options |= dict(distillation_topk=3)
        options |= dict(distillation_add_tail=kind == 'topk_tail')
        hyper |= {'k': 3}

      def fn(x: Arrays, call=call, options: Arrays = options):
        values = call(x['student_logits'], x['teacher_logits'], **options)
        return token_mean(values, x['mask'])

      outputs = differentiated(fn, x, 'student_logits')
      found.append(made(f'{kind}_{name}', hyper, x, outputs))
  ids = np.random.default_rng(62).integers(5, size=MASK.shape)
  x = x | {'token_ids': ids}

  def sampled(x: Arrays) -> torch.Tensor:
    values = loss_utils.compute_sampled_token_self_distillation_loss(
      x['student_logits'],
      x['teacher_logits'],
      x['token_ids'],
      distillation_alpha=1.0,
    )
    return token_mean(values, x['mask'])

  outputs = differentiated(sampled, x, 'student_logits')
  return [*found, made('sampled_reverse_kl', {}, x, outputs)]


def chunked() -> list[Arrays]:
  """In float32 inside of the peer."""
  from trl.trainer.distillation_trainer import _chunked_divergence_loss

  x = dict(
    student_hidden=normal(63, *MASK.shape, 3),
    teacher_hidden=normal(64, *MASK.shape, 4),
    student_head=normal(65, 5, 3),
    teacher_head=normal(66, 5, 4),
    mask=MASK,
  )
  found = []
  for name, beta, temperature in (
    ('forward_kl', 0.0, 1.0), ('low', 0.1, 1.0), ('reverse_kl', 1.0, 2.0),
  ):  # fmt: skip

    def divergence(x: Arrays, beta: float = beta, heat: float = temperature):
      return _chunked_divergence_loss(*x.values(), beta, temperature=heat)

    outputs = differentiated(
      lambda x, fn=divergence: fn(x)[0], x, 'student_hidden', 'student_head'
    )
    outputs['entropy_sum'] = divergence(tensors(x))[1].item()
    hyper = dict(beta=beta, temperature=temperature)
    found.append(made(f'chunked_{name}', hyper, x, outputs, FLOAT32))
  return found


def chances() -> Arrays:
  """No peer: exact rationals of 1 − C(n−c, k) / C(n, k)."""
  rows = [(n, c, k) for n in (1, 5, 200) for c in {0, 1, n // 3, n}
          for k in {1, 2, n // 2, n} if 1 <= k <= n]  # fmt: skip
  rows = sorted(rows)
  exact = [
    float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    for n, c, k in rows
  ]
  columns = np.array(rows).T
  x = dict(zip('nck', columns, strict=True))
  return case('pass_at_k', 'metric', {}, x, {'pass_at_k': exact})


def distillation() -> list[Arrays]:
  return [*divergences(), *self_distillation(), *chunked(), chances()]
