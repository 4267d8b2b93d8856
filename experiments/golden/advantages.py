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
from postrain import advantages, aggregation, kl, losses


def over_groups(fn: Callable, rewards: jax.Array, ids: jax.Array) -> jax.Array:
  """fn over rewards [N] whose groups are ragged and in any order."""
  places = [np.flatnonzero(ids == i) for i in np.unique(ids)]
  size = max(map(len, places))
  index = np.stack([np.pad(p, (0, size - len(p))) for p in places])
  where = np.arange(size) < np.array([[len(p)] for p in places])
  grouped = fn(rewards[index], jnp.asarray(where))
  return jnp.zeros_like(rewards).at[index[where]].set(grouped[where])


def advantage(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  name = case['name']
  if name.startswith('masked_whiten'):
    keep = not hyper['shift_mean']
    args = (x['values'], x['mask'])
    return {'whitened': advantages.whiten(*args, keep_mean=keep)}
  if name.startswith('adv_gae'):
    args = (x['token_rewards'], x['values'], x['mask'])
    options = {'discount': hyper['gamma'], 'lambda_': hyper['lam']}
    raw = advantages.gae(*args, **options)
    return {
      'advantages_unwhitened': raw,
      'advantages': advantages.whiten(raw, x['mask']),
      'returns': advantages.lambda_returns(*args, **options),
    }
  if name.startswith('adv_reinforce_pp') and 'baseline' not in name:
    options = {'discount': hyper['gamma']}
    args = (x['token_rewards'], x['mask'])
    returns = advantages.discounted_returns(*args, **options)
    return {
      'returns': returns,
      'advantages': advantages.whiten(returns, x['mask']),
    }
  sample = over_groups(
    group_estimator(name, hyper), x['rewards'], x['group_id']
  )
  if 'mask' not in x:
    return {'advantages_sample': sample}
  tokens = jnp.where(x['mask'], sample[:, None], 0)
  if 'baseline' in name:
    tokens = advantages.whiten(tokens, x['mask'])
  return {'advantages': tokens}


def group_estimator(name: str, hyper: Arrays) -> Callable:
  raw = 'singleton' in name and 'vectorized' not in name
  singleton = 'raw' if raw else 'zero'

  def fn(rewards, where):
    options = {'singleton': singleton}
    if 'rloo' in name:
      return advantages.leave_one_out(rewards, where, **options)
    if hyper.get('scale') == 'none' or 'baseline' in name:
      return advantages.group_centered(rewards, where, **options)
    options |= {'eps': hyper['eps'], 'ddof': 1}
    return advantages.group_normalized(rewards, where, **options)

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
  return {'token_rewards': x['token_scores'] - hyper['beta'] * penalty}


def handler(case: Arrays) -> Callable | None:
  later = (
    'adv_grpo_passk', 'adv_grpo_scale_batch', 'adv_gpg', 'adv_opo', 'adv_remax',
    'adv_optimal_token',
  )  # fmt: skip
  if case['name'].startswith(later):
    return None
  return {
    'advantage': advantage,
    'kl_in_reward': shaped_reward,
    'value_loss': critic,
  }.get(case['category'])
