"""Which estimator of the divergence, in which place, has which gradient.

Everything is enumerated: first the next tokens of one state, then all sequences
of a tabular policy.
"""

from collections.abc import Callable, Iterator

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from experiments.estimators.common import Check
from postrain import advantages, kl, losses, shaping
from postrain.tasks.tabular import enumeration

Params = dict[str, Array]
Estimator = Callable[[Array, Array], Array]

STATE = '#46 to #51, one state'
PLACES = '#49, whole sequences'
WORKED = '#48, worked case'
VOCAB, LENGTH = 3, 2
EXACT = 1e-10  # float64, enumerated
WRONG = 1e-3


def weighted_k3(logprobs: Array, ref: Array) -> Array:
  old = jax.lax.stop_gradient(logprobs)
  return kl.importance_weighted(kl.k3(logprobs, ref), logprobs, old)


def k3_plus(logprobs: Array, ref: Array) -> Array:
  return kl.straight_through(kl.k3(logprobs, ref), kl.k2(logprobs, ref))


ESTIMATORS: dict[str, Estimator] = {
  'k1': kl.k1,
  'k2': kl.k2,
  'k3': kl.k3,
  'k3+': k3_plus,
  'ratio k3': weighted_k3,
}
# value: unbiased; the rest: whose gradient the estimator has as a loss
FACTS = {
  'k1': {'value', 'none'},
  'k2': {'reverse'},
  'k3': {'value', 'forward'},
  'k3+': {'value', 'reverse'},
  'ratio k3': {'value', 'reverse'},
}
RIGHT_PLACES = {
  ('k1', 'reward', 'reward-to-go'),
  ('k1', 'reward', 'sequence'),
  ('k1', 'both', 'token'),
  ('k1', 'both', 'sequence'),
  ('k2', 'loss', 'sequence'),
  ('k3', 'both', 'token'),
  ('k3+', 'loss', 'sequence'),
  ('ratio k3', 'loss', 'sequence'),
}


def gap(tree: object, other: object) -> float:
  """Largest absolute difference."""
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


def at_one_state(logits: Array, ref_logits: Array) -> dict[str, dict]:
  """Bias and variance of values; errors against three gradients."""
  ref = jax.nn.log_softmax(ref_logits)
  probs = jax.nn.softmax(logits)
  divergence, reverse = jax.value_and_grad(kl.exact)(logits, ref_logits)
  table = {}
  for name, fn in ESTIMATORS.items():
    values = fn(jax.nn.log_softmax(logits), ref)
    mean = jnp.sum(probs * values)
    gradient = jax.grad(
      lambda z, fn=fn: jnp.sum(probs * fn(jax.nn.log_softmax(z), ref))
    )(logits)
    table[name] = {
      'value': float(mean - divergence),
      'variance': float(jnp.sum(probs * jnp.square(values - mean))),
      'reverse': gap(gradient, reverse),
      'forward': gap(gradient, probs - jnp.exp(ref)),
      'none': gap(gradient, jnp.zeros_like(logits)),
    }
  return table


def by_distance(scales: np.ndarray) -> list[dict]:
  """The table of one state along a line that leaves the reference."""
  ref, step = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)))
  rows = []
  for scale in scales:
    logits = ref + scale * step
    rows.append(
      {
        'scale': float(scale),
        'divergence': float(kl.exact(logits, ref)),
        **at_one_state(logits, ref),
      }
    )
  return rows


def policies() -> tuple[Params, Params]:
  drawn = np.random.default_rng(0).standard_normal((2, 1 + VOCAB, VOCAB))
  return {'logits': jnp.asarray(drawn[0])}, {'logits': jnp.asarray(drawn[1])}


def expected_gradient(loss: Estimator, params: Params) -> Params:
  """E over the policy's sequences of ∇ loss(logprobs, mask)."""
  listed = enumeration(params, length=LENGTH)
  fixed = jnp.exp(jnp.sum(listed.logprobs, axis=1))

  def total(params: Params) -> Array:
    now = enumeration(params, length=LENGTH)
    return jnp.sum(fixed * jnp.sum(loss(now.logprobs, now.mask), axis=1))

  return jax.grad(total)(params)


def sequence_divergence(params: Params, ref: Params) -> Array:
  own, other = (enumeration(p, length=LENGTH).logprobs for p in (params, ref))
  own, other = jnp.sum(own, axis=1), jnp.sum(other, axis=1)
  return jnp.sum(jnp.exp(own) * (own - other))


