"""Hold the mathematics against reference values of other libraries.

  python experiments/golden/check.py FOLDER

FOLDER holds ``index.json`` and one npz per case: inputs ``in_*``, expected
outputs ``out_*``, hyperparameters ``hyper``. Everything runs in float64 at the
tolerance of the case; where the peer adds an epsilon that we do not, at the
tolerance the case states for that. The exit status is 1 if a case fails.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import advantages, aggregation, importance, kl, logprobs, losses

Arrays = dict[str, Any]
NOT_BUILT = (
  'adv_grpo_passk', 'adv_grpo_scale_batch', 'adv_gpg', 'adv_opo', 'adv_remax',
  'adv_optimal_token', 'kl_cov', 'ppo_clip_opsm', 'ppo_two_sided', 'dpo_exo',
  'dpo_sigmoid_alpha', 'dpo_sigmoid_forward', 'dpo_sigmoid_js',
  'dpo_sigmoid_norm', 'grpo_from_logits_entropy_bonus_top', 'rloo_sequence',
)  # fmt: skip


def weights(hyper: Arrays, mask: jax.Array) -> jax.Array:
  """The peer's aggregation; TRL counts empty rows, verl does not."""
  mode = hyper.get('loss_agg_mode') or hyper.get('loss_type') or 'token-mean'
  every = {'count_empty': 'loss_agg_mode' not in hyper}
  rows = jnp.sum(jnp.any(mask, axis=1))
  if mode in ('token-mean', 'dapo', 'bnpo', 'cispo'):
    scale = jnp.sum(mask) / hyper.get('batch_num_tokens', jnp.sum(mask))
    return aggregation.token_mean(mask) * scale
  if mode in ('seq-mean-token-mean', 'grpo'):
    scale = rows / hyper.get('global_batch_size', rows)
    return aggregation.sequence_mean(mask, **every) * scale
  if mode in ('seq-mean-token-sum', 'luspo'):
    return aggregation.sequence_sum(mask, **every)
  if mode in ('seq-mean-token-sum-norm', 'dr_grpo'):
    length = hyper.get('loss_scale_factor') or hyper['max_completion_length']
    return aggregation.constant_length(mask, length=length, **every)
  if mode == 'token-sum':
    return mask.astype(float)
  raise ValueError(f'no aggregation for {mode!r}')


def differentiated(fn: Callable, inputs: Arrays, name: str) -> Arrays:
  """Outputs of fn (a dict with ``loss``) and the gradient of one input."""

  def total(x):
    outputs = fn(inputs | {name: x})
    return outputs['loss'], outputs

  gradient, outputs = jax.grad(total, has_aux=True)(inputs[name])
  return outputs | {f'grad_{name}': gradient}


def tokens_of(x: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.broadcast_to(x[:, None], mask.shape) if x.ndim == 1 else x


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
  name, category = case['name'], case['category']
  if name.startswith(NOT_BUILT):
    return None
  if category == 'policy_loss':
    known = ('ppo_', 'gspo', 'cispo', 'reinforce')
    return policy if name.startswith(known) else None
  if category == 'preference':
    known = ('dpo_sigmoid', 'dpo_conservative')
    return preference if name.startswith(known) else None
  return {
    'kl': divergence,
    'kl_in_reward': shaped_reward,
    'entropy': None if name.startswith('top_entropy') else entropy,
    'logprob': log_softmax,
    'advantage': advantage,
    'offpolicy_metrics': correction,
    'rollout_correction': correction,
    'value_loss': critic,
  }.get(category)


def differences(case: Arrays, folder: pathlib.Path, fn: Callable) -> list[str]:
  """What does not agree; raises where nothing was compared."""
  with np.load(folder / case['file']) as file:
    stored = {k: file[k] for k in file.files}
  hyper = json.loads(str(stored.pop('hyper')))
  inputs = {k[3:]: jnp.asarray(v) for k, v in stored.items() if k[:3] == 'in_'}
  if 'mask' in inputs:
    inputs['mask'] = inputs['mask'].astype(bool)
  expected = {k[4:]: v for k, v in stored.items() if k[:4] == 'out_'}
  actual = fn(case, hyper, inputs)
  shared = sorted(set(actual) & set(expected))
  if not shared:
    raise ValueError(f'{case["name"]} gave none of {sorted(expected)}')
  tolerance = case['tolerance']
  tolerance = tolerance.get('f64_without_quirks', tolerance['f64'])
  found = []
  for key in shared:
    a, b = np.asarray(actual[key]), expected[key]
    compared = np.ones(b.shape, bool)
    if 'mask' in inputs and b.shape == inputs['mask'].shape:
      compared = np.asarray(inputs['mask'])
    if hyper.get('kind') == 'k3':  # the peer clamps the value, we do not
      if 'per_token' in expected:
        low = expected['per_token'] < 10
        compared = compared & low if b.shape == low.shape else compared
    elif hyper.get('kind') == 'k3+' and key == 'per_token':
      compared = compared & (b < 10)
    if not np.allclose(a[compared], b[compared], **tolerance):
      gap = np.max(np.abs(a[compared] - b[compared]))
      found.append(f'{key} differs by {gap:.2e}')
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=pathlib.Path)
  folder = parser.parse_args().folder
  jax.config.update('jax_enable_x64', True)
  counts = {'passed': 0, 'failed': 0, 'not built': 0}
  for case in json.loads((folder / 'index.json').read_text())['cases']:
    fn, found = handler(case), []
    verdict = 'not built'
    if fn is not None:
      found = differences(case, folder, fn)
      verdict = 'failed' if found else 'passed'
    counts[verdict] += 1
    print(f'{verdict:9} {case["name"]}', *found, sep='  ')
  print(', '.join(f'{n} {verdict}' for verdict, n in counts.items()))
  return int(counts['failed'] > 0)


if __name__ == '__main__':
  sys.exit(main())
