"""Ratios, corrections and divergences."""

from cases.record import Case, case
from postrain import importance, kl


def cases() -> list[Case]:
  sampler = 'old_logprobs sampler_logprobs mask'
  found = []

  for fn in (kl.k1, kl.k2, kl.k3, kl.absolute, importance.log_ratio):
    found += [
      case(fn, 'logprobs ref_logprobs mask', gradients='logprobs'),
      case(fn, 'logprobs ref_logprobs', gradients='logprobs'),
      case(
        fn,
        'logprobs ref_logprobs mask',
        gradients='logprobs',
        max_log_ratio=0.4,
      ),
    ]
  found += [
    case(importance.limit_hits, 'logprobs old_logprobs mask'),
    case(importance.limit_hits, 'logprobs old_logprobs', max_log_ratio=None),
    case(
      kl.fixed_coef,
      'coefs divergences',
      rename={'coefs': 'coef', 'divergences': 'divergence'},
    ),
    case(
      kl.adaptive_coef,
      'coefs divergences',
      rename={'coefs': 'coef', 'divergences': 'divergence'},
      num_sequences=256,
      target=0.1,
    ),
    case(kl.exact, 'logits ref_logits', gradients='logits'),
    case(
      kl.straight_through,
      'gradient estimate',
      rename={'gradient': 'value', 'estimate': 'gradient'},
      gradients='gradient',
      stopped='gradient',
    ),
    case(
      kl.importance_weighted,
      'estimate logprobs old_logprobs mask',
      gradients='estimate logprobs',
    ),
  ]

  for fn in (
    importance.ratio,
    importance.sequence_ratio,
    importance.product_ratio,
  ):
    for limit in (20.0, 0.5, None):
      found.append(
        case(
          fn,
          'logprobs old_logprobs mask',
          gradients='logprobs',
          max_log_ratio=limit,
        )
      )
  found += [
    case(
      importance.sequence_log_ratio,
      'logprobs old_logprobs mask',
      gradients='logprobs',
    ),
    case(importance.mismatch_metrics, sampler),
    case(importance.mismatch_metrics, sampler, max_log_ratio=0.7),
    case(importance.effective_sample_size, 'weights mask'),
    case(importance.self_normalized, 'weights mask'),
    case(importance.self_normalized, 'weights mask', level='sequence'),
    case(importance.decomposition, f'logprobs {sampler}'),
  ]
  for level in ('token', 'sequence', 'geometric'):
    found += [
      case(importance.truncated, sampler, cap=1.3, level=level),
      case(importance.masked, sampler, low=0.7, high=1.8, level=level),
    ]
  return found
