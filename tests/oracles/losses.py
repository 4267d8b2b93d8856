"""Losses."""

import numpy as np

from oracles.mismatch import (
  limit_hits,
  limited,
  ratio,
  sequence_log_ratio,
  sequence_ratio,
)


def over_tokens(mask, formula):
  """``formula(i, t)`` on the mask, 0 elsewhere."""
  out = np.zeros(mask.shape)
  for i, t in np.ndindex(mask.shape):
    if mask[i, t]:
      out[i, t] = formula(i, t)
  return out


def drift(logprobs, old_logprobs, mask, limit):
  def d(i, t):
    return limited(logprobs[i, t] - old_logprobs[i, t], limit)

  return {
    'ratio': over_tokens(mask, lambda i, t: np.exp(d(i, t))),
    'old_kl': over_tokens(mask, lambda i, t: np.exp(d(i, t)) - 1 - d(i, t)),
    'limit_hits': limit_hits(logprobs, old_logprobs, mask, max_log_ratio=limit),
  }


def reinforce(logprobs, old_logprobs, advantages, mask, *, max_log_ratio=20.0):
  values = over_tokens(mask, lambda i, t: -advantages[i, t] * logprobs[i, t])
  return values, drift(logprobs, old_logprobs, mask, max_log_ratio)


def clipped_surrogate(rho, a, low, high, dual=None):
  bounded = min(max(rho, 1 - low), 1 + high)
  loss = -min(rho * a, bounded * a)
  if dual is not None and a < 0:
    loss = min(loss, -dual * a)
  return loss


def clip_metrics(rho, advantages, mask, low, high):
  return {
    'clip_low': over_tokens(
      mask, lambda i, t: advantages[i, t] < 0 and rho[i, t] < 1 - low
    ),
    'clip_high': over_tokens(
      mask, lambda i, t: advantages[i, t] > 0 and rho[i, t] > 1 + high
    ),
  }


def ppo_clip(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  clip_low=0.2,
  clip_high=0.2,
  dual_clip=None,
  max_log_ratio=20.0,
):
  rho = ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  values = over_tokens(
    mask,
    lambda i, t: clipped_surrogate(
      rho[i, t], advantages[i, t], clip_low, clip_high, dual_clip
    ),
  )
  metrics = clip_metrics(rho, advantages, mask, clip_low, clip_high)
  if dual_clip is not None:
    metrics['dual_clip'] = over_tokens(
      mask, lambda i, t: advantages[i, t] < 0 and rho[i, t] > dual_clip
    )
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def sequence_surrogate(s, advantages, mask, clip_low, clip_high):
  """The clipped surrogate of a ratio of sequences, and its metrics."""
  values = over_tokens(
    mask,
    lambda i, t: clipped_surrogate(
      s[i, t], advantages[i, t], clip_low, clip_high
    ),
  )
  metrics = clip_metrics(s, advantages, mask, clip_low, clip_high)
  metrics['sequence_ratio'] = over_tokens(mask, lambda i, t: s[i, t])
  return values, metrics


def gspo(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  clip_low=3e-4,
  clip_high=4e-4,
  max_log_ratio=20.0,
):
  s = sequence_ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  s = np.array([[x] * mask.shape[1] for x in s])
  values, metrics = sequence_surrogate(s, advantages, mask, clip_low, clip_high)
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def gspo_token(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  clip_low=3e-4,
  clip_high=4e-4,
  max_log_ratio=20.0,
  stopped=None,
):
  stopped = logprobs if stopped is None else stopped
  mean = sequence_log_ratio(stopped, old_logprobs, mask)
  s = np.ones(mask.shape)
  for i, t in np.ndindex(mask.shape):
    if mask[i, t]:
      own = logprobs[i, t] - stopped[i, t]
      s[i, t] = np.exp(limited(mean[i] + own, max_log_ratio))
  values, metrics = sequence_surrogate(s, advantages, mask, clip_low, clip_high)
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def cispo(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  clip_low=None,
  clip_high=4.0,
  cap=None,
  max_log_ratio=20.0,
  stopped=None,
):
  stopped = logprobs if stopped is None else stopped
  rho = ratio(stopped, old_logprobs, mask, max_log_ratio=max_log_ratio)
  floor = -np.inf if clip_low is None else 1 - clip_low
  highest = 1 + clip_high if cap is None else cap

  def value(i, t):
    weight = max(min(rho[i, t], highest), floor)
    return -weight * advantages[i, t] * logprobs[i, t]

  metrics = {'clip_high': over_tokens(mask, lambda i, t: rho[i, t] > highest)}
  if clip_low is not None:
    metrics['clip_low'] = over_tokens(mask, lambda i, t: rho[i, t] < floor)
  drifted = drift(logprobs, old_logprobs, mask, max_log_ratio)
  return over_tokens(mask, value), metrics | drifted


def dpo(
  chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0
):
  won = [beta * (a - b) for a, b in zip(chosen, ref_chosen, strict=True)]
  lost = [beta * (a - b) for a, b in zip(rejected, ref_rejected, strict=True)]
  margin = np.array([a - b for a, b in zip(won, lost, strict=True)])
  right = np.array([np.log(1 + np.exp(-h)) for h in margin])
  flipped = np.array([np.log(1 + np.exp(h)) for h in margin])
  return (1 - label_smoothing) * right + label_smoothing * flipped, {
    'chosen_reward': np.array(won),
    'rejected_reward': np.array(lost),
    'margin': margin,
    'accuracy': (margin > 0).astype(float),
    'chosen_logprob': np.array(chosen),
  }


def squared_error(values, returns, mask):
  error = over_tokens(mask, lambda i, t: values[i, t] - returns[i, t])
  return error**2 / 2, {'error': error}


def clipped_squared_error(values, old_values, returns, mask, *, clip=0.2):
  def bounded(i, t):
    low, high = old_values[i, t] - clip, old_values[i, t] + clip
    return min(max(values[i, t], low), high) - returns[i, t]

  error = over_tokens(mask, lambda i, t: values[i, t] - returns[i, t])
  held = over_tokens(mask, bounded)
  worst = over_tokens(mask, lambda i, t: max(error[i, t] ** 2, held[i, t] ** 2))
  clipped = over_tokens(mask, lambda i, t: held[i, t] ** 2 > error[i, t] ** 2)
  return worst / 2, {'error': error, 'clipped': clipped}


def negative_log_likelihood(logprobs, mask):
  return over_tokens(mask, lambda i, t: -logprobs[i, t]), {
    'probability': over_tokens(mask, lambda i, t: np.exp(logprobs[i, t]))
  }
