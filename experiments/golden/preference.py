"""Preference losses and reward models."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.golden.common import (
  Arrays,
  differentiated,
)
from postrain import losses

NAMES = ('chosen_logps', 'rejected_logps')
LENGTHS = ('chosen_len', 'rejected_len')
LINKS = {
  'sigmoid': 'dpo',
  'robust': 'robust_dpo',
  **{
    name: name
    for name in (
      *('aot', 'apo_down', 'apo_zero', 'bco_pair', 'discopop', 'exo_pair'),
      *('hinge', 'ipo', 'nca_pair', 'sppo_hard'),
    )
  },
}
DIVERGENCES = {'js_divergence': 'jensen_shannon'}


def mean(values: jax.Array) -> Arrays:
  return {'loss': jnp.mean(values), 'per_sample': values}


def pairwise(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  options = {'beta': hyper['beta']}
  # TRL ignores the smoothing of 'sigmoid'; other losses of its apply it.
  if 'label_smoothing' in hyper and 'ignored' not in case['name']:
    options['label_smoothing'] = hyper['label_smoothing']
  divergence = hyper.get('f_divergence', 'reverse_kl')
  kind, per_token = hyper['loss_type'], ()
  if case['name'] == 'dpo_sigmoid_norm__trl':
    kind, per_token = 'length_normalized_dpo', LENGTHS
  elif kind == 'ipo' and 'unnormalised' not in case['name']:
    kind, per_token = 'length_normalized_ipo', LENGTHS
  loss = getattr(losses, LINKS.get(kind, kind))

  def fn(x):
    args = [*(x[n] for n in NAMES), *(x[f'ref_{n}'] for n in NAMES)]
    if divergence != 'reverse_kl':
      # Composed, since TRL has every pair of a divergence and a loss; and
      # without the limit of the log-ratio, which TRL does not have.
      rewards = [
        losses.implicit_reward(
          *pair,
          beta=1.0,
          divergence=DIVERGENCES.get(divergence, divergence),
          alpha=hyper.get('alpha', 0.5),
          max_log_ratio=None,
        )
        for pair in zip(args[:2], args[2:], strict=True)
      ]
      args = [*rewards, *map(jnp.zeros_like, rewards)]
    return mean(loss(*args, *(x[n] for n in per_token), **options)[0])

  return differentiated(fn, x, *NAMES)


def unpaired(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  options = {
    k: hyper[k] for k in ('beta', 'desirable_weight', 'undesirable_weight')
  }

  def fn(x):
    z = losses.kto_reference_point(x['kl_policy_logps'], x['kl_ref_logps'])
    args = (x['policy_logps'], x['ref_logps'], x['label'].astype(bool), z)
    return mean(losses.kto(*args, **options)[0]) | {'z0': z}

  return differentiated(fn, x, 'policy_logps')


def odds_ratio(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  # TRL's likelihood covers the prompt and is an input here: ours leaves.
  names = ('chosen_avg_logps', 'rejected_avg_logps')
  one = jnp.ones(x[names[0]].shape, int)

  def fn(x):
    args = [x[n] for n in names]
    values = losses.orpo(*args, one, one, coef=hyper['beta'])[0] + args[0]
    return {'loss': jnp.mean(values) + x['nll']}

  return differentiated(fn, x, *names, 'nll')


def length_margin(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  def fn(x):
    args = (x[n] for n in (*NAMES, *LENGTHS))
    options = {'beta': hyper['beta'], 'gamma': hyper['gamma']}
    return mean(losses.simpo(*args, **options)[0])

  return differentiated(fn, x, *NAMES)


def contrastive(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  # TRL's likelihood is a mean over tokens, hence a term of its own.
  def fn(x):
    args, beta = [x[n] for n in NAMES], hyper['beta']
    if hyper['loss_type'] == 'hinge':
      zeros = jnp.zeros_like(args[0])
      values = losses.hinge(*args, zeros, zeros, beta=beta)[0]
    else:
      values = losses.cpo(*args, beta=beta, nll_coef=None)[0]
    nll = -jnp.sum(args[0]) / jnp.sum(x['chosen_len']).astype(float)
    return {'loss': jnp.mean(values) + hyper['cpo_alpha'] * nll}

  return differentiated(fn, x, *NAMES)


def reward_model(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  def fn(x):
    args = (x['chosen'], x['rejected'])
    values = losses.bradley_terry(*args, x.get('margin'))[0]
    if hyper['center_coef'] is not None:
      centering = losses.score_centering(*args)[0]
      values = values + hyper['center_coef'] * centering
    return {'loss': jnp.mean(values)}

  return differentiated(fn, x, 'chosen', 'rejected')


def handler(case: Arrays) -> Callable | None:
  if case['category'] == 'reward_model':
    return reward_model
  if case['category'] != 'preference':
    return None
  known = {
    'dpo': pairwise,
    'kto': unpaired,
    'orpo': odds_ratio,
    'simpo': length_margin,
    'cpo': contrastive,
  }
  return known.get(case['name'].split('_')[0])
