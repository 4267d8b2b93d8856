"""Preference losses."""

from collections.abc import Callable

import jax.numpy as jnp

from experiments.golden.common import (
  Arrays,
  differentiated,
)
from postrain import losses


def preference(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  smoothing = hyper.get('label_smoothing', 0.0)
  if 'ignored' in case['name']:
    smoothing = 0.0
  names = ('chosen_logps', 'rejected_logps')

  def fn(x):
    args = (*(x[n] for n in names), *(x[f'ref_{n}'] for n in names))
    options = {'beta': hyper['beta'], 'label_smoothing': smoothing}
    values = losses.dpo(*args, **options)[0]
    return {'loss': jnp.mean(values), 'per_sample': values}

  return differentiated(fn, x, names[0]) | differentiated(fn, x, names[1])


def handler(case: Arrays) -> Callable | None:
  later = (
    'dpo_sigmoid_alpha', 'dpo_sigmoid_forward', 'dpo_sigmoid_js',
    'dpo_sigmoid_norm',
  )  # fmt: skip
  if case['name'].startswith(later):
    return None
  known = ('dpo_sigmoid', 'dpo_conservative')
  return preference if case['name'].startswith(known) else None
