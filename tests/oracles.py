"""Every public function of the mathematics again, in loops over float64.

Written from the formulas, not from the library. Where the library stops a
gradient, the oracle takes the stopped quantity from ``stopped`` (a copy of the
first argument), so that central differences see only what is differentiated.
"""

import numpy as np

# --- logprobs ---


def log_sum_exp(scores):
  top = max(scores)
  return top + np.log(sum(np.exp(z - top) for z in scores))


def token_logprobs(logits, tokens, *, temperature=1.0):
  out = np.zeros(tokens.shape)
  for i in np.ndindex(tokens.shape):
    scores = [z / temperature for z in logits[i]]
    out[i] = scores[tokens[i]] - log_sum_exp(scores)
  return out


def token_entropy(logits, *, temperature=1.0):
  out = np.zeros(logits.shape[:-1])
  for i in np.ndindex(out.shape):
    scores = [z / temperature for z in logits[i]]
    total = log_sum_exp(scores)
    for z in scores:
      if z > -np.inf:
        out[i] -= np.exp(z - total) * (z - total)
  return out


def kept_token_logprobs(logits, tokens, kept, *, temperature=1.0):
  out = np.zeros(tokens.shape)
  for i in np.ndindex(tokens.shape):
    ids = [v for v in kept[i] if v >= 0] or range(logits.shape[-1])
    scores = {v: logits[i][v] / temperature for v in ids}
    if tokens[i] in scores:
      out[i] = scores[tokens[i]] - log_sum_exp(list(scores.values()))
    else:
      out[i] = -np.inf
  return out


def map_time_chunks(fn, unembed, hidden, *arrays, chunk_size):
  return fn(unembed(hidden), *arrays)


# --- ratios and divergences ---


def shown(mask, index):
  return mask is None or mask[index]


def limited(x, limit):
  return x if limit is None else min(max(x, -limit), limit)


def log_ratio(logprobs, old_logprobs, mask=None, *, max_log_ratio=20.0):
  out = np.zeros(logprobs.shape)
  for i in np.ndindex(out.shape):
    if shown(mask, i):
      out[i] = limited(logprobs[i] - old_logprobs[i], max_log_ratio)
  return out


def limit_hits(logprobs, old_logprobs, mask=None, *, max_log_ratio=20.0):
  out = np.zeros(logprobs.shape)
  for i in np.ndindex(out.shape):
    if shown(mask, i) and max_log_ratio is not None:
      out[i] = abs(logprobs[i] - old_logprobs[i]) > max_log_ratio
  return out


def ratio(logprobs, old_logprobs, mask, *, max_log_ratio=20.0):
  return np.exp(
    log_ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  )


def sequence_log_ratio(logprobs, old_logprobs, mask):
  out = np.zeros(len(mask))
  for i, row in enumerate(mask):
    deltas = [logprobs[i, t] - old_logprobs[i, t] for t in np.flatnonzero(row)]
    out[i] = sum(deltas) / max(len(deltas), 1)
  return out


def sequence_ratio(logprobs, old_logprobs, mask, *, max_log_ratio=20.0):
  means = sequence_log_ratio(logprobs, old_logprobs, mask)
  return np.array([np.exp(limited(x, max_log_ratio)) for x in means])


def sampler_weights(old_logprobs, sampler_logprobs, mask, level, limit):
  out = np.zeros(mask.shape)
  for i in range(len(mask)):
    steps = np.flatnonzero(mask[i])
    total = sum(old_logprobs[i, t] - sampler_logprobs[i, t] for t in steps)
    for t in steps:
      own = old_logprobs[i, t] - sampler_logprobs[i, t]
      log_w = {
        'token': own,
        'sequence': total,
        'geometric': total / len(steps),
      }[level]
      out[i, t] = np.exp(limited(log_w, limit))
  return out


def truncated(
  old_logprobs,
  sampler_logprobs,
  mask,
  *,
  cap=2.0,
  level='token',
  max_log_ratio=20.0,
):
  weights = sampler_weights(
    old_logprobs, sampler_logprobs, mask, level, max_log_ratio
  )
  return np.minimum(weights, cap)


def masked(
  old_logprobs,
  sampler_logprobs,
  mask,
  *,
  low=0.5,
  high=5.0,
  level='token',
  max_log_ratio=20.0,
):
  weights = sampler_weights(
    old_logprobs, sampler_logprobs, mask, level, max_log_ratio
  )
  for i in np.ndindex(weights.shape):
    if not low <= weights[i] <= high:
      weights[i] = 0
  return weights


def effective_sample_size(weights, mask):
  kept = [weights[i] for i in np.ndindex(mask.shape) if mask[i]]
  squares = sum(w * w for w in kept)
  return sum(kept) ** 2 / (len(kept) * squares) if squares > 0 else 0.0


def mismatch_metrics(
  old_logprobs, sampler_logprobs, mask, *, max_log_ratio=20.0
):
  places = [i for i in np.ndindex(mask.shape) if mask[i]]
  gaps = [old_logprobs[i] - sampler_logprobs[i] for i in places] or [0.0]
  short = [limited(x, max_log_ratio) for x in gaps]
  n = len(gaps)
  return {
    'kl': -sum(gaps) / n,
    'k3': sum(np.exp(x) - 1 - x for x in short) / n,
    'chi_squared': sum(np.exp(2 * x) - 1 for x in short) / n,
    'gap': sum(abs(x) for x in gaps) / n,
    'max_gap': max(abs(x) for x in gaps),
    'effective_sample_size': effective_sample_size(
      ratio(old_logprobs, sampler_logprobs, mask, max_log_ratio=max_log_ratio),
      mask,
    ),
    'limit_hits': sum(a != b for a, b in zip(gaps, short, strict=True)) / n,
  }


