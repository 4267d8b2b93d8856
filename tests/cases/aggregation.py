"""Weights and masks."""

from cases.record import Case, case
from postrain import aggregation, masks


def cases() -> list[Case]:
  group = 'rewards where'
  found = []

  found += [
    case(aggregation.token_mean, 'mask'),
    case(aggregation.constant_length, 'mask', length=8),
    case(aggregation.constant_length, 'mask', length=8.0, count_empty=True),
    case(aggregation.group_token_mean, 'mask groups'),
    case(aggregation.group_token_mean, 'mask groups', count_empty=True),
    case(masks.overlong, 'mask truncated'),
    case(masks.informative_groups, group, decides=True),
    case(masks.informative_groups, group, decides=True, low=0.0, high=0.6),
  ]
  for fn in (aggregation.sequence_mean, aggregation.sequence_sum):
    found += [case(fn, 'mask'), case(fn, 'mask', count_empty=True)]
  return found
