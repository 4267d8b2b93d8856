"""Reward models of outcomes, rankings and steps."""

from cases.record import Case, case
from postrain import losses

BOTH = 'chosen rejected'


def cases() -> list[Case]:
  steps = {'values': 'scores', 'step_shares': 'labels'}
  outcome = {'chosen': 'scores', 'preference': 'labels'}
  judge = {'preference': 'forward', 'swapped': 'backward'}
  found = [
    case(losses.last_score, 'values mask', rename=steps, gradients='scores'),
    case(losses.bradley_terry, BOTH, gradients=BOTH),
    case(losses.bradley_terry, f'{BOTH} margins', gradients=BOTH),
    case(losses.score_centering, BOTH, gradients=BOTH),
    case(losses.soft_preference, f'{BOTH} preference', gradients=BOTH),
    case(losses.swap_averaged, 'preference swapped', rename=judge),
    case(
      losses.outcome_correctness,
      'chosen preference',
      rename=outcome,
      gradients='scores',
    ),
    case(
      losses.step_correctness,
      'values step_shares mask',
      rename=steps,
      gradients='scores',
    ),
    case(
      losses.until_first_error,
      'steps_right mask',
      rename={'steps_right': 'correct'},
    ),
  ]
  for fn in (losses.ranked_pairs, losses.plackett_luce):
    found += [
      case(fn, 'rewards ranks where', gradients='rewards'),
      case(fn, 'rewards ranks', gradients='rewards'),
    ]
  for hard in (False, True):
    found.append(
      case(
        losses.monte_carlo_labels,
        'successes',
        rename={'successes': 'correct'},
        hard=hard,
      )
    )
  for aggregate in ('min', 'product', 'sum', 'mean', 'last'):
    found.append(
      case(
        losses.step_score,
        'step_shares mask',
        rename={'step_shares': 'scores'},
        gradients='scores',
        aggregate=aggregate,
      )
    )
  return found
