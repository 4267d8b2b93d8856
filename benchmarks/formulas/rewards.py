"""Reward models: scores of pairs [65536], of groups [8192, 8], of steps.

And the balance of a router over 8 experts.
"""

from typing import Any

from benchmarks.formulas.record import Row

SCORES = 'chosen_scores rejected_scores'


def soft_preference(x: Any, c: Any, r: Any, p: Any) -> Any:
  d = c - r
  return -p * x.log_sigmoid(d) - (1 - p) * x.log_sigmoid(-d)


def ranked_pairs(x: Any, s: Any, ranks: Any) -> Any:
  better = ranks[:, :, None] < ranks[:, None, :]
  losses = x.log_sigmoid(s[:, :, None] - s[:, None, :]) * better
  return -losses.sum((1, 2)) / better.sum((1, 2))


def plackett_luce(x: Any, s: Any, ranks: Any) -> Any:
  left = ranks[:, None, :] >= ranks[:, :, None]
  shown = x.where(left, s[:, None, :], -float('inf'))
  return (x.logsumexp(shown) - s).sum(-1)


def load_balance(x: Any, s: Any, experts: Any, m: Any, shares: Any) -> Any:
  del experts
  return 8 * (x.exp(x.log_softmax(s)) * shares).sum(-1) * m


ROWS = {
  'bradley_terry': Row(
    f'{SCORES} margins',
    lambda x, c, r, margin: -x.log_sigmoid(c - r - margin),
    'TRL RewardTrainer',
    gradients=2,
  ),
  'score_centering': Row(
    SCORES, lambda x, c, r: (c + r) ** 2, 'TRL RewardTrainer', gradients=2
  ),
  'soft_preference': Row(f'{SCORES} preference', soft_preference, gradients=2),
  'outcome_correctness': Row(
    'chosen_scores preference', lambda x, s, c: x.bce(s, c)
  ),
  'step_correctness': Row(
    'scores labels mask', lambda x, s, c, m: x.bce(s, c) * m
  ),
  'ranked_pairs': Row('group_scores ranks', ranked_pairs),
  'plackett_luce': Row('group_scores ranks', plackett_luce),
  'load_balance': Row('router_logits experts mask shares', load_balance),
}