def k1(logprobs, ref_logprobs, mask=None, *, max_log_ratio=20.0):
  return log_ratio(logprobs, ref_logprobs, mask, max_log_ratio=max_log_ratio)


def k2(logprobs, ref_logprobs, mask=None, *, max_log_ratio=20.0):
  return k1(logprobs, ref_logprobs, mask, max_log_ratio=max_log_ratio) ** 2 / 2


def k3(logprobs, ref_logprobs, mask=None, *, max_log_ratio=20.0):
  d = k1(logprobs, ref_logprobs, mask, max_log_ratio=max_log_ratio)
  return np.exp(-d) - 1 + d


def absolute(logprobs, ref_logprobs, mask=None, *, max_log_ratio=20.0):
  return abs(k1(logprobs, ref_logprobs, mask, max_log_ratio=max_log_ratio))


def exact(logits, ref_logits):
  out = np.zeros(logits.shape[:-1])
  for i in np.ndindex(out.shape):
    total, ref_total = log_sum_exp(logits[i]), log_sum_exp(ref_logits[i])
    for z, ref_z in zip(logits[i], ref_logits[i], strict=True):
      if z > -np.inf:
        logp, ref_logp = z - total, ref_z - ref_total
        out[i] += np.exp(logp) * (logp - ref_logp)
  return out


def straight_through(value, gradient, *, stopped=None):
  stopped = gradient if stopped is None else stopped
  return gradient - stopped + value


def importance_weighted(
  estimate, logprobs, old_logprobs, mask=None, *, max_log_ratio=20.0
):
  d = log_ratio(logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio)
  return np.exp(d) * estimate


# --- advantages ---


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


# --- aggregation and masks ---


def token_mean(mask):
  total = sum(bool(mask[i]) for i in np.ndindex(mask.shape))
  return np.array([[m / max(total, 1) for m in row] for row in mask])


def row_count(mask, count_empty):
  return max(sum(1 for row in mask if count_empty or any(row)), 1)


def sequence_mean(mask, *, count_empty=False):
  n = row_count(mask, count_empty)
  return np.array([[m / max(sum(row), 1) / n for m in row] for row in mask])


def sequence_sum(mask, *, count_empty=False):
  n = row_count(mask, count_empty)
  return np.array([[m / n for m in row] for row in mask])


def constant_length(mask, *, length, count_empty=False):
  n = row_count(mask, count_empty)
  return np.array([[m / n / length for m in row] for row in mask])


def group_token_mean(mask, groups, *, count_empty=False):
  tokens = {}
  for row, group in zip(mask, groups, strict=True):
    tokens[group] = tokens.get(group, 0) + sum(row)
  n = max(sum(1 for c in tokens.values() if count_empty or c), 1)
  return np.array(
    [
      [m / max(tokens[group], 1) / n for m in row]
      for row, group in zip(mask, groups, strict=True)
    ]
  )


def overlong(mask, truncated):
  return np.array(
    [
      [m and not cut for m in row]
      for row, cut in zip(mask, truncated, strict=True)
    ]
  )


def informative_groups(rewards, where=None, *, low=None, high=None):
  keep = []
  for p in range(len(rewards)):
    r = [x for g, x in enumerate(rewards[p]) if where is None or where[p, g]]
    mean = sum(r) / max(len(r), 1)
    keep.append(
      bool(r)
      and max(r) > min(r)
      and (low is None or mean > low)
      and (high is None or mean < high)
    )
  return np.array(keep)


# --- losses ---


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
  values = over_tokens(
    mask,
    lambda i, t: clipped_surrogate(
      s[i, t], advantages[i, t], clip_low, clip_high
    ),
  )
  metrics = clip_metrics(s, advantages, mask, clip_low, clip_high)
  metrics['sequence_ratio'] = over_tokens(mask, lambda i, t: s[i, t])
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
  values = over_tokens(
    mask,
    lambda i, t: clipped_surrogate(
      s[i, t], advantages[i, t], clip_low, clip_high
    ),
  )
  metrics = clip_metrics(s, advantages, mask, clip_low, clip_high)
  metrics['sequence_ratio'] = over_tokens(mask, lambda i, t: s[i, t])
  return values, metrics | drift(logprobs, old_logprobs, mask, max_log_ratio)


def cispo(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  *,
  clip_low=None,
  clip_high=4.0,
  max_log_ratio=20.0,
  stopped=None,
):
  stopped = logprobs if stopped is None else stopped
  rho = ratio(stopped, old_logprobs, mask, max_log_ratio=max_log_ratio)
  floor = -np.inf if clip_low is None else 1 - clip_low

  def value(i, t):
    weight = max(min(rho[i, t], 1 + clip_high), floor)
    return -weight * advantages[i, t] * logprobs[i, t]

  metrics = {
    'clip_high': over_tokens(mask, lambda i, t: rho[i, t] > 1 + clip_high)
  }
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
