"""Advantages and returns."""

from cases.record import Case, case
from postrain import advantages


def cases() -> list[Case]:
  group = 'rewards where'
  tokens = {'token_rewards': 'rewards'}
  found = []

  for singleton in ('zero', 'raw'):
    found += [
      case(advantages.group_centered, group, singleton=singleton),
      case(advantages.group_normalized, group, ddof=1, singleton=singleton),
      case(advantages.leave_one_out, group, singleton=singleton),
    ]
  found += [
    case(advantages.group_normalized, 'rewards', eps=1e-4),
    case(advantages.group_centered, 'rewards'),
    case(advantages.leave_one_out, 'rewards'),
    case(advantages.max_only, group),
    case(advantages.max_only, 'rewards'),
    case(
      advantages.discounted_returns,
      'token_rewards mask',
      rename=tokens,
      discount=0.9,
    ),
    case(advantages.whiten, 'advantages mask'),
    case(advantages.whiten, 'advantages mask', keep_mean=True, ddof=0),
  ]
  for fn in (advantages.gae, advantages.lambda_returns):
    found += [
      case(fn, 'token_rewards values mask', rename=tokens),
      case(
        fn,
        'token_rewards values mask bootstrap',
        rename=tokens,
        discount=0.9,
        lambda_=0.7,
      ),
    ]
  return found