def as_reward(fn: Estimator, level: str, params: Params, ref: Params) -> Params:
  listed = enumeration(params, length=LENGTH)
  mask = listed.mask
  penalties = fn(listed.logprobs, enumeration(ref, length=LENGTH).logprobs)
  args = (jnp.zeros(len(mask)), penalties, mask)
  if level == 'sequence':
    whole = shaping.kl_penalized(*args, coef=1.0)
    signal = jnp.broadcast_to(whole[:, None], mask.shape)
  else:
    signal = shaping.kl_shaped(*args, coef=1.0)
    if level == 'reward-to-go':
      signal = advantages.discounted_returns(signal, mask)
  return expected_gradient(
    lambda x, mask: losses.reinforce(x, x, signal, mask)[0], params
  )


def as_loss(fn: Estimator, level: str, params: Params, ref: Params) -> Params:
  ref_logprobs = enumeration(ref, length=LENGTH).logprobs

  def loss(logprobs: Array, mask: Array) -> Array:
    del mask  # every sequence has the whole length
    if level == 'token':
      return fn(logprobs, ref_logprobs)
    pair = (logprobs, ref_logprobs)
    return fn(*(jnp.sum(x, axis=1, keepdims=True) for x in pair))

  return expected_gradient(loss, params)


PLACED = (
  ('reward', 'token'), ('reward', 'reward-to-go'), ('reward', 'sequence'),
  ('loss', 'token'), ('loss', 'sequence'),
  ('both', 'token'), ('both', 'sequence'),
)  # fmt: skip
KEYS = [(name, *place) for name in ESTIMATORS for place in PLACED]


def placed(key: tuple[str, str, str], params: Params, ref: Params) -> Params:
  """The gradient of an estimator in its place; 'both' adds the two."""
  name, place, level = key
  fn = ESTIMATORS[name]
  if place == 'reward':
    return as_reward(fn, level, params, ref)
  found = as_loss(fn, level, params, ref)
  if place == 'both':
    more = as_reward(fn, 'sequence', params, ref)
    found = jax.tree.map(jnp.add, found, more)
  return found


def either(study: str, name: str, error: float, right: bool) -> Check:
  if right:
    return Check(study, name, error, 0.0, EXACT)
  return Check(study, name, error, WRONG, None)


def worked_case() -> Iterator[Check]:
  """The reference is the policy reversed: k3 as a loss turns a sign."""
  probs = jnp.asarray([0.4, 0.3, 0.2, 0.1])
  logits, ref = jnp.log(probs), jnp.log(probs[::-1])
  found = jax.grad(
    lambda z: jnp.sum(probs * kl.k3(jax.nn.log_softmax(z), ref))
  )(logits)
  truth = jax.grad(kl.exact)(logits, ref)
  cases = (
    ('k3 as a loss', found, (0.3, 0.1, -0.1, -0.3)),
    ('reverse KL', truth, (0.372, -0.015, -0.172, -0.184)),
  )
  for name, gradient, expected in cases:
    for v, number in enumerate(expected):
      label = f'gradient of {name}, logit {v + 1}'
      yield Check(WORKED, label, float(gradient[v]), number, 6e-4)


def study() -> tuple[list[Check], dict]:
  """All checks, and the figures for the plots."""
  checks = []
  logits, ref = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5)))
  for name, row in at_one_state(logits, ref).items():
    for column in ('value', 'reverse', 'forward', 'none'):
      label = f'{name}: {"bias" if column == "value" else "error to " + column}'
      error, right = abs(row[column]), column in FACTS[name]
      checks.append(either(STATE, label, error, right))
  checks += worked_case()
  params, ref_params = policies()
  truth = jax.grad(sequence_divergence)(params, ref_params)
  table = {key: placed(key, params, ref_params) for key in KEYS}
  for key, found in table.items():
    label, right = ', '.join(key), key in RIGHT_PLACES
    checks.append(either(PLACES, label, gap(found, truth), right))
  per_state = table['k2', 'loss', 'token']['logits']
  for key in (('ratio k3', 'loss', 'token'), ('k1', 'reward', 'token')):
    label = f'{", ".join(key)}: gap to k2, loss, token'
    error = gap(table[key]['logits'], per_state)
    checks.append(either(PLACES, label, error, True))
  last = gap(per_state[1:], truth['logits'][1:])
  checks.append(either(PLACES, 'k2, loss, token: last position', last, True))
  nothing = gap(
    table['k1', 'loss', 'token']['logits'], jnp.zeros_like(per_state)
  )
  checks.append(either(PLACES, 'k1, loss, token: its size', nothing, True))
  rows = by_distance(np.linspace(0.1, 3.0, 30))
  checks += spread(rows)
  return checks, {'by_distance': rows}


def spread(rows: list[dict]) -> Iterator[Check]:
  """k3 varies less than k1 near the reference and more far from it."""
  for row, (low, high) in ((rows[0], ('k3', 'k1')), (rows[-1], ('k1', 'k3'))):
    label = f'variance of {high} over {low} at KL {row["divergence"]:.2g}'
    found = row[high]['variance'] / row[low]['variance']
    yield Check(STATE, label, found, 10.0, None)
