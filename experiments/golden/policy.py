"""Policy losses, divergences, entropy and log-probs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.golden.common import (
  Arrays,
  differentiated,
  tokens_of,
  weights,
)
from postrain import importance, kl, logprobs, losses


def surrogate(case: Arrays, hyper: Arrays, x: Arrays) -> jax.Array:
  args = (x['logp'], x['old_logp'], tokens_of(x['advantages'], x['mask']))
  args = (*args, x['mask'])
  clip = {
    'clip_low': hyper.get('eps_low'),
    'clip_high': hyper.get('eps_high'),
    'max_log_ratio': 20.0 if case['peer'] == 'verl' else None,
  }
  name = case['name']
  if name.startswith('cispo_absolute'):
    clip |= {'clip_low': None, 'clip_high': hyper['cap'] - 1}
  if name.startswith('cispo'):
    return losses.cispo(*args, **clip)[0]
  if name.startswith('gspo_sequence') or 'sequence_level' in name:
    return losses.gspo(*args, **clip)[0]
  if name.startswith('gspo_token'):
    return losses.gspo_token(*args, **clip | {'max_log_ratio': 10.0})[0]
  if name.startswith('reinforce'):
    return losses.reinforce(*args)[0]
  return losses.ppo_clip(*args, **clip, dual_clip=hyper.get('dual_clip'))[0]


def ratio_corrected(hyper: Arrays, x: Arrays, k3: jax.Array) -> jax.Array:
  args = (x['logp'], x['old_logp'], x['mask'])
  if hyper.get('importance_sampling_level') == 'sequence':
    ratios = importance.sequence_ratio(*args, max_log_ratio=None)
    return ratios[:, None] * k3
  return kl.importance_weighted(k3, *args, max_log_ratio=None)


def policy(case: Arrays, hyper: Arrays, inputs: Arrays) -> Arrays:
  if 'old_logp' not in inputs:  # plain REINFORCE does not know the old policy
    inputs = inputs | {'old_logp': inputs['logp']}

  def fn(x):
    values = jnp.zeros_like(x['logp'])
    if 'eps_low' in hyper or case['category'] == 'policy_loss':
      values = surrogate(case, hyper, x) * x.get('weights', 1.0)
    if hyper.get('beta'):
      k3 = kl.k3(x['logp'], x['ref_logp'], x['mask'], max_log_ratio=None)
      if hyper['bias_correction']:
        k3 = ratio_corrected(hyper, x, k3)
      values = values + hyper['beta'] * jnp.where(x['mask'], k3, 0)
    loss = jnp.sum(weights(hyper, x['mask']) * values)
    return {'loss': loss, 'per_token': values}

  return differentiated(fn, inputs, 'logp')


def divergence(case: Arrays, hyper: Arrays, inputs: Arrays) -> Arrays:
  kind = hyper.get('kind')
  if kind is None:
    return policy(case, hyper, inputs)

  def fn(x):
    args = (x['logp'], x['ref_logp'], x.get('mask'))
    name = {'abs': 'absolute'}.get(kind, kind.rstrip('+'))
    limit = 20.0 if name == 'k3' else None
    values = getattr(kl, name)(*args, max_log_ratio=limit)
    if kind.endswith('+'):
      values = kl.straight_through(values, kl.k2(*args, max_log_ratio=None))
    scale = weights(hyper, x['mask']) if 'mask' in x else jnp.ones_like(values)
    return {'loss': jnp.sum(scale * values), 'per_token': values}

  return differentiated(fn, inputs, 'logp')


def entropy(case: Arrays, hyper: Arrays, inputs: Arrays) -> Arrays:
  def fn(x):
    values = logprobs.token_entropy(x['logits'])
    scale = weights(hyper, x['mask'])
    if 'token_ids' not in x:
      return {'loss': jnp.sum(scale * values), 'per_token': values}
    x = x | {'logp': logprobs.token_logprobs(x['logits'], x['token_ids'])}
    values = surrogate(case, hyper, x) - hyper['entropy_coef'] * values
    return {'loss': jnp.sum(scale * values)}

  return differentiated(fn, inputs, 'logits')


def log_softmax(case: Arrays, hyper: Arrays, inputs: Arrays) -> Arrays:
  def fn(x):
    options = {'temperature': hyper['temperature']}
    logp = logprobs.token_logprobs(x['logits'], x['token_ids'], **options)
    heat = logprobs.token_entropy(x['logits'], **options)
    loss = jnp.sum(x['cotangent'] * jnp.stack([logp, heat]))
    return {'logp': logp, 'entropy': heat, 'loss': loss}

  return differentiated(fn, inputs, 'logits')


def handler(case: Arrays) -> Callable | None:
  name, category = case['name'], case['category']
  if name.startswith(('kl_cov', 'ppo_clip_opsm', 'ppo_two_sided')):
    return None
  if category == 'policy_loss':
    known = ('ppo_', 'gspo', 'cispo', 'reinforce')
    return policy if name.startswith(known) else None
  if category == 'entropy':
    later = ('top_entropy', 'grpo_from_logits_entropy_bonus_top')
    return None if name.startswith(later) else entropy
  return {'kl': divergence, 'logprob': log_softmax}.get(category)
