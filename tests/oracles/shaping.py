"""Shaped rewards and controllers of the coefficient."""

import numpy as np


def last_token(row):
  return max((t for t in range(len(row)) if row[t]), default=None)


def kl_shaped(
  rewards,
  penalties,
  mask,
  truncated=None,
  *,
  coef=0.05,
  missing_eos_penalty=None,
):
  out = np.zeros(mask.shape)
  for i, t in np.argwhere(mask):
    out[i, t] = -coef * penalties[i, t]
    if t == last_token(mask[i]):
      out[i, t] += rewards[i]
      if missing_eos_penalty is not None and truncated[i]:
        out[i, t] -= missing_eos_penalty
  return out


def kl_penalized(rewards, penalties, mask, *, coef=0.05):
  return np.array(
    [
      r - coef * sum(k for k, m in zip(row, there, strict=True) if m)
      for r, row, there in zip(rewards, penalties, mask, strict=True)
    ]
  )


def difference_rewards(scores, initial, where):
  out = np.zeros(where.shape)
  for i in range(len(where)):
    before = initial[i]
    for t in np.flatnonzero(where[i]):
      out[i, t] = scores[i, t] - before
      before = scores[i, t]
  return out


def soft_overlong(lengths, *, max_length, buffer, capped=True):
  out = np.zeros(lengths.shape)
  for i in np.ndindex(lengths.shape):
    if lengths[i] > max_length - buffer:
      out[i] = (max_length - buffer - lengths[i]) / buffer
    if capped and lengths[i] > max_length:
      out[i] = -1
  return out


def length_penalty(lengths, *, coef):
  return np.array([-coef * n for n in lengths])


def length_reward(rewards, lengths, where=None, *, threshold=0.5):
  out = np.zeros(rewards.shape)
  for p in range(len(rewards)):
    there = [g for g in range(rewards.shape[1]) if where is None or where[p, g]]
    sizes = [lengths[p, g] for g in there]
    for g in there:
      if max(sizes) > min(sizes):
        span = max(sizes) - min(sizes)
        gain = 0.5 - (lengths[p, g] - min(sizes)) / span
        out[p, g] = gain if rewards[p, g] > threshold else min(0, gain)
  return out


def repetition_penalty(tokens, mask, *, ngram_size=3, max_penalty=-1.0):
  out = np.zeros(len(tokens))
  for i in range(len(tokens)):
    ngrams = [
      tuple(tokens[i, t : t + ngram_size])
      for t in range(tokens.shape[1] - ngram_size + 1)
      if all(mask[i, t : t + ngram_size])
    ]
    if ngrams:
      out[i] = max_penalty * (1 - len(set(ngrams)) / len(ngrams))
  return out


def language_consistency(in_language, mask):
  out = np.zeros(len(mask))
  for i in range(len(mask)):
    chosen = [x for x, m in zip(in_language[i], mask[i], strict=True) if m]
    out[i] = sum(chosen) / len(chosen) if chosen else 0.0
  return out


def weighted_sum(rewards, *, weights):
  out = np.zeros(rewards.shape[:-1])
  for i in np.ndindex(out.shape):
    out[i] = sum(w * r for w, r in zip(weights, rewards[i], strict=True))
  return out


def composite(outcomes, process, *, outcome_weight):
  return np.array(
    [
      outcome_weight * r + (1 - outcome_weight) * s
      for r, s in zip(outcomes, process, strict=True)
    ]
  )


def strict_composite(outcomes, process):
  return np.array(
    [r if s == 1 else 0.0 for r, s in zip(outcomes, process, strict=True)]
  )


def fixed_coef(coef, divergence):
  return np.array(coef)


def adaptive_coef(
  coef,
  divergence,
  *,
  num_sequences,
  target=6.0,
  horizon=10_000.0,
  max_error=0.2,
):
  out = []
  for beta, d in zip(coef, divergence, strict=True):
    error = min(max(d / target - 1, -max_error), max_error)
    out.append(beta * (1 + error * num_sequences / horizon))
  return np.array(out)
