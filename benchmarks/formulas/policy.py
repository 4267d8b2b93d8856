"""Losses of tokens: policy and value, [256, 2048]; x holds the operations.

p, q, a, m: log-probs, old log-probs, advantages, mask (as numbers).
"""

from typing import Any

from benchmarks.formulas.record import Row

POLICY = 'logprobs old_logprobs advantages mask'
VALUE = 'values old_values returns mask'


def ratio(x: Any, p: Any, q: Any) -> Any:
  return x.exp(x.clip(p - q, -20.0, 20.0))


def token_mean(v: Any, m: Any) -> Any:
  return (v * m).sum(-1)[:, None] / m.sum(-1)[:, None]


def surrogate(x: Any, r: Any, a: Any, m: Any, low: float, high: float) -> Any:
  clipped = x.clip(r, 1 - low, 1 + high)
  return -x.minimum(r * a, clipped * a) * m


def ppo_clip(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  return surrogate(x, ratio(x, p, q), a, m, 0.2, 0.2)


def gspo(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  return surrogate(x, x.exp(token_mean(p - q, m)), a, m, 3e-4, 4e-4)


def gspo_token(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  log_ratio = p - x.detach(p) + x.detach(token_mean(p - q, m))
  r = x.exp(x.clip(log_ratio, None, 10.0))
  return surrogate(x, r, a, m, 3e-4, 4e-4)


def sequence_clip(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  r = x.exp(((p - q) * m).sum(-1)[:, None])
  return surrogate(x, r, a, m, 0.2, 0.2)


def cispo(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  return -x.detach(x.clip(ratio(x, p, q), None, 5.0)) * a * p * m


def sapo(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  tau = x.where(a > 0, 1.0, 1.05)
  return -x.sigmoid(tau * (ratio(x, p, q) - 1)) * 4 / tau * a * m


def vespo(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  log_w = x.clip(((p - q) * m).sum(-1)[:, None], -20.0, 20.0)
  k, rate = x.where(a >= 0, 2.0, 3.0), x.where(a >= 0, 3.0, 2.0)
  phi = x.exp(rate + k * log_w - rate * x.exp(log_w))
  return -x.detach(phi) * a * p * m


def geometric_mean(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  sign, d = x.sign(a), p - q
  held = sign * x.minimum(sign * d, sign * x.clip(d, -0.4, 0.4))
  return -a * x.exp(token_mean(held, m)) * m


def minirl(x: Any, p: Any, q: Any, sampler: Any, a: Any, m: Any) -> Any:
  r = ratio(x, p, q)
  out = ((a > 0) & (r > 1.27)) | ((a < 0) & (r < 0.8))
  weight = x.where(out, 0.0, x.clip(ratio(x, p, sampler), None, 5.0))
  return -x.detach(weight) * a * p * m


def dppo(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  d = x.exp(p) - x.exp(q)
  out = ((a > 0) & (d > 0.2)) | ((a < 0) & (d < -0.15))
  weight = x.where(out, 0.0, x.clip(ratio(x, p, q), None, 20.0))
  return -x.detach(weight) * a * p * m


def kl_cov(x: Any, p: Any, q: Any, a: Any, m: Any, selected: Any) -> Any:
  plain = -ratio(x, p, q) * a
  return x.where(selected, plain + x.abs(p - q), plain) * m


def dro(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  return (-a * p + 0.05 * (p - q) ** 2) * m


def mirror_descent(x: Any, p: Any, q: Any, a: Any, m: Any) -> Any:
  d = ((p - q) * m).sum(-1)[:, None]
  return (0.05 * d**2 - a * d) * m


def clipped_squared_error(x: Any, v: Any, old: Any, r: Any, m: Any) -> Any:
  clipped = x.minimum(x.maximum(v, old - 0.2), old + 0.2)
  return x.maximum((v - r) ** 2, (clipped - r) ** 2) / 2 * m


ROWS = {
  'reinforce': Row(POLICY, lambda x, p, q, a, m: -a * p * m, 'verl gpg'),
  'ppo_clip': Row(POLICY, ppo_clip, 'verl vanilla'),
  'gspo': Row(POLICY, gspo, 'TRL sequence'),
  'gspo_token': Row(POLICY, gspo_token, 'verl gspo'),
  'sequence_clip': Row(POLICY, sequence_clip, 'TRL RLOO'),
  'cispo': Row(POLICY, cispo, 'verl cispo'),
  'sapo': Row(POLICY, sapo, 'verl sapo'),
  'vespo': Row(POLICY, vespo, 'TRL vespo'),
  'geometric_mean': Row(POLICY, geometric_mean, 'verl geo_mean'),
  'minirl': Row(
    'logprobs old_logprobs sampler_logprobs advantages mask', minirl
  ),
  'dppo': Row(POLICY, dppo, 'verl dppo_tv'),
  'kl_cov': Row(f'{POLICY} selected', kl_cov, 'verl kl_cov'),
  'dro': Row(POLICY, dro, options={'kl_coef': 0.1}),
  'mirror_descent': Row(POLICY, mirror_descent, options={'kl_coef': 0.1}),
  'squared_error': Row(
    'values returns mask', lambda x, v, r, m: (v - r) ** 2 / 2 * m
  ),
  'clipped_squared_error': Row(VALUE, clipped_squared_error, 'verl value'),
  'negative_log_likelihood': Row('logprobs mask', lambda x, p, m: -p * m),
}
