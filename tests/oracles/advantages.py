"""Advantages and returns."""

import numpy as np


def over_groups(rewards, where, formula):
  """``formula(rewards of the group) -> advantages``, on the samples there."""
  where = np.ones(rewards.shape, bool) if where is None else where
  out = np.zeros(rewards.shape)
  for p in range(len(rewards)):
    there = np.flatnonzero(where[p])
    if len(there):
      out[p, there] = formula([rewards[p, g] for g in there])
  return out


def group_centered(rewards, where=None, *, singleton='zero'):
  def formula(r):
    if len(r) == 1:
      return [r[0] if singleton == 'raw' else 0.0]
    return [x - sum(r) / len(r) for x in r]

  return over_groups(rewards, where, formula)


def group_normalized(
  rewards, where=None, *, eps=1e-6, ddof=0, singleton='zero'
):
  def formula(r):
    if len(r) == 1:
      return [r[0] / (1 + eps) if singleton == 'raw' else 0.0]
    mean = sum(r) / len(r)
    std = np.sqrt(sum((x - mean) ** 2 for x in r) / (len(r) - ddof))
    return [(x - mean) / (std + eps) if max(r) > min(r) else 0.0 for x in r]

  return over_groups(rewards, where, formula)


def leave_one_out(rewards, where=None, *, singleton='zero'):
  def formula(r):
    if len(r) == 1:
      return [r[0] if singleton == 'raw' else 0.0]
    return [
      x - sum(y for j, y in enumerate(r) if j != i) / (len(r) - 1)
      for i, x in enumerate(r)
    ]

  return over_groups(rewards, where, formula)


def max_only(rewards, where=None):
  return over_groups(
    rewards, where, lambda r: [x if x == max(r) else 0.0 for x in r]
  )


def gae(rewards, values, mask, bootstrap=None, *, discount=1.0, lambda_=0.95):
  """The double sum over the tokens of the mask alone, gaps cut out."""
  out = np.zeros(mask.shape)
  for i in range(len(mask)):
    steps = list(np.flatnonzero(mask[i]))
    r = [rewards[i, t] for t in steps]
    v = [values[i, t] for t in steps]
    v.append(0.0 if bootstrap is None else bootstrap[i])
    delta = [r[k] + discount * v[k + 1] - v[k] for k in range(len(steps))]
    for k, t in enumerate(steps):
      out[i, t] = sum(
        (discount * lambda_) ** (n - k) * delta[n] for n in range(k, len(steps))
      )
  return out


def lambda_returns(
  rewards, values, mask, bootstrap=None, *, discount=1.0, lambda_=0.95
):
  advantages = gae(
    rewards, values, mask, bootstrap, discount=discount, lambda_=lambda_
  )
  for i in np.ndindex(mask.shape):
    if mask[i]:
      advantages[i] += values[i]
  return advantages


def discounted_returns(rewards, mask, *, discount=1.0):
  out = np.zeros(mask.shape)
  for i in range(len(mask)):
    steps = np.flatnonzero(mask[i])
    for k, t in enumerate(steps):
      out[i, t] = sum(
        discount**n * rewards[i, s] for n, s in enumerate(steps[k:])
      )
  return out


def whiten(advantages, mask, *, keep_mean=False, eps=1e-8, ddof=1):
  places = [i for i in np.ndindex(mask.shape) if mask[i]]
  out = np.zeros(mask.shape)
  if not places:
    return out
  mean = sum(advantages[i] for i in places) / len(places)
  squares = sum((advantages[i] - mean) ** 2 for i in places)
  std = np.sqrt(squares / max(len(places) - ddof, 1) + eps)
  for i in places:
    out[i] = (advantages[i] - mean) / std + (mean if keep_mean else 0.0)
  return out
