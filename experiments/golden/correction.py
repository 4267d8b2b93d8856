"""Corrections of the mismatch between sampler and learner."""

from collections.abc import Callable

import jax.numpy as jnp

from experiments.golden.common import (
  Arrays,
  tokens_of,
)
from postrain import importance, masks


def metrics(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  args = (x['old_logp'], x['rollout_logp'], x['mask'])
  found = importance.mismatch_metrics(*args)
  rows = {k: log_perplexities(x[f'{k}_logp'], x) for k in ('old', 'rollout')}
  gap = rows['old'] - rows['rollout']
  some = jnp.mean(jnp.any(x['mask'], axis=1), dtype=float)

  def with_empty(mean, constant):  # the peer counts an empty row
    return some * mean + (1 - some) * constant

  return {
    'kl': found['kl'],
    'k3_kl': found['k3'],
    'chi2_token': found['chi_squared'],
    'chi2_seq': with_empty(found['sequence_chi_squared'], 0),
    'training_ppl': with_empty(found['perplexity'], 1),
    'rollout_ppl': with_empty(found['sampler_perplexity'], 1),
    'ppl_ratio': with_empty(found['perplexity_ratio'], 1),
    'training_log_ppl': jnp.mean(rows['old']),
    'rollout_log_ppl': jnp.mean(rows['rollout']),
    'log_ppl_diff': jnp.mean(gap),
    'log_ppl_abs_diff': jnp.mean(jnp.abs(gap)),
    'log_ppl_diff_max': jnp.max(gap),
    'log_ppl_diff_min': jnp.min(gap),
  }


def log_perplexities(logp: jnp.ndarray, x: Arrays) -> jnp.ndarray:
  return -importance.sequence_log_ratio(logp, jnp.zeros_like(logp), x['mask'])


def correction(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  args = (x['old_logp'], x['rollout_logp'], x['mask'])
  level, bounds = hyper['level'], str(hyper['threshold']).split('_')
  if len(bounds) == 2:
    low, high = map(float, bounds)
    found = importance.masked(*args, low=low, high=high, level=level)
  else:
    found = importance.truncated(*args, cap=float(bounds[0]), level=level)
  if hyper['batch_normalize']:
    found = importance.self_normalized(found, x['mask'], level=level)
  return {'weights': found}


def agreement(option: str, threshold: float | str, *args) -> jnp.ndarray:
  """The peer's rejection; it gives the bounds of k1, a log, as ratios."""
  level, estimator = option.removeprefix('seq_').split('_')
  bounds = {'high': threshold}
  if estimator == 'k1':
    low, high = (jnp.log(float(b)) for b in str(threshold).split('_'))
    bounds = {'low': low, 'high': high}
  return masks.matched(*args, estimator=estimator, level=level, **bounds)


def rejection(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  args = (x['old_logp'], x['rollout_logp'], x['mask'])
  kept = agreement(hyper['option'], hyper['threshold'], *args)
  share = 1 - jnp.sum(kept) / jnp.sum(x['mask'])
  return {'mask': kept, 'masked_fraction': share}


def off_policy(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  kept = masks.off_policy_sequences(
    x['logp'],
    x['rollout_logp'],
    tokens_of(x['advantages'], x['mask']),
    x['mask'],
    threshold=hyper['delta'],
  )
  # The peer keeps an empty row; in ours it has no token to keep.
  return {'keep': jnp.any(kept, axis=1) | ~jnp.any(x['mask'], axis=1)}


def handler(case: Arrays) -> Callable | None:
  return {
    'offpolicy_metrics': metrics,
    'rollout_correction': correction,
    'rollout_rejection': rejection,
    'opsm': off_policy,
  }.get(case['category'])
