"""Ratios, corrections of the mismatch, divergences."""

import numpy as np

from oracles.logprobs import log_sum_exp


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


def product_ratio(logprobs, old_logprobs, mask, *, max_log_ratio=20.0):
  out = np.ones(len(mask))
  for i, row in enumerate(mask):
    deltas = [logprobs[i, t] - old_logprobs[i, t] for t in np.flatnonzero(row)]
    out[i] = np.exp(limited(sum(deltas), max_log_ratio))
  return out


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


def self_normalized(weights, mask, *, level='token'):
  kept = [weights[i] for i in np.ndindex(mask.shape) if mask[i]]
  if level == 'sequence':
    rows = [weights[i][row] for i, row in enumerate(mask) if any(row)]
    kept = [sum(row) / len(row) for row in rows]
  mean = sum(kept) / max(len(kept), 1)
  out = np.zeros(mask.shape)
  for i in np.ndindex(mask.shape):
    if mask[i] and mean > 0:
      out[i] = weights[i] / mean
  return out


def mean_of(numbers):
  return sum(numbers) / max(len(numbers), 1)


def mismatch_metrics(
  old_logprobs, sampler_logprobs, mask, *, max_log_ratio=20.0
):
  places = [i for i in np.ndindex(mask.shape) if mask[i]]
  gaps = [old_logprobs[i] - sampler_logprobs[i] for i in places] or [0.0]
  short = [limited(x, max_log_ratio) for x in gaps]
  some = [i for i, row in enumerate(mask) if any(row)]
  products = product_ratio(
    old_logprobs, sampler_logprobs, mask, max_log_ratio=max_log_ratio
  )

  def perplexity(score):
    found = []
    for i in some:
      mean = mean_of([score(i, t) for t in np.flatnonzero(mask[i])])
      found.append(np.exp(limited(-mean, max_log_ratio)))
    return mean_of(found)

  return {
    'kl': -mean_of(gaps),
    'k3': mean_of([np.exp(x) - 1 - x for x in short]),
    'reverse_kl': mean_of([x * np.exp(x) - np.exp(x) + 1 for x in short]),
    'chi_squared': mean_of([np.exp(2 * x) - 1 for x in short]),
    'gap': mean_of([abs(x) for x in gaps]),
    'max_gap': max(abs(x) for x in gaps),
    'effective_sample_size': effective_sample_size(
      ratio(old_logprobs, sampler_logprobs, mask, max_log_ratio=max_log_ratio),
      mask,
    ),
    'limit_hits': mean_of([a != b for a, b in zip(gaps, short, strict=True)]),
    'sequence_chi_squared': mean_of([products[i] ** 2 - 1 for i in some]),
    'sequence_effective_sample_size': effective_sample_size(
      products, np.array([any(row) for row in mask])
    ),
    'perplexity': perplexity(lambda i, t: old_logprobs[i, t]),
    'sampler_perplexity': perplexity(lambda i, t: sampler_logprobs[i, t]),
    'perplexity_ratio': perplexity(
      lambda i, t: old_logprobs[i, t] - sampler_logprobs[i, t]
    ),
  }


def decomposition(
  logprobs, old_logprobs, sampler_logprobs, mask, *, max_log_ratio=20.0
):
  places = [i for i in np.ndindex(mask.shape) if mask[i]]
  found = {}
  for name, new, old in (
    ('mismatch', old_logprobs, sampler_logprobs),
    ('staleness', logprobs, old_logprobs),
    ('total', logprobs, sampler_logprobs),
  ):
    found[name] = mean_of([old[i] - new[i] for i in places])
    found[f'{name}_sample_size'] = effective_sample_size(
      ratio(new, old, mask, max_log_ratio=max_log_ratio), mask
    )
  return found


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
