"""Losses."""

from cases.record import Case, case
from postrain import losses


def cases() -> list[Case]:
  policy = 'logprobs old_logprobs advantages mask'
  found = []

  for options in ({}, {'clip_high': 0.28, 'dual_clip': 3.0}):
    found.append(case(losses.ppo_clip, policy, gradients='logprobs', **options))
  for options in ({}, {'clip_low': 0.3, 'clip_high': 0.2}, {'cap': 1.5}):
    found.append(
      case(
        losses.cispo,
        policy,
        gradients='logprobs',
        stopped='logprobs',
        **options,
      )
    )
  for options in ({}, {'clip_low': 0.1, 'clip_high': 0.2}):
    found += [
      case(losses.gspo, policy, gradients='logprobs', **options),
      case(
        losses.gspo_token,
        policy,
        gradients='logprobs',
        stopped='logprobs',
        **options,
      ),
    ]
  limit = {'max_log_ratio': 0.3}
  found += [
    case(losses.reinforce, policy, gradients='logprobs'),
    case(losses.ppo_clip, policy, gradients='logprobs', **limit),
    case(losses.gspo, policy, gradients='logprobs', **limit),
    case(
      losses.gspo_token,
      policy,
      gradients='logprobs',
      stopped='logprobs',
      **limit,
    ),
    case(losses.squared_error, 'values returns mask', gradients='values'),
    case(
      losses.clipped_squared_error,
      'values old_values returns mask',
      gradients='values',
    ),
    case(losses.negative_log_likelihood, 'logprobs mask', gradients='logprobs'),
  ]
  for smoothing in (0.0, 0.1):
    found.append(
      case(
        losses.dpo,
        'chosen rejected ref_chosen ref_rejected',
        gradients='chosen rejected',
        label_smoothing=smoothing,
      )
    )
  return found
