"""What each estimator of KL means, and where its gradient points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import kl, losses

POLICY = (0.4, 0.3, 0.2, 0.1)
ESTIMATORS = {
  'k1': kl.k1,
  'k2': kl.k2,
  'k3': kl.k3,
  'k1+': lambda x, f: kl.straight_through(kl.k1(x, f), kl.k2(x, f)),
  'k3+': lambda x, f: kl.straight_through(kl.k3(x, f), kl.k2(x, f)),
  'ratio k1': lambda x, f: kl.importance_weighted(
    kl.k1(x, f), x, jax.lax.stop_gradient(x)
  ),
  'ratio k3': lambda x, f: kl.importance_weighted(
    kl.k3(x, f), x, jax.lax.stop_gradient(x)
  ),
}


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def state():
  """Logits of the worked example and of the reversed reference."""
  policy = jnp.log(jnp.asarray(POLICY))
  return policy, policy[::-1]


def moments(estimator):
  """Expected value, and expected gradient as a loss, at one state."""
  z, ref_z = state()
  ref = jax.nn.log_softmax(ref_z)
  probs = jax.nn.softmax(z)
  gradient = jax.grad(
    lambda z: jnp.sum(probs * estimator(jax.nn.log_softmax(z), ref))
  )(z)
  value = jnp.sum(probs * estimator(jax.nn.log_softmax(z), ref))
  return value, gradient


def true_gradient():
  z, ref_z = state()
  return jax.grad(lambda z: kl.exact(z, ref_z))(z)


@pytest.mark.parametrize('name', ['k1', 'k3', 'k1+', 'k3+', 'ratio k1'])
def test_m46_m48_values_are_unbiased(name):
  z, ref_z = state()
  value, _ = moments(ESTIMATORS[name])
  np.testing.assert_allclose(value, kl.exact(z, ref_z), rtol=1e-12)


def test_m46_k1_as_a_loss_has_no_signal():
  np.testing.assert_allclose(moments(kl.k1)[1], 0, atol=1e-12)


@pytest.mark.parametrize('name', ['k2', 'k1+', 'k3+', 'ratio k1', 'ratio k3'])
def test_m47_m50_m51_gradient_is_that_of_the_reverse_kl(name):
  _, gradient = moments(ESTIMATORS[name])
  np.testing.assert_allclose(gradient, true_gradient(), atol=1e-12)


def test_m48_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
  z, ref_z = state()
  _, gradient = moments(kl.k3)
  expected = jax.nn.softmax(z) - jax.nn.softmax(ref_z)
  np.testing.assert_allclose(gradient, expected, atol=1e-12)
  np.testing.assert_allclose(gradient, [0.3, 0.1, -0.1, -0.3], atol=1e-12)
  printed = [0.372, -0.015, -0.172, -0.184]
  np.testing.assert_allclose(true_gradient(), printed, atol=1e-3)


def test_m47_k2_tends_to_the_kl_near_the_reference():
  z, _ = state()
  direction = jnp.asarray([1.0, -1.0, 0.5, 0.0])
  gaps = []
  for size in (0.1, 0.01):
    logp, ref = (jax.nn.log_softmax(x) for x in (z, z + size * direction))
    value = jnp.sum(jnp.exp(logp) * kl.k2(logp, ref))
    gaps.append(abs(value / kl.exact(z, z + size * direction) - 1))
  assert gaps[1] < 0.2 * gaps[0] < 0.02


def test_m46_m48_k3_is_nonnegative_and_varies_less_near_the_reference():
  z, _ = state()
  logp = jax.nn.log_softmax(z)
  ref = jax.nn.log_softmax(z + 0.05 * jnp.asarray([1.0, -1.0, 0.5, 0.0]))
  assert np.all(np.asarray(kl.k3(logp, ref)) >= 0)
  assert np.any(np.asarray(kl.k1(logp, ref)) < 0)
  spread = {}
  for fn in (kl.k1, kl.k3):
    values = fn(logp, ref)
    mean = jnp.sum(jnp.exp(logp) * values)
    spread[fn] = jnp.sum(jnp.exp(logp) * jnp.square(values - mean))
  assert spread[kl.k3] < 1e-2 * spread[kl.k1]


def test_m50_identity_per_sample():
  """∇(ρ k3) = ρ · k1 · ∇log π, whatever the old policy."""
  logp = jnp.asarray([-1.0, -2.0, -0.3])
  old = jnp.asarray([-0.7, -2.5, -1.0])
  ref = jnp.asarray([-2.0, -0.5, -0.3])
  gradient = jax.grad(
    lambda x: jnp.sum(kl.importance_weighted(kl.k3(x, ref), x, old))
  )(logp)
  expected = jnp.exp(logp - old) * (logp - ref)
  np.testing.assert_allclose(gradient, expected, rtol=1e-12)


def test_m50_weighted_k3_is_unbiased_off_policy():
  z, ref_z = state()
  logp, ref = jax.nn.log_softmax(z), jax.nn.log_softmax(ref_z)
  old = jax.nn.log_softmax(jnp.asarray([0.0, 1.0, -1.0, 0.5]))
  weighted = kl.importance_weighted(kl.k3(logp, ref), logp, old)
  value = jnp.sum(jnp.exp(old) * weighted)
  np.testing.assert_allclose(value, kl.exact(z, ref_z), rtol=1e-12)


def reward_gradient(penalties, policy):
  """Gradient of the loss when a constant penalty [N] enters the reward."""
  advantages = jnp.broadcast_to(-penalties[:, None], tabular.MASK.shape)

  def loss(logp):
    return losses.reinforce(logp, logp, advantages, tabular.MASK)[0]

  return tabular.expected_gradient(loss, policy)


def placements(policy, ref):
  ref_logp, logp = tabular.logprobs(ref), tabular.logprobs(policy)

  def as_loss(estimator):
    return tabular.expected_gradient(lambda x: estimator(x, ref_logp), policy)

  def as_reward(estimator):
    return reward_gradient(jnp.sum(estimator(logp, ref_logp), axis=1), policy)

  def of_sums(x):
    total = jnp.sum(x - ref_logp, axis=1, keepdims=True)
    return kl.k2(total, jnp.zeros_like(total))

  both = jax.tree.map(jnp.add, as_loss(kl.k3), as_reward(kl.k3))
  return {
    'k1 in the reward': as_reward(kl.k1),
    'k2 of the sum as a loss': tabular.expected_gradient(of_sums, policy),
    'k3 in reward and loss': both,
    'k1 as a loss': as_loss(kl.k1),
    'k2 as a loss': as_loss(kl.k2),
    'ratio k3 as a loss': as_loss(ESTIMATORS['ratio k3']),
    'k3 as a loss': as_loss(kl.k3),
    'k3 in the reward': as_reward(kl.k3),
  }


def test_m49_sequence_level_placements():
  policy, ref = tabular.random_policy(0), tabular.random_policy(1)
  truth = jax.grad(tabular.divergence)(policy, ref)
  found = placements(policy, ref)
  gaps = {name: tabular.gap(found[name], truth) for name in found}
  exact = ('k1 in the reward', 'k2 of the sum as a loss')
  exact += ('k3 in reward and loss',)
  for name, value in gaps.items():
    assert (value < 1e-10) == (name in exact), (name, value)
  # Σ k2 and Σ ρk3 agree, and miss only what a token does to later states.
  same = tabular.gap(found['k2 as a loss'], found['ratio k3 as a loss'])
  assert same < 1e-12
  assert tabular.gap(found['k2 as a loss'][-1], truth[-1]) < 1e-12
  assert tabular.gap(found['k2 as a loss'][0], truth[0]) > 1e-3
  nothing = jax.tree.map(jnp.zeros_like, truth)
  assert tabular.gap(found['k1 as a loss'], nothing) < 1e-12


def test_m51_exact_is_the_expectation_of_k1_at_each_state():
  policy, ref = tabular.random_policy(2), tabular.random_policy(3)
  z, ref_z = tabular.logits(policy), tabular.logits(ref)
  logp, ref_logp = jax.nn.log_softmax(z), jax.nn.log_softmax(ref_z)
  expected = jnp.sum(jnp.exp(logp) * kl.k1(logp, ref_logp), axis=-1)
  np.testing.assert_allclose(kl.exact(z, ref_z), expected, rtol=1e-12)


def test_m51_exact_ignores_candidates_that_the_policy_excludes():
  z = jnp.asarray([1.0, 0.0, -jnp.inf])
  ref_z = jnp.asarray([0.0, 0.0, -jnp.inf])
  value, gradient = jax.value_and_grad(kl.exact)(z, ref_z)
  np.testing.assert_allclose(value, kl.exact(z[:2], ref_z[:2]), rtol=1e-12)
  assert np.all(np.isfinite(gradient))


def test_m74_absolute_has_subgradient_zero_at_the_reference():
  zero = jnp.zeros(3)
  gradient = jax.grad(lambda x: jnp.sum(kl.absolute(x, zero)))(zero)
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('fn', [kl.k1, kl.k2, kl.k3, kl.absolute])
def test_m48_extreme_log_ratios_stay_finite_in_float32(fn):
  x = jnp.asarray([-500.0, 500.0, -21.0, 19.0], jnp.float32)
  values, gradient = jax.value_and_grad(
    lambda x: jnp.sum(fn(x, jnp.zeros_like(x)))
  )(x)
  assert np.isfinite(values)
  np.testing.assert_array_equal(gradient[:3], 0)
  assert gradient[3] != 0
