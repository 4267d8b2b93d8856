"""Losses of distillation."""

import jax.numpy as jnp
import numpy as np
import oracles

from cases.record import DRAWN, Case, case
from postrain import losses

TEACHER = {'ref_logits': 'teacher_logits', 'ref_logprobs': 'teacher_logprobs'}


def joined_candidates(logits, teacher_logits, **options):
  """Both distributions in one array: the pair is no (values, metrics)."""
  both = losses.top_candidates(logits, teacher_logits, **options)
  return jnp.concatenate(both, axis=-1)


def joined_oracle(logits, teacher_logits, **options):
  both = oracles.top_candidates(logits, teacher_logits, **options)
  return np.concatenate(both, axis=-1)


def cases() -> list[Case]:
  sampled = 'logprobs ref_logprobs mask'
  found = [
    case(losses.annealed_coef, 'steps', rename={'steps': 'step'}),
    case(losses.annealed_coef, 'steps', rename={'steps': 'step'}, end=2e-3),
  ]
  for limit in (20.0, 0.3):
    found.append(
      case(
        losses.sampled_reverse_kl,
        sampled,
        rename=TEACHER,
        gradients='logprobs',
        stopped='logprobs',
        max_log_ratio=limit,
      )
    )
  for temperature in (1.0, 2.0):
    options = {'temperature': temperature}
    calls = [(losses.forward_kl, {}), (losses.reverse_kl, {})]
    calls += [(losses.generalized_jsd, {'beta': b}) for b in (0.0, 0.1, 1.0)]
    for fn, more in calls:
      found.append(
        case(
          fn,
          'logits ref_logits',
          rename=TEACHER,
          gradients='logits',
          **options,
          **more,
        )
      )
    for tail in (True, False):
      found.append(
        Case(
          name='top_candidates',
          fn=joined_candidates,
          oracle=joined_oracle,
          inputs={
            'logits': DRAWN['logits'],
            'teacher_logits': DRAWN['ref_logits'],
          },
          options={'k': 3, 'tail': tail, **options},
          gradients=('logits', 'teacher_logits'),
          stopped=None,
        )
      )
  return found
