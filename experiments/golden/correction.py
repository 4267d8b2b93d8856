"""Corrections of the mismatch between sampler and learner."""

from collections.abc import Callable

import jax.numpy as jnp

from experiments.golden.common import (
  Arrays,
)
from postrain import aggregation, importance


def correction(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  args = (x['old_logp'], x['rollout_logp'], x['mask'])
  if case['category'] == 'offpolicy_metrics':
    found = importance.mismatch_metrics(*args)
    names = {'kl': 'kl', 'k3_kl': 'k3', 'chi2_token': 'chi_squared'}
    return {theirs: found[ours] for theirs, ours in names.items()}
  level, bounds = hyper['level'], str(hyper['threshold']).split('_')
  if len(bounds) == 2:
    low, high = map(float, bounds)
    found = importance.masked(*args, low=low, high=high, level=level)
  else:
    found = importance.truncated(*args, cap=float(bounds[0]), level=level)
  if hyper['batch_normalize']:
    scale = aggregation.token_mean(x['mask'])
    if level == 'sequence':
      scale = aggregation.sequence_mean(x['mask'])
    found = found / jnp.sum(scale * found)
  return {'weights': found}


def handler(case: Arrays) -> Callable | None:
  known = ('offpolicy_metrics', 'rollout_correction')
  return correction if case['category'] in known else None
