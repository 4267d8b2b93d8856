"""Losses that bound the policy otherwise than by PPO's clip."""

import numpy as np

from oracles.losses import (
  clip_metrics,
  drift,
  over_tokens,
  sequence_surrogate,
)
from oracles.mismatch import limited, product_ratio, ratio


def rows_of(values, mask):
  """One number for each sequence, on each of its tokens."""
  return np.array([[x] * mask.shape[1] for x in values])


def sequence_clip(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  clip_low=0.2,
  clip_high=0.2,
  max_log_ratio=20.0,
):
  s = product_ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  s = rows_of(s, mask)
  values, metrics = sequence_surrogate(s, advantages, mask, clip_low, clip_high)
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def minirl(
  logprobs,
  old_logprobs,
  sampler_logprobs,
  advantages,
  mask,
  *,
  clip_low=0.2,
  clip_high=0.27,
  cap=5.0,
  max_log_ratio=20.0,
  stopped=None,
):
  stopped = logprobs if stopped is None else stopped
  rho = ratio(stopped, old_logprobs, mask, max_log_ratio=max_log_ratio)
  w = ratio(stopped, sampler_logprobs, mask, max_log_ratio=max_log_ratio)

  def value(i, t):
    a = advantages[i, t]
    if (a > 0 and rho[i, t] > 1 + clip_high) or (
      a < 0 and rho[i, t] < 1 - clip_low
    ):
      return 0.0
    return -min(w[i, t], cap) * a * logprobs[i, t]

  metrics = clip_metrics(rho, advantages, mask, clip_low, clip_high)
  metrics['weight'] = over_tokens(mask, lambda i, t: min(w[i, t], cap))
  drifted = drift(logprobs, old_logprobs, mask, max_log_ratio)
  return over_tokens(mask, value), metrics | drifted


def dppo(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  divergence='tv',
  clip_low=0.15,
  clip_high=0.2,
  cap=20.0,
  max_log_ratio=20.0,
  stopped=None,
):
  stopped = logprobs if stopped is None else stopped
  rho = ratio(stopped, old_logprobs, mask, max_log_ratio=max_log_ratio)

  def distance(i, t):
    p, q = np.exp(stopped[i, t]), np.exp(old_logprobs[i, t])
    if divergence == 'tv':
      return abs(p - q)
    if q >= 1:
      return q * np.log(q / p)
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))

  def above(i, t):
    out = advantages[i, t] > 0 and stopped[i, t] > old_logprobs[i, t]
    return out and distance(i, t) > clip_high

  def below(i, t):
    out = advantages[i, t] < 0 and stopped[i, t] < old_logprobs[i, t]
    return out and distance(i, t) > clip_low

  def value(i, t):
    if above(i, t) or below(i, t):
      return 0.0
    return -min(rho[i, t], cap) * advantages[i, t] * logprobs[i, t]

  metrics = {
    'clip_low': over_tokens(mask, below),
    'clip_high': over_tokens(mask, above),
    'divergence': over_tokens(mask, distance),
  }
  drifted = drift(logprobs, old_logprobs, mask, max_log_ratio)
  return over_tokens(mask, value), metrics | drifted


def kl_cov(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  selected,
  *,
  kl_coef=1.0,
  max_log_ratio=20.0,
):
  def penalty(i, t):
    d = limited(logprobs[i, t] - old_logprobs[i, t], max_log_ratio)
    return abs(d) if selected[i, t] else 0.0

  rho = ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  values = over_tokens(
    mask,
    lambda i, t: -rho[i, t] * advantages[i, t] + kl_coef * penalty(i, t),
  )
  return values, {
    'selected': over_tokens(mask, lambda i, t: selected[i, t]),
    'penalty': over_tokens(mask, penalty),
  } | drift(logprobs, old_logprobs, mask, max_log_ratio)


def dro(
  logprobs, old_logprobs, advantages, mask, *, kl_coef, max_log_ratio=20.0
):
  def value(i, t):
    d = logprobs[i, t] - old_logprobs[i, t]
    return -advantages[i, t] * logprobs[i, t] + kl_coef / 2 * d**2

  drifted = drift(logprobs, old_logprobs, mask, max_log_ratio)
  return over_tokens(mask, value), drifted


def mirror_descent(
  logprobs, old_logprobs, advantages, mask, *, kl_coef, max_log_ratio=20.0
):
  delta = [
    sum(logprobs[i, t] - old_logprobs[i, t] for t in np.flatnonzero(row))
    for i, row in enumerate(mask)
  ]
  values = over_tokens(
    mask,
    lambda i, t: -advantages[i, t] * delta[i] + kl_coef / 2 * delta[i] ** 2,
  )
  metrics = {'sequence_log_ratio': over_tokens(mask, lambda i, t: delta[i])}
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def sapo(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  temperature_positive=1.0,
  temperature_negative=1.05,
  max_log_ratio=20.0,
):
  rho = ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)

  def gate(i, t):
    positive = advantages[i, t] > 0
    tau = temperature_positive if positive else temperature_negative
    return tau, 1 / (1 + np.exp(-tau * (rho[i, t] - 1)))

  def value(i, t):
    tau, share = gate(i, t)
    return -4 / tau * share * advantages[i, t]

  def slope(i, t):
    _, share = gate(i, t)
    return 4 * share * (1 - share)

  drifted = drift(logprobs, old_logprobs, mask, max_log_ratio)
  return over_tokens(mask, value), drifted | {'gate': over_tokens(mask, slope)}


def vespo(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  power_positive=2.0,
  rate_positive=3.0,
  power_negative=3.0,
  rate_negative=2.0,
  max_log_ratio=20.0,
  stopped=None,
):
  stopped = logprobs if stopped is None else stopped
  w = product_ratio(stopped, old_logprobs, mask, max_log_ratio=max_log_ratio)

  def phi(i, t):
    if advantages[i, t] < 0:
      return w[i] ** power_negative * np.exp(rate_negative * (1 - w[i]))
    return w[i] ** power_positive * np.exp(rate_positive * (1 - w[i]))

  values = over_tokens(
    mask, lambda i, t: -phi(i, t) * advantages[i, t] * logprobs[i, t]
  )
  drifted = drift(logprobs, old_logprobs, mask, max_log_ratio)
  return values, drifted | {'weight': over_tokens(mask, phi)}


def geometric_mean(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  clip_low=0.4,
  clip_high=0.4,
  max_log_ratio=20.0,
):
  d = over_tokens(mask, lambda i, t: logprobs[i, t] - old_logprobs[i, t])

  def held(i, t):
    if advantages[i, t] > 0:
      return min(d[i, t], clip_high)
    return max(d[i, t], -clip_low) if advantages[i, t] < 0 else d[i, t]

  s = np.ones(len(mask))
  for i, row in enumerate(mask):
    steps = np.flatnonzero(row)
    mean = sum(held(i, t) for t in steps) / max(len(steps), 1)
    s[i] = np.exp(limited(mean, max_log_ratio))
  values = over_tokens(mask, lambda i, t: -advantages[i, t] * s[i])
  metrics = {
    'clip_low': over_tokens(mask, lambda i, t: held(i, t) > d[i, t]),
    'clip_high': over_tokens(mask, lambda i, t: held(i, t) < d[i, t]),
    'sequence_ratio': over_tokens(mask, lambda i, t: s[i]),
  }
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)
