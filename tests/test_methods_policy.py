"""What the methods promise of policy losses, masks and corrections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import (
  advantages,
  aggregation,
  importance,
  losses,
  masks,
)

# Those that hold the value of a whole sequence at each of its tokens.
OF_SEQUENCES = ('mirror_descent', 'sequence_clip')
OPTIONS = {'dro': {'kl_coef': 0.3}, 'mirror_descent': {'kl_coef': 0.3}}
POLICY_LOSSES = (
  'cispo',
  'dppo',
  'dro',
  'geometric_mean',
  'gspo',
  'gspo_token',
  'kl_cov',
  'minirl',
  'ppo_clip',
  'reinforce',
  'sapo',
  'vespo',
  *OF_SEQUENCES,
)
every_loss = pytest.mark.parametrize('name', POLICY_LOSSES)


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def row(*numbers):
  return jnp.asarray([numbers], float)


def called(name, logp, old, a, mask, **options):
  """Any policy loss; what it asks for beside the four is old or everything."""
  options = OPTIONS.get(name, {}) | options
  fn = getattr(losses, name)
  if name == 'minirl':
    return fn(logp, old, old, a, mask, **options)
  if name == 'kl_cov':
    return fn(logp, old, a, mask, mask, **options)
  return fn(logp, old, a, mask, **options)


def gradient(name, logp, old, a, mask, weights=1.0, **options):
  def total(x):
    return jnp.sum(weights * called(name, x, old, a, mask, **options)[0])

  return jax.grad(total)(logp)


def drawn(seed=0, rows=4, length=5, spread=0.3):
  rng = np.random.default_rng(seed)
  old = jnp.asarray(-rng.random((rows, length)) - 0.1)
  logp = old + spread * jnp.asarray(rng.standard_normal(old.shape))
  a = jnp.asarray(rng.standard_normal(old.shape))
  lengths = jnp.asarray(rng.integers(1, length + 1, (rows, 1)))
  return logp, old, a, jnp.arange(length)[None, :] < lengths


def test_every_policy_loss_is_tested_here():
  found = set(losses.policy.__all__)
  found |= {*losses.trust_region.__all__, *losses.soft_clip.__all__}
  assert found == set(POLICY_LOSSES)


@every_loss
def test_m04_on_policy_gradient_is_the_policy_gradient(name):
  policy, rewards = tabular.random_policy(0), tabular.rewards()
  old = tabular.logprobs(policy)
  a = jnp.broadcast_to(rewards[:, None], old.shape)
  share = 1 / tabular.LENGTH if name in OF_SEQUENCES else 1.0
  found = tabular.expected_gradient(
    lambda x: share * called(name, x, old, a, tabular.MASK)[0], policy
  )
  truth = jax.grad(lambda p: -jnp.sum(tabular.probabilities(p) * rewards))
  assert tabular.gap(found, truth(policy)) < 1e-10


@every_loss
@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_extreme_log_ratios_stay_finite(name, sign):
  with jax.enable_x64(False):
    logp = jnp.asarray([[-1e4, -1.0, -1e-9, 0.0, -jnp.inf, -2.0]])
    old = jnp.asarray([[-1.0, -1e4, -1e4, -1e4, -1.0, -jnp.inf]])
    mask = jnp.asarray([[True, True, True, True, False, False]])
    a = jnp.full_like(logp, sign)
    for shown in (mask, mask & (logp < -0.5), mask & (logp > -0.5), logp < -9):
      shown = shown & mask
      values, metrics = called(name, logp, old, a, shown)
      slope = gradient(name, logp, old, a, shown)
      for leaf in jax.tree.leaves((values, metrics, slope)):
        assert np.all(np.isfinite(leaf))
      np.testing.assert_array_equal(slope[:, 4:], 0)


@every_loss
def test_m08_only_the_current_policy_has_a_gradient(name):
  logp, old, a, mask = drawn()
  for i in (1, 2):
    args = [logp, old, a, mask]

    def total(x, i=i, args=args):
      return jnp.sum(called(name, *args[:i], x, *args[i + 1 :])[0])

    np.testing.assert_array_equal(jax.grad(total)(args[i]), 0)


def test_m08_two_sided_clip_is_a_dual_clip_above_the_upper_bound():
  logp, old, a, mask = drawn(rows=20, spread=1.5)
  delta, high = 1.6, 0.28

  def two_sided(x):
    ratios = importance.ratio(x, old, mask)
    first = jnp.minimum(ratios, delta) * a
    surrogate = jnp.minimum(first, jnp.clip(ratios, 0.8, 1 + high) * a)
    return jnp.sum(jnp.where(mask, -surrogate, 0))

  found = gradient(
    'ppo_clip', logp, old, a, mask, clip_high=high, dual_clip=delta
  )
  np.testing.assert_allclose(found, jax.grad(two_sided)(logp), rtol=1e-12)
  beyond = mask & (a < 0) & (importance.ratio(logp, old, mask) > delta)
  assert np.any(beyond)
  assert np.all(np.asarray(found)[beyond] == 0)


def test_m30_on_policy_gradient_weighs_each_response_by_its_length():
  _, old, a, mask = drawn()
  a = a[:, :1] * jnp.ones_like(a)
  weights = aggregation.sequence_mean(mask)
  found = gradient('ppo_clip', old, old, a, mask, weights)
  lengths = np.sum(mask, axis=1, keepdims=True).astype(float)
  expected = np.where(mask, -np.asarray(a) / lengths / len(a), 0)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_m35_equal_lengths_make_grpo_a_multiple_of_dr_grpo():
  """Unit deviation, lengths L, constant C: gradients differ by C / L."""
  rewards, length, constant = jnp.asarray([[2.0, 0.0, 0.0, 2.0]]), 5, 32
  _, old, _, _ = drawn()
  mask = jnp.ones(old.shape, bool)

  def found(advantage, weights):
    a = advantage(rewards).T * jnp.ones_like(old)
    return gradient('ppo_clip', old, old, a, mask, weights)

  grpo = found(
    lambda r: advantages.group_normalized(r, eps=0.0),
    aggregation.sequence_mean(mask),
  )
  dr_grpo = found(
    advantages.group_centered,
    aggregation.constant_length(mask, length=constant),
  )
  np.testing.assert_allclose(grpo, constant / length * dr_grpo, rtol=1e-12)


def test_m37_the_lower_side_does_not_see_the_upper_bound():
  logp, old, a, mask = drawn(rows=60, spread=0.5)
  plain, higher = (
    gradient('ppo_clip', logp, old, a, mask, clip_high=h) for h in (0.2, 0.28)
  )
  down = np.asarray(a < 0)
  np.testing.assert_array_equal(np.asarray(plain)[down], higher[down])
  ratios = np.asarray(importance.ratio(logp, old, mask))
  revived = np.asarray(mask & (a > 0)) & (ratios > 1.2) & (ratios <= 1.28)
  changed = np.asarray(plain != higher)
  np.testing.assert_array_equal(changed, revived)
  assert np.any(changed)


@pytest.mark.parametrize('name', ['gspo', 'gspo_token', 'geometric_mean'])
def test_m42_at_the_old_policy_gspo_is_grpo(name):
  _, old, a, mask = drawn()
  a = a[:, :1] * jnp.ones_like(a)
  weights = aggregation.sequence_mean(mask)
  found = gradient(name, old, old, a, mask, weights)
  grpo = gradient('ppo_clip', old, old, a, mask, weights)
  np.testing.assert_allclose(found, grpo, atol=1e-15)


def test_m42_the_product_of_ratios_is_a_weight_and_their_mean_is_not():
  old, new = (tabular.logprobs(tabular.random_policy(s)) for s in (0, 1))
  f, chance = tabular.rewards(), jnp.exp(jnp.sum(old, axis=1))
  truth = jnp.sum(jnp.exp(jnp.sum(new, axis=1)) * f)
  weight = importance.product_ratio(new, old, tabular.MASK)
  np.testing.assert_allclose(jnp.sum(chance * weight * f), truth, rtol=1e-12)
  mean = importance.sequence_ratio(new, old, tabular.MASK)
  assert abs(jnp.sum(chance * mean * f) - truth) > 1e-2


def test_m43_a_cap_is_an_offset_plus_one():
  logp, old, a, mask = drawn(spread=1.5)
  args = (logp, old, a, mask)
  cap, offset = (
    losses.cispo(*args, **bound) for bound in ({'cap': 1.5}, {'clip_high': 0.5})
  )
  jax.tree.map(np.testing.assert_array_equal, cap, offset)
  assert np.any(cap[1]['clip_high'])


def test_m43_gradient_is_the_bounded_ratio_and_that_of_ppo_inside():
  logp, old, a, mask = drawn(spread=0.6)
  found = gradient('cispo', logp, old, a, mask, clip_low=0.2, clip_high=0.2)
  ratios = importance.ratio(logp, old, mask)
  expected = jnp.where(mask, -jnp.clip(ratios, 0.8, 1.2) * a, 0)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  inside = np.asarray(jnp.abs(ratios - 1) <= 0.2)
  ppo = gradient('ppo_clip', logp, old, a, mask)
  np.testing.assert_allclose(found[inside], ppo[inside], rtol=1e-12)
  assert 0 < inside.sum() < inside.size


def test_m43_the_value_follows_the_level_of_the_logprobs():
  """Where all are less likely alike: another value, the same gradient."""
  logp, old, a, mask = drawn()
  values = [
    jnp.sum(losses.cispo(logp - level, old - level, a, mask)[0])
    for level in (0.0, 5.0)
  ]
  assert abs(values[0] - values[1]) > 1
  slopes = [
    gradient('cispo', logp - level, old - level, a, mask)
    for level in (0.0, 5.0)
  ]
  np.testing.assert_allclose(*slopes, rtol=1e-12)


def test_m45_minirl_is_ppo_where_sampler_and_learner_agree():
  """Also outside of the band: the mask is the table of zero gradients."""
  logp, old, a, mask = drawn(spread=0.8)
  bounds = {'clip_low': 0.2, 'clip_high': 0.27}
  weights = aggregation.sequence_sum(mask)
  args = (logp, old, a, mask, weights)
  found = gradient('minirl', *args, **bounds, cap=jnp.inf)
  expected = gradient('ppo_clip', *args, **bounds)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert np.any(np.asarray(found)[mask] == 0)
  assert np.any(found != 0)


def test_m45_the_mask_sees_the_learner_and_the_weight_the_sampler():
  logp, old, a = row(0.0, 0.0, 0.0), row(0.0, -0.3, 0.3), row(1.0, 1.0, -1.0)
  sampler = jnp.log(row(0.5, 0.5, 0.1))
  mask = jnp.ones_like(a, bool)

  def total(x, sampler):
    return jnp.sum(losses.minirl(x, old, sampler, a, mask)[0])

  found = jax.grad(total)(logp, sampler)
  np.testing.assert_allclose(found, row(-2, 0, 0), rtol=1e-12)
  np.testing.assert_array_equal(jax.grad(total, 1)(logp, sampler), 0)
  far = jax.grad(total)(logp, jnp.full_like(logp, -9.0))
  np.testing.assert_allclose(far, row(-5, 0, 0), rtol=1e-12)


def test_m74_nothing_selected_is_the_plain_surrogate():
  logp, old, a, mask = drawn(spread=1.0)
  none = masks.top_covariance(logp, a, mask, fraction=0.0)
  values, _ = losses.kl_cov(logp, old, a, mask, none)
  ratios = importance.ratio(logp, old, mask)
  np.testing.assert_allclose(values, jnp.where(mask, -ratios * a, 0))


def test_m74_only_the_selected_are_penalised():
  logp, old, a, mask = drawn(spread=1.0)
  selected = masks.top_covariance(logp, a, mask, fraction=0.3)

  def slope(x, coef):
    return jax.grad(
      lambda x: jnp.sum(
        losses.kl_cov(x, old, a, mask, selected, kl_coef=coef)[0]
      )
    )(x)

  extra = slope(logp, 0.5) - slope(logp, 0.0)
  expected = jnp.where(selected, 0.5 * jnp.sign(logp - old), 0)
  np.testing.assert_allclose(extra, expected, atol=1e-12)
  np.testing.assert_array_equal(slope(old, 0.5), slope(old, 0.0))


def test_m85_the_surrogate_is_the_squared_error_over_twice_tau():
  logp, old, _, mask = drawn()
  tau, weights = 0.4, aggregation.sequence_mean(mask)
  rewards = jnp.asarray([1.0, 0.0, 0.0, 1.0])
  centered = (rewards - jnp.mean(rewards))[:, None]

  def error(x):
    delta = jnp.sum(jnp.where(mask, x - old, 0), axis=1)
    return jnp.mean(jnp.square(centered[:, 0] - tau * delta))

  a = centered * jnp.ones_like(logp)
  found = gradient('mirror_descent', logp, old, a, mask, weights, kl_coef=tau)
  expected = jax.grad(error)(logp) / (2 * tau)
  np.testing.assert_allclose(found, expected, atol=1e-15)
  start = gradient('mirror_descent', old, old, a, mask, weights, kl_coef=tau)
  plain = aggregation.sequence_sum(mask)
  expected = gradient('reinforce', old, old, a, mask, plain)
  np.testing.assert_allclose(start, expected, atol=1e-15)


def test_m85_the_minimiser_is_the_tilted_policy():
  tau, rewards = 0.5, tabular.rewards()
  old = jnp.sum(tabular.logprobs(tabular.random_policy(0)), axis=1)
  log_z = jax.nn.logsumexp(old + rewards / tau)
  a = (rewards - tau * log_z)[:, None]
  mask = jnp.ones(a.shape, bool)
  optimum = (old + rewards / tau - log_z)[:, None]
  old = old[:, None]
  slope = gradient('mirror_descent', optimum, old, a, mask, kl_coef=tau)
  np.testing.assert_allclose(slope, 0, atol=1e-12)
  assert np.max(np.abs(gradient('dro', old, old, a, mask))) > 1e-2


def test_m85_the_mean_reward_is_the_limit_of_a_large_tau():
  rewards = tabular.rewards()
  gaps = []
  for tau in (1e2, 1e3):
    soft = tau * (jax.nn.logsumexp(rewards / tau) - np.log(len(rewards)))
    gaps.append(abs(soft - jnp.mean(rewards)))
  np.testing.assert_allclose(gaps[0] / gaps[1], 10, rtol=0.1)


def test_dppo_measures_probability_and_not_its_ratio():
  """Twice as likely is nothing for a rare token and much for a common one."""
  old = jnp.log(row(0.001, 0.4))
  mask, a = jnp.ones(old.shape, bool), jnp.ones_like(old)
  for options in ({}, {'divergence': 'kl', 'clip_high': 0.05}):
    found = gradient('dppo', old + np.log(2), old, a, mask, **options)
    np.testing.assert_allclose(found, row(-2, 0), rtol=1e-12)
    back = gradient('dppo', old + np.log(2), old, -a, mask, **options)
    np.testing.assert_allclose(back, row(2, 2), rtol=1e-12)
  np.testing.assert_array_equal(
    gradient('ppo_clip', old + np.log(2), old, a, mask), 0
  )


def test_soft_gates_are_open_on_policy_and_close_on_both_sides():
  ratios = np.array([0.01, 0.5, 1.0, 2.0, 20.0])
  old = jnp.zeros((5, 1))
  mask = jnp.ones(old.shape, bool)
  for sign in (1.0, -1.0):
    for name in ('sapo', 'vespo'):
      logp = jnp.log(jnp.asarray(ratios))[:, None]
      found = -sign * gradient(name, logp, old, sign * jnp.ones((5, 1)), mask)
      np.testing.assert_allclose(found[2], 1, rtol=1e-12)
      assert np.all(found >= 0)
      assert found[0] < 0.05
      assert found[4] < 1e-5
