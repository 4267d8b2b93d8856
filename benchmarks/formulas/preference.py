"""Losses of pairs, [65536]; x holds the operations.

c, r, rc, rr: log-probs of chosen and rejected, and those of the reference; n
and k are the lengths of the two.
"""

import math
from typing import Any

from benchmarks.formulas.record import Formula, Row

PAIR = 'chosen rejected ref_chosen ref_rejected'
LENGTHS = 'chosen_lengths rejected_lengths'
BETA = 0.1


def of_margin(fn: Formula) -> Formula:
  """A function of h = β ((c − rc) − (r − rr))."""
  return lambda x, c, r, rc, rr: fn(x, BETA * ((c - r) - (rc - rr)))


def of_rewards(fn: Formula) -> Formula:
  """A function of the two implicit rewards."""
  return lambda x, c, r, rc, rr: fn(x, BETA * (c - rc), BETA * (r - rr))


def robust_dpo(x: Any, h: Any) -> Any:
  return (-x.log_sigmoid(h) * 0.9 + x.log_sigmoid(-h) * 0.1) / 0.8


def f_dpo(x: Any, c: Any, r: Any, rc: Any, rr: Any) -> Any:
  won, lost = c - rc, r - rr
  gap = (won - lost) - (x.softplus(won) - x.softplus(lost))
  return -x.log_sigmoid(BETA * gap)


def exo_pair(x: Any, h: Any) -> Any:
  right = x.sigmoid(h) * (x.log_sigmoid(h) - math.log1p(-1e-3))
  return right + x.sigmoid(-h) * (x.log_sigmoid(-h) - math.log(1e-3))


def discopop(x: Any, h: Any) -> Any:
  share = x.sigmoid(h / 0.05)
  return -x.log_sigmoid(h) * (1 - share) + x.exp(-h) * share


def aot(x: Any, c: Any, r: Any, rc: Any, rr: Any) -> Any:
  return -x.log_sigmoid(BETA * (x.sort(c - r) - x.sort(rc - rr)))


def per_token_margin(c: Any, r: Any, rc: Any, rr: Any, n: Any, k: Any) -> Any:
  return (c - rc) / n - (r - rr) / k


def nca_pair(x: Any, won: Any, lost: Any) -> Any:
  noise = x.log_sigmoid(-won) + x.log_sigmoid(-lost)
  return -x.log_sigmoid(won) - 0.5 * noise


def orpo(x: Any, c: Any, r: Any, n: Any, k: Any) -> Any:
  p, q = c / n, r / k
  odds = (p - q) - (x.log1p(-x.exp(p)) - x.log1p(-x.exp(q)))
  return -p - 0.1 * x.log_sigmoid(odds)


def simpo(x: Any, c: Any, r: Any, n: Any, k: Any) -> Any:
  return -x.log_sigmoid(2 * (c / n - r / k - 0.5))


def kto(x: Any, p: Any, ref: Any, desirable: Any, z: Any) -> Any:
  u = p - ref
  good = 1 - x.sigmoid(BETA * (u - z))
  return x.where(desirable, good, 1 - x.sigmoid(BETA * (z - u)))


def pair(formula: Formula, origin: str, inputs: str = PAIR) -> Row:
  return Row(inputs, formula, origin, gradients=2)


ROWS = {
  'dpo': pair(of_margin(lambda x, h: -x.log_sigmoid(h)), 'TRL sigmoid'),
  'robust_dpo': pair(of_margin(robust_dpo), 'TRL robust'),
  'f_dpo': pair(f_dpo, 'TRL js_divergence'),
  'length_normalized_dpo': pair(
    lambda x, *v: -x.log_sigmoid(5 * per_token_margin(*v)),
    'TRL sigmoid_norm',
    f'{PAIR} {LENGTHS}',
  ),
  'ipo': pair(
    of_margin(lambda x, h: (h / BETA - 0.5 / BETA) ** 2), 'TRL OnlineDPO ipo'
  ),
  'length_normalized_ipo': pair(
    lambda x, *v: (per_token_margin(*v) - 0.5 / BETA) ** 2,
    'TRL ipo',
    f'{PAIR} {LENGTHS}',
  ),
  'hinge': pair(of_margin(lambda x, h: x.relu(1 - h)), 'TRL hinge'),
  'exo_pair': pair(of_margin(exo_pair), 'TRL exo_pair'),
  'discopop': pair(of_margin(discopop), 'TRL discopop'),
  'aot': pair(aot, 'TRL aot'),
  'apo_zero': pair(
    of_rewards(lambda x, w, l: 1 - x.sigmoid(w) + x.sigmoid(l)), 'TRL apo_zero'
  ),
  'apo_down': pair(
    of_rewards(lambda x, w, l: x.sigmoid(w) + 1 - x.sigmoid(w - l)),
    'TRL apo_down',
  ),
  'bco_pair': pair(
    of_rewards(lambda x, w, l: -x.log_sigmoid(w) - x.log_sigmoid(-l)),
    'TRL bco_pair',
  ),
  'nca_pair': pair(of_rewards(nca_pair), 'TRL nca_pair'),
  'sppo_hard': pair(
    lambda x, c, r, rc, rr: (
      ((c - rc) - 0.5 / BETA) ** 2 + ((r - rr) + 0.5 / BETA) ** 2
    ),
    'TRL sppo_hard',
  ),
  'cpo': pair(
    lambda x, c, r: -x.log_sigmoid(BETA * (c - r)) - c,
    'TRL CPO',
    'chosen rejected',
  ),
  'orpo': pair(orpo, 'TRL ORPO', f'chosen rejected {LENGTHS}'),
  'simpo': pair(simpo, 'TRL CPO simpo', f'chosen rejected {LENGTHS}'),
  'kto': Row('chosen ref_chosen desirable reference_point', kto, 'TRL KTO'),
}
