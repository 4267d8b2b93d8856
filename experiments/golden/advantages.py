"""Advantages, shaped rewards, value losses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.golden.common import (
  Arrays,
  differentiated,
  weights,
)
from postrain import advantages, aggregation, kl, losses, shaping


def over_groups(fn: Callable, x: Arrays) -> jax.Array:
  """fn over rewards [N] whose groups are ragged and in any order."""
  ids = np.asarray(x['group_id'])
  places = [np.flatnonzero(ids == i) for i in np.unique(ids)]
  size = max(map(len, places))
  index = np.stack([np.pad(p, (0, size - len(p))) for p in places])
  where = np.arange(size) < np.array([[len(p)] for p in places])
  lengths = jnp.ones(len(ids), int)
  if 'mask' in x:
    lengths = jnp.sum(x['mask'], axis=1)
  grouped = fn(x['rewards'][index], lengths[index], jnp.asarray(where))
  return jnp.zeros_like(x['rewards']).at[index[where]].set(grouped[where])


def advantage(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  name = case['name']
  if name.startswith('masked_whiten'):
    keep = not hyper['shift_mean']
    args = (x['values'], x['mask'])
    return {'whitened': advantages.whiten(*args, keep_mean=keep)}
  if 'token_rewards' in x and 'rewards' not in x:
    return token_advantage(name, hyper, x)
  if name == 'adv_reinforce_pp_baseline__verl':
    args = (x['token_rewards'], x['mask'], x['group_id'])
    return {'advantages': advantages.reinforce_plus_plus_baseline(*args)}
  if 'remax' in name:  # the peer has a baseline per row, not per prompt
    sample = advantages.remax(x['rewards'][:, None], x['baselines'])[:, 0]
  else:
    sample = over_groups(group_estimator(name, hyper), x)
  if 'mask' not in x:
    return {'advantages_sample': sample}
  tokens = jnp.where(x['mask'], sample[:, None], 0)
  # The reward of an empty row counts for the peer's baseline; it has no token
  # to stand on, so that ours takes the rewards of samples.
  if 'reinforce_pp_baseline' in name:
    tokens = advantages.whiten(tokens, x['mask'])
  return {'advantages': tokens}


def token_advantage(name: str, hyper: Arrays, x: Arrays) -> Arrays:
  args = (x['token_rewards'], x['mask'])
  discount = {'discount': hyper.get('gamma', 1.0)}
  returns = advantages.discounted_returns(*args, **discount)
  if name.startswith('adv_optimal_token'):
    found = advantages.optimal_token_baseline(
      x['token_rewards'],
      x['old_logp'],
      x['sum_pi_squared'],
      x['mask'],
      x['group_id'],
      eps=hyper['eps'],
    )
    return {'advantages': found, 'returns': returns}
  if name.startswith('adv_gae'):
    args = (x['token_rewards'], x['values'], x['mask'])
    options = discount | {'lambda_': hyper['lam']}
    raw = advantages.gae(*args, **options)
    return {
      'advantages_unwhitened': raw,
      'advantages': advantages.whiten(raw, x['mask']),
      'returns': advantages.lambda_returns(*args, **options),
    }
  found = advantages.reinforce_plus_plus(*args, **discount)
  return {'advantages': found, 'returns': returns}


def group_estimator(name: str, hyper: Arrays) -> Callable:
  raw = 'singleton' in name and 'vectorized' not in name
  options = {'singleton': 'raw' if raw else 'zero'}
  scale = {'eps': hyper.get('eps', 1e-6), 'ddof': 1}

  def fn(rewards, lengths, where):
    args = (rewards, where)
    if 'opo' in name:
      return advantages.optimal_baseline(rewards, lengths, where, **options)
    if 'gpg' in name:
      return advantages.gpg(*args, counted='nonzero', **options)
    if 'rloo' in name:
      return advantages.leave_one_out(*args, **options)
    if 'passk' in name:
      options['normalize'] = hyper['std']
      return advantages.leave_one_out_max(*args, **scale, **options)
    if hyper.get('scale') == 'none' or 'baseline' in name:
      return advantages.group_centered(*args, **options)
    if hyper.get('scale') == 'batch':
      return advantages.batch_normalized(*args, **scale, **options)
    return advantages.group_normalized(*args, **scale, **options)

  return fn


def critic(case: Arrays, hyper: Arrays, inputs: Arrays) -> Arrays:
  def fn(x):
    values, metrics = losses.clipped_squared_error(
      x['vpred'],
      x['old_values'],
      x['returns'],
      x['mask'],
      clip=hyper['cliprange_value'],
    )
    clipped = jnp.sum(metrics['clipped'] * aggregation.token_mean(x['mask']))
    loss = jnp.sum(weights(hyper, x['mask']) * values)
    return {'loss': loss, 'clipfrac': clipped}

  return differentiated(fn, inputs, 'vpred')


def shaped_reward(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  estimator = kl.k1 if hyper['kind'] == 'kl' else kl.k3
  penalty = estimator(x['old_logp'], x['ref_logp'], x['mask'])
  rewards = jnp.sum(jnp.where(x['mask'], x['token_scores'], 0), axis=1)
  # A mean of means over tokens, not of sums.
  current = jnp.sum(aggregation.sequence_mean(x['mask']) * penalty)
  after = kl.adaptive_coef(
    jnp.asarray(hyper['beta']),
    current,
    num_sequences=len(rewards),
    target=hyper['target'],
    horizon=hyper['horizon'],
  )
  return {
    'token_rewards': shaping.kl_shaped(
      rewards, penalty, x['mask'], coef=hyper['beta']
    ),
    'current_kl': current,
    'beta_after': after,
  }


def controller(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  def step(coef, measured):
    divergence, num_sequences = measured
    coef = kl.adaptive_coef(
      coef,
      divergence,
      num_sequences=num_sequences.astype(float),
      target=hyper['target'],
      horizon=hyper['horizon'],
    )
    return coef, coef

  start = jnp.asarray(hyper['init'])
  return {'coef': jax.lax.scan(step, start, (x['kl'], x['n_steps']))[1]}


def added_reward(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  if case['name'].startswith('repetition'):
    options = {k: hyper[k] for k in ('ngram_size', 'max_penalty')}
    args = (x['tokens'], x['tokens'] >= 0)
    return {'penalty': shaping.repetition_penalty(*args, **options)}
  penalty = shaping.soft_overlong(
    x['length'],
    max_length=hyper['max_len'],
    buffer=hyper['cache'],
    capped=case['name'].startswith('overlong_soft'),
  )
  return {'penalty': hyper.get('factor', 1.0) * penalty}


def handler(case: Arrays) -> Callable | None:
  return {
    'advantage': advantage,
    'kl_controller': controller,
    'kl_in_reward': shaped_reward,
    'reward_shaping': added_reward,
    'value_loss': critic,
  }.get(case['category'])
