"""Divergences of whole distributions, logits [64, 32, 512]."""

import math
from typing import Any

from benchmarks.formulas.record import Row

LOGITS = 'logits teacher_logits'


def forward_kl(x: Any, s: Any, t: Any) -> Any:
  return x.kl_div(x.log_softmax(s), x.log_softmax(t)).sum(-1)


def reverse_kl(x: Any, s: Any, t: Any) -> Any:
  return x.kl_div(x.log_softmax(t), x.log_softmax(s)).sum(-1)


def generalized_jsd(x: Any, s: Any, t: Any) -> Any:
  s, t = x.log_softmax(s), x.log_softmax(t)
  mixture = x.logaddexp(s + math.log(0.5), t + math.log(0.5))
  return (0.5 * x.kl_div(mixture, t) + 0.5 * x.kl_div(mixture, s)).sum(-1)


ROWS = {
  'forward_kl': Row(LOGITS, forward_kl, 'TRL GKD beta=0'),
  'reverse_kl': Row(LOGITS, reverse_kl, 'TRL GKD beta=1'),
  'generalized_jsd': Row(LOGITS, generalized_jsd, 'TRL GKD'),
  'sampled_reverse_kl': Row(
    'logprobs old_logprobs mask',
    lambda x, p, t, m: x.detach(p - t) * p * m,
  ),
}
