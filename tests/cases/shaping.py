"""Shaped rewards."""

from cases.record import Case, case
from postrain import shaping


def cases() -> list[Case]:
  outcome = {'outcomes': 'rewards', 'estimate': 'penalties'}
  tokens = {'few_tokens': 'tokens'}
  found = [
    case(shaping.kl_shaped, 'outcomes estimate mask', rename=outcome),
    case(
      shaping.kl_shaped,
      'outcomes estimate mask truncated',
      rename=outcome,
      coef=0.3,
      missing_eos_penalty=1.5,
    ),
    case(
      shaping.kl_penalized, 'outcomes estimate mask', rename=outcome, coef=0.3
    ),
    case(
      shaping.difference_rewards,
      'estimate bootstrap step_ends',
      rename={
        'estimate': 'scores',
        'bootstrap': 'initial',
        'step_ends': 'where',
      },
    ),
    case(
      shaping.length_penalty, 'counts', rename={'counts': 'lengths'}, coef=0.1
    ),
    case(
      shaping.length_reward,
      'correct lengths where',
      rename={'correct': 'rewards'},
    ),
    case(
      shaping.length_reward, 'correct lengths', rename={'correct': 'rewards'}
    ),
    case(
      shaping.language_consistency,
      'step_ends mask',
      rename={'step_ends': 'in_language'},
    ),
    case(
      shaping.weighted_sum,
      'many_rewards',
      rename={'many_rewards': 'rewards'},
      weights=(1.0, 0.3),
    ),
    case(
      shaping.composite,
      'outcomes shares',
      rename={'shares': 'process'},
      outcome_weight=0.3,
    ),
    case(
      shaping.strict_composite,
      'outcomes shares',
      rename={'shares': 'process'},
    ),
  ]
  for capped in (True, False):
    found.append(
      case(
        shaping.soft_overlong,
        'counts',
        rename={'counts': 'lengths'},
        max_length=20.0,
        buffer=8.0,
        capped=capped,
      )
    )
  for size in (1, 2, 9):
    found.append(
      case(
        shaping.repetition_penalty,
        'few_tokens mask',
        rename=tokens,
        ngram_size=size,
        max_penalty=-0.7,
      )
    )
  return found
