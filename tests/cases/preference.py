"""Losses of pairs and of single completions."""

from cases.record import Case, case
from postrain import losses

PAIR = 'chosen rejected ref_chosen ref_rejected'
LENGTHS = 'chosen_lengths rejected_lengths'
BOTH = 'chosen rejected'
UNPAIRED = {'chosen': 'logprobs', 'ref_chosen': 'ref_logprobs'}


def pair(fn, names=PAIR, **options) -> Case:
  return case(fn, names, gradients=BOTH, **options)


def cases() -> list[Case]:
  found = []

  for beta in (0.1, 1.0):
    found += [
      pair(fn, beta=beta)
      for fn in (
        losses.apo_down,
        losses.apo_zero,
        losses.bco_pair,
        losses.discopop,
        losses.exo_pair,
        losses.hinge,
        losses.ipo,
        losses.nca_pair,
        losses.robust_dpo,
        losses.sppo_hard,
      )
    ]
  for smoothing in (0.1, 0.3):
    found += [
      pair(losses.aot, label_smoothing=smoothing),
      pair(losses.robust_dpo, label_smoothing=smoothing),
      pair(losses.exo_pair, label_smoothing=smoothing),
    ]
  for divergence in (
    'reverse_kl',
    'forward_kl',
    'jensen_shannon',
    'alpha_divergence',
  ):
    found += [
      pair(losses.f_dpo, divergence=divergence, label_smoothing=0.1),
      case(
        losses.implicit_reward,
        'chosen ref_chosen',
        rename=UNPAIRED,
        gradients='logprobs',
        divergence=divergence,
        alpha=0.3,
        max_log_ratio=1.0,
      ),
    ]
  found += [
    pair(losses.aot),
    pair(losses.bco_pair, shift=0.2),
    pair(losses.f_dpo),
    pair(losses.discopop, beta=1.0, temperature=0.5),
    pair(losses.length_normalized_dpo, f'{PAIR} {LENGTHS}'),
    pair(
      losses.length_normalized_dpo, f'{PAIR} {LENGTHS}', label_smoothing=0.1
    ),
    pair(losses.length_normalized_ipo, f'{PAIR} {LENGTHS}'),
    pair(losses.simpo, f'{BOTH} {LENGTHS}'),
    pair(losses.simpo, f'{BOTH} {LENGTHS}', beta=2.5, gamma=0.5),
    pair(losses.cpo, BOTH),
    pair(losses.cpo, BOTH, nll_coef=None),
    case(losses.kto_reference_point, 'chosen ref_chosen', rename=UNPAIRED),
    case(
      losses.kto_reference_point,
      'chosen ref_chosen desirable',
      rename=UNPAIRED | {'desirable': 'where'},
    ),
  ]
  negative = {'negative_chosen': 'chosen', 'negative_rejected': 'rejected'}
  names = f'negative_chosen negative_rejected {LENGTHS}'
  for coef in (0.1, 1.0):
    found.append(pair(losses.orpo, names, rename=negative, coef=coef))
  for weight in (1.0, 1.33):
    found.append(
      case(
        losses.kto,
        'chosen ref_chosen desirable reference_point',
        rename=UNPAIRED,
        gradients='logprobs',
        beta=0.5,
        desirable_weight=weight,
      )
    )
  return found
