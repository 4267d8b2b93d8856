"""Advantages and returns."""

import itertools

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


def population(values, ddof=0):
  """Mean and standard deviation of a list."""
  mean = sum(values) / len(values)
  squares = sum((x - mean) ** 2 for x in values)
  return mean, np.sqrt(squares / max(len(values) - ddof, 1))


def members(rewards, where):
  return [i for i in np.ndindex(rewards.shape) if where is None or where[i]]


def batch_normalized(
  rewards, where=None, *, eps=1e-6, ddof=0, singleton='zero'
):
  there = members(rewards, where)
  if not there:
    return np.zeros(rewards.shape)
  _, std = population([rewards[i] for i in there], ddof)
  return group_centered(rewards, where, singleton=singleton) / (std + eps)


def gpg(rewards, where=None, *, counted='informative', singleton='zero'):
  there = members(rewards, where)
  if counted == 'nonzero':
    found = [i for i in there if rewards[i] != 0]
  else:
    found = [
      (p, g)
      for p, g in there
      if any(q == p and rewards[q, h] != rewards[p, g] for q, h in there)
    ]
  scale = len(there) / max(len(found), 1)
  return scale * group_centered(rewards, where, singleton=singleton)


def leave_one_out_max(
  rewards,
  where=None,
  *,
  normalize=False,
  eps=1e-6,
  ddof=0,
  singleton='zero',
):
  def formula(r):
    if len(r) == 1:
      return [r[0] if singleton == 'raw' else 0.0]
    scale = population(r, ddof)[1] + eps if normalize else 1.0
    return [(max(r) - max(r[:i] + r[i + 1 :])) / scale for i in range(len(r))]

  return over_groups(rewards, where, formula)


def group_pass_at_k(rewards, where=None, *, k, threshold=0.5, eps=1e-6):
  """Over all subsets of k, each scored by its best sample."""

  def formula(r):
    size = min(k, len(r))
    subsets = list(itertools.combinations(range(len(r)), size))
    scores = [float(any(r[i] > threshold for i in s)) for s in subsets]
    mean, std = population(scores)
    out = []
    for i in range(len(r)):
      own = [x for s, x in zip(subsets, scores, strict=True) if i in s]
      out.append((sum(own) / len(own) - mean) / (std + eps) if std else 0.0)
    return out

  return over_groups(rewards, where, formula)


def remax(rewards, baselines, where=None):
  out = np.zeros(rewards.shape)
  for p, g in members(rewards, where):
    out[p, g] = rewards[p, g] - baselines[p]
  return out


def optimal_baseline(rewards, lengths, where=None, *, singleton='zero'):
  out = np.zeros(rewards.shape)
  for p, g in members(rewards, where):
    group = [h for q, h in members(rewards, where) if q == p]
    if len(group) == 1:
      out[p, g] = rewards[p, g] if singleton == 'raw' else 0.0
      continue
    weighted = sum(lengths[p, h] * rewards[p, h] for h in group)
    out[p, g] = rewards[p, g] - weighted / sum(lengths[p, h] for h in group)
  return out


def gdpo(rewards, where=None, *, weights=None, eps=1e-6, ddof=0):
  where = np.ones(rewards.shape, bool) if where is None else where
  total = np.zeros(rewards.shape[:2])
  for k in range(rewards.shape[2]):
    weight = 1.0 if weights is None else weights[k]
    total += weight * group_normalized(
      rewards[..., k], where[..., k], eps=eps, ddof=ddof
    )
  there = members(total, where.any(axis=2))
  out = np.zeros(total.shape)
  if there:
    mean, std = population([total[i] for i in there], ddof)
    for i in there:
      out[i] = (total[i] - mean) / (std + eps)
  return out


def differential_smoothing(
  rewards,
  sequence_logprobs,
  lengths,
  where=None,
  *,
  positive_coef,
  negative_coef,
  threshold=0.5,
  length_norm=False,
  recenter=False,
  eps=1e-6,
  ddof=0,
):
  out = group_normalized(rewards, where, eps=eps, ddof=ddof)
  for i in members(rewards, where):
    logp = sequence_logprobs[i]
    if length_norm:
      logp = logp / max(lengths[i], 1)
    if rewards[i] > threshold:
      out[i] -= positive_coef * logp
    else:
      out[i] += negative_coef * logp
  return group_centered(out, where) if recenter else out


