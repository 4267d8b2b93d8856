"""Policy losses, divergences, entropy and log-probs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.golden import correction
from experiments.golden.common import (
  Arrays,
  differentiated,
  tokens_of,
  weights,
)
from postrain import aggregation, importance, kl, logprobs, losses, masks


def surrogate(case: Arrays, hyper: Arrays, x: Arrays) -> jax.Array:
  args = (x['logp'], x['old_logp'], tokens_of(x['advantages'], x['mask']))
  args = (*args, x['mask'])
  limit = {'max_log_ratio': 20.0 if case['peer'] == 'verl' else None}
  clip = {
    'clip_low': hyper.get('eps_low'),
    'clip_high': hyper.get('eps_high'),
  } | limit
  name = case['name']
  if name.startswith('cispo_absolute'):
    return losses.cispo(*args, cap=hyper['cap'], **limit)[0]
  if name.startswith('cispo'):
    return losses.cispo(*args, **clip)[0]
  if name.startswith('gspo_sequence') or 'sequence_level' in name:
    return losses.gspo(*args, **clip)[0]
  if name.startswith('gspo_token'):
    return losses.gspo_token(*args, **clip | {'max_log_ratio': 10.0})[0]
  if name.startswith(('reinforce', 'gpg')):
    return losses.reinforce(*args)[0]
  if name.startswith('rloo'):
    return losses.sequence_clip(*args, **clip)[0]
  if name.startswith('gmpo'):
    return losses.geometric_mean(*args, **clip)[0]
  if name.startswith(VARIANTS):
    return variant(hyper, name, args, limit)
  # The two-sided clip is a dual clip wherever its bound is above the upper one.
  dual_clip = hyper.get('delta') if 'two_sided' in name else None
  dual_clip = hyper.get('dual_clip', dual_clip)
  values = losses.ppo_clip(*args, **clip, dual_clip=dual_clip)[0]
  return jnp.where(trained(hyper, name, x), values, 0)


VARIANTS = ('dppo', 'dro', 'kl_cov', 'sapo', 'vespo')


def variant(hyper: Arrays, name: str, args: tuple, limit: Arrays) -> jax.Array:
  """Losses with hyperparameters of their own."""
  logp, _, advantages, mask = args
  if name.startswith('dppo'):
    options = {
      'divergence': name[5:7],
      'clip_low': hyper['div_low'],
      'clip_high': hyper['div_high'],
      'cap': hyper['ratio_cap'],
    }
    return losses.dppo(*args, **options, **limit)[0]
  if name.startswith('dro'):
    return losses.dro(*args, kl_coef=hyper['beta'])[0]
  if name.startswith('kl_cov'):
    selected = masks.top_covariance(
      logp, advantages, mask, fraction=hyper['kl_cov_ratio']
    )
    options = {'kl_coef': hyper['coef'], 'max_log_ratio': None}
    return losses.kl_cov(*args, selected, **options)[0]
  if name.startswith('sapo'):
    options = {
      'temperature_positive': hyper['tau_pos'],
      'temperature_negative': hyper['tau_neg'],
    }
    return losses.sapo(*args, **options, **limit)[0]
  options = {
    'power_positive': hyper['k_pos'],
    'rate_positive': hyper['lambda_pos'],
    'power_negative': hyper['k_neg'],
    'rate_negative': hyper['lambda_neg'],
  }
  return losses.vespo(*args, **options)[0]


def trained(hyper: Arrays, name: str, x: Arrays) -> jax.Array:
  """Tokens of the policy term; the denominator is that of the whole mask."""
  advantages = tokens_of(x['advantages'], x['mask'])
  if 'opsm' in name:
    args = (x['logp'], x['rollout_logp'], advantages, x['mask'])
    return masks.off_policy_sequences(*args, threshold=hyper['delta'])
  if name.startswith('clip_cov'):
    options = {
      'fraction': hyper['clip_cov_ratio'],
      'low': hyper['cov_lb'],
      'high': hyper['cov_ub'],
      'clip_low': hyper['eps_low'],
      'clip_high': hyper['eps_high'],
    }
    args = (x['logp'], x['old_logp'], advantages, x['mask'], jax.random.key(0))
    return masks.covariance(*args, **options)
  return x['mask']


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
    if hyper.get('beta') and 'ref_logp' in x:
      k3 = kl.k3(x['logp'], x['ref_logp'], x['mask'], max_log_ratio=None)
      if hyper['bias_correction']:
        k3 = ratio_corrected(hyper, x, k3)
      values = values + hyper['beta'] * jnp.where(x['mask'], k3, 0)
    scale = policy_weights(hyper, name, x['mask'])
    found = {'loss': jnp.sum(scale * values), 'per_token': values}
    found['per_sample'] = per_sample(hyper, name, values, x['mask'])
    if name.startswith('clip_cov'):
      dropped = x['mask'] & ~trained(hyper, name, x)
      found['selected'] = dropped & (x['advantages'] != 0)[:, None]
    return found

  name = case['name']
  return differentiated(fn, inputs, 'logp')


def policy_weights(hyper: Arrays, name: str, mask: jax.Array) -> jax.Array:
  """The aggregations that a peer hard-codes for a loss, and the others."""
  kind = hyper.get('loss_type')
  if kind == 'sapo' or name.startswith(('gmpo', 'rloo')):
    return aggregation.sequence_mean(mask, count_empty=True)
  if kind == 'vespo':
    return aggregation.token_mean(mask)
  return weights(hyper, mask)


def per_sample(
  hyper: Arrays, name: str, values: jax.Array, mask: jax.Array
) -> jax.Array:
  kind, total = hyper.get('loss_type'), jnp.sum(values, axis=1)
  if kind in ('grpo', 'bnpo', 'sapo') or name.startswith('gmpo'):
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1).astype(float)
  return total / hyper['max_completion_length'] if kind == 'dr_grpo' else total


def bypass(case: Arrays, hyper: Arrays, inputs: Arrays) -> Arrays:
  """The sampler stands in for the old policy; rejection inside of the loss."""

  def fn(x):
    pair = (x['logp'], x['old_logp'])
    options = (hyper['rollout_rs'], hyper['rollout_rs_threshold'])
    kept = correction.agreement(*options, *pair, x['mask'])
    args = (*pair, tokens_of(x['advantages'], x['mask']), x['mask'])
    if hyper['loss_type'] == 'reinforce':
      values = losses.cispo(*args, cap=hyper['rollout_is_threshold'])[0]
    else:
      values = losses.ppo_clip(
        *args,
        clip_low=hyper['eps_low'],
        clip_high=hyper['eps_high'],
        dual_clip=hyper['dual_clip'],
      )[0]
    loss = jnp.sum(aggregation.token_mean(kept) * values)
    return {'loss': loss, 'per_token': values, 'loss_mask': kept}

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
  if 'logits' not in inputs:
    fraction = hyper['top_fraction']
    kept = masks.top_entropy(
      inputs['entropy'], inputs['mask'], fraction=fraction
    )
    return {'mask': kept}

  def fn(x):
    values = logprobs.token_entropy(x['logits'])
    scale = weights(hyper, x['mask'])
    if 'token_ids' not in x:
      return {'loss': jnp.sum(scale * values), 'per_token': values}
    kept = masks.top_entropy(values, x['mask'], fraction=hyper['top_fraction'])
    x = x | {'logp': logprobs.token_logprobs(x['logits'], x['token_ids'])}
    # The policy term keeps its denominator, the bonus counts what it trains.
    policy_term = jnp.where(kept, scale * surrogate(case, hyper, x), 0)
    bonus = aggregation.token_mean(kept) * values
    return {'loss': jnp.sum(policy_term - hyper['entropy_coef'] * bonus)}

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
  if case['name'].startswith('bypass'):
    return bypass
  return {
    'policy_loss': policy,
    'kl': divergence,
    'entropy': entropy,
    'logprob': log_softmax,
  }.get(case['category'])
