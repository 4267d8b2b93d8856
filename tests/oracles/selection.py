"""Which tokens and sequences take part."""

import jax
import numpy as np

from oracles.mismatch import k1, k2, k3, ratio


def places(mask):
  return [i for i in np.ndindex(mask.shape) if mask[i]]


def marked(mask, chosen):
  out = np.zeros(mask.shape, bool)
  for i in chosen:
    out[i] = True
  return out


def covariances(logprobs, advantages, mask):
  """The product of the deviations of each token, by its place."""
  shown = places(mask)
  n = max(len(shown), 1)
  mean_logprob = sum(logprobs[i] for i in shown) / n
  mean_advantage = sum(advantages[i] for i in shown) / n
  return {
    i: (logprobs[i] - mean_logprob) * (advantages[i] - mean_advantage)
    for i in shown
  }


def share(fraction, mask):
  whole = int(fraction * len(places(mask)) + 1e-9)
  return max(whole, 1) if fraction > 0 else 0


def covariance(
  logprobs,
  old_logprobs,
  advantages,
  mask,
  key,
  *,
  fraction=2e-4,
  low=1.0,
  high=5.0,
  clip_low=1.0,
  clip_high=1.0,
):
  """The draw of each token is taken from JAX; all else is counted by hand."""
  rho = ratio(logprobs, old_logprobs, mask)
  eligible = []
  for i, c in covariances(logprobs, advantages, mask).items():
    clipped = (advantages[i] > 0 and rho[i] > 1 + clip_high) or (
      advantages[i] < 0 and rho[i] < 1 - clip_low
    )
    if low < c < high and not clipped:
      number = int(sum(mask[i[0], : i[1] + 1]))
      place = jax.random.fold_in(jax.random.fold_in(key, i[0]), number)
      eligible.append((float(jax.random.uniform(place, (), 'float32')), i))
  dropped = sorted(eligible, reverse=True)[: share(fraction, mask)]
  return mask & ~marked(mask, [i for _, i in dropped])


def top_covariance(logprobs, advantages, mask, *, fraction=2e-3):
  scores = covariances(logprobs, advantages, mask)
  ordered = sorted(scores, key=scores.get, reverse=True)
  return marked(mask, ordered[: share(fraction, mask)])


def top_entropy(entropy, mask, *, fraction=0.2):
  shown = [entropy[i] for i in places(mask)]
  if not shown:
    return marked(mask, [])
  bound = np.quantile(shown, 1 - fraction)
  return marked(mask, [i for i in places(mask) if entropy[i] >= bound - 1e-9])


def off_policy_sequences(
  logprobs, sampler_logprobs, advantages, mask, *, threshold
):
  kept = []
  for i, row in enumerate(mask):
    steps = np.flatnonzero(row)
    gaps = [sampler_logprobs[i, t] - logprobs[i, t] for t in steps]
    far = sum(gaps) / max(len(gaps), 1) > threshold
    kept += [(i, t) for t in steps if not (far and advantages[i, t] < 0)]
  return marked(mask, kept)


def matched(
  old_logprobs,
  sampler_logprobs,
  mask,
  *,
  estimator='k3',
  level='token',
  low=None,
  high=None,
  max_log_ratio=20.0,
):
  fn = {'k1': k1, 'k2': k2, 'k3': k3}[estimator]
  distance = fn(
    sampler_logprobs, old_logprobs, mask, max_log_ratio=max_log_ratio
  )
  kept = []
  for i, t in places(mask):
    own = [distance[i, s] for s in np.flatnonzero(mask[i])]
    x = {
      'token': distance[i, t],
      'sum': sum(own),
      'mean': sum(own) / len(own),
      'max': max(own),
    }[level]
    if (low is None or x >= low) and (high is None or x <= high):
      kept.append((i, t))
  return marked(mask, kept)


def unsolved(rewards, where=None, *, level='response', threshold=0.5):
  where = np.ones(rewards.shape, bool) if where is None else where
  kept = []
  for p, g in places(where):
    rivals = [rewards[p, g]]
    if level == 'group':
      rivals = [rewards[p, j] for j in np.flatnonzero(where[p])]
    if max(rivals) < threshold:
      kept.append((p, g))
  return marked(where, kept)