def reinforce_plus_plus(rewards, mask, *, discount=1.0, eps=1e-8, ddof=1):
  returns = discounted_returns(rewards, mask, discount=discount)
  return whiten(returns, mask, eps=eps, ddof=ddof)


def reinforce_plus_plus_baseline(rewards, mask, groups, *, eps=1e-8, ddof=1):
  totals = [
    sum(rewards[i, t] for t in np.flatnonzero(mask[i]))
    for i in range(len(mask))
  ]
  out = np.zeros(mask.shape)
  for i, t in np.argwhere(mask):
    own = [
      totals[j]
      for j in range(len(mask))
      if groups[j] == groups[i] and any(mask[j])
    ]
    out[i, t] = totals[i] - sum(own) / len(own)
  return whiten(out, mask, eps=eps, ddof=ddof)


def optimal_token_baseline(
  rewards, old_logprobs, collisions, mask, groups, *, discount=1.0, eps=1e-8
):
  returns = discounted_returns(rewards, mask, discount=discount)
  energy = np.zeros(mask.shape)
  for i, t in np.argwhere(mask):
    for s in np.flatnonzero(mask[i, : t + 1]):
      energy[i, t] += 1 - 2 * np.exp(old_logprobs[i, s]) + collisions[i, s]
  out = np.zeros(mask.shape)
  for i, t in np.argwhere(mask):
    own = [j for j in range(len(mask)) if groups[j] == groups[i] and mask[j, t]]
    out[i, t] = returns[i, t]
    if len(own) > 1:
      total = sum(energy[j, t] for j in own)
      weighted = sum(energy[j, t] * returns[j, t] for j in own)
      out[i, t] -= weighted / (total + eps)
  return out


def group_process(rewards, where, mask, groups, *, eps=1e-6, ddof=0):
  out = np.zeros(mask.shape)
  steps = [tuple(i) for i in np.argwhere(where & mask)]
  for i, t in np.argwhere(mask):
    pooled = [rewards[s] for s in steps if groups[s[0]] == groups[i]]
    ahead = [rewards[s] for s in steps if s[0] == i and s[1] >= t]
    if ahead and max(pooled) > min(pooled):
      mean, std = population(pooled, ddof)
      out[i, t] = sum((r - mean) / (std + eps) for r in ahead)
  return out


def turns_of(mask, turn_ids):
  """Lists of the tokens of each turn of a row."""
  turns, last = [], None
  for t in np.flatnonzero(mask):
    if turn_ids[t] != last:
      turns.append([])
    turns[-1].append(t)
    last = turn_ids[t]
  return turns


def turn_gae(
  rewards,
  values,
  mask,
  turn_ids,
  bootstrap=None,
  *,
  discount=1.0,
  lambda_=0.95,
):
  out = np.zeros(mask.shape)
  for i in range(len(mask)):
    turns = turns_of(mask[i], turn_ids[i])
    r = [sum(rewards[i, t] for t in turn) for turn in turns]
    v = [values[i, turn[0]] for turn in turns]
    v.append(0.0 if bootstrap is None else bootstrap[i])
    delta = [r[k] + discount * v[k + 1] - v[k] for k in range(len(turns))]
    for k, turn in enumerate(turns):
      out[i, turn] = sum(
        (discount * lambda_) ** (n - k) * delta[n] for n in range(k, len(turns))
      )
  return out


def turn_returns(rewards, mask, turn_ids, *, discount=1.0):
  out = np.zeros(mask.shape)
  for i in range(len(mask)):
    turns = turns_of(mask[i], turn_ids[i])
    for k, turn in enumerate(turns):
      out[i, turn] = sum(
        discount**n * sum(rewards[i, t] for t in later)
        for n, later in enumerate(turns[k:])
      )
  return out
