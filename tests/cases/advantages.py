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
    case(advantages.batch_normalized, group),
    case(advantages.batch_normalized, group, ddof=1, singleton='raw'),
    case(advantages.gpg, group),
    case(advantages.gpg, group, counted='nonzero', singleton='raw'),
    case(advantages.leave_one_out_max, group),
    case(advantages.leave_one_out_max, group, normalize=True, singleton='raw'),
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
  return found + compound() + grouped_tokens()


def compound() -> list[Case]:
  right = {'correct': 'rewards'}
  many = {'many_rewards': 'rewards', 'many_where': 'where'}
  smoothed = 'correct sequence_logprobs lengths where'
  coefs = {'positive_coef': 0.1, 'negative_coef': 0.3}
  found = [
    case(advantages.remax, 'rewards baselines where'),
    case(advantages.remax, 'rewards baselines'),
    case(advantages.optimal_baseline, 'rewards lengths where'),
    case(advantages.optimal_baseline, 'rewards lengths', singleton='raw'),
    case(advantages.gdpo, 'many_rewards many_where', rename=many),
    case(
      advantages.gdpo,
      'many_rewards many_where',
      rename=many,
      padded=False,
      weights=(1.0, 0.3),
      ddof=1,
    ),
    case(advantages.differential_smoothing, smoothed, rename=right, **coefs),
    case(
      advantages.differential_smoothing,
      smoothed,
      rename=right,
      length_norm=True,
      recenter=True,
      **coefs,
    ),
  ]
  for k in (1, 2, 6):
    found += [
      case(advantages.group_pass_at_k, 'correct where', rename=right, k=k),
      case(advantages.group_pass_at_k, 'correct', rename=right, k=k, eps=0.1),
    ]
  return found


def grouped_tokens() -> list[Case]:
  tokens = {'token_rewards': 'rewards', 'step_ends': 'where'}
  options = {'discount': 0.9, 'lambda_': 0.7}
  steps = 'token_rewards step_ends mask groups'
  turns = 'token_rewards values mask turn_ids'
  found = []
  for fn, names, changed in (
    (advantages.reinforce_plus_plus, 'token_rewards mask', {'discount': 0.9}),
    (
      advantages.reinforce_plus_plus_baseline,
      'token_rewards mask groups',
      {'ddof': 0},
    ),
    (
      advantages.optimal_token_baseline,
      'token_rewards old_logprobs collisions mask groups',
      {'discount': 0.9},
    ),
    (advantages.group_process, steps, {'ddof': 1, 'eps': 0.1}),
    (
      advantages.turn_returns,
      'token_rewards mask turn_ids',
      {'discount': 0.9},
    ),
    (advantages.turn_gae, turns, options),
    (advantages.turn_gae, f'{turns} bootstrap', options),
  ):
    found += [
      case(fn, names, rename=tokens),
      case(fn, names, rename=tokens, **changed),
    ]
  return found
