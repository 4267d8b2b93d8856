"""Divergence from the reference: every estimator in every place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import advantages, kl, losses, shaping


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def weighted_k3(x, ref):
  return kl.importance_weighted(kl.k3(x, ref), x, jax.lax.stop_gradient(x))


def k3_plus(x, ref):
  return kl.straight_through(kl.k3(x, ref), kl.k2(x, ref))


ESTIMATORS = {
  'k1': kl.k1,
  'k2': kl.k2,
  'k3': kl.k3,
  'k3+': k3_plus,
  'ratio k3': weighted_k3,
}


def estimator_table(z, ref_z):
  """Errors of each estimator at one state.

  Of its value, and of its gradient as a loss against the gradients of the
  reverse and of the forward divergence, and against none.
  """
  ref = jax.nn.log_softmax(ref_z)
  probs = jax.lax.stop_gradient(jax.nn.softmax(z))
  reverse = jax.grad(kl.exact)(z, ref_z)
  table = {}
  for name, estimator in ESTIMATORS.items():
    value, gradient = jax.value_and_grad(
      lambda z, fn=estimator: jnp.sum(probs * fn(jax.nn.log_softmax(z), ref))
    )(z)
    table[name] = {
      'value': float(jnp.abs(value - kl.exact(z, ref_z))),
      'reverse': tabular.gap(gradient, reverse),
      'forward': tabular.gap(gradient, probs - jnp.exp(ref)),
      'none': tabular.gap(gradient, jnp.zeros_like(z)),
    }
  return table


def test_m46_to_m51_table_of_estimators():
  rng = np.random.default_rng(0)
  z, ref_z = jnp.asarray(rng.standard_normal((2, 5)))
  exact = {
    'k1': {'value', 'none'},
    'k2': {'reverse'},
    'k3': {'value', 'forward'},
    'k3+': {'value', 'reverse'},
    'ratio k3': {'value', 'reverse'},
  }
  for name, errors in estimator_table(z, ref_z).items():
    assert {k for k, e in errors.items() if e < 1e-12} == exact[name], name


def as_reward(estimator, level, policy, ref):
  """Expected gradient of the loss whose reward holds the estimate."""
  logp, ref_logp = tabular.logprobs(policy), tabular.logprobs(ref)
  penalties = estimator(logp, ref_logp)
  nothing = jnp.zeros(len(logp))
  args = (nothing, penalties, tabular.MASK)
  if level == 'sequence':
    a = shaping.kl_penalized(*args, coef=1.0)[:, None] * jnp.ones_like(logp)
  else:
    a = shaping.kl_shaped(*args, coef=1.0)
    if level == 'reward-to-go':
      a = advantages.discounted_returns(a, tabular.MASK)

  def loss(x):
    return losses.reinforce(x, x, a, tabular.MASK)[0]

  return tabular.expected_gradient(loss, policy)


def as_loss(estimator, level, policy, ref):
  ref_logp = tabular.logprobs(ref)

  def loss(x):
    if level == 'token':
      return estimator(x, ref_logp)
    total, ref_total = (
      jnp.sum(y, axis=1, keepdims=True) for y in (x, ref_logp)
    )
    return estimator(total, ref_total)

  return tabular.expected_gradient(loss, policy)


def placement_table(policy, ref):
  """Gradients by (estimator, placement, level); 'both' adds the two."""
  table = {}
  for name, fn in ESTIMATORS.items():
    for level in ('token', 'reward-to-go', 'sequence'):
      table[name, 'reward', level] = as_reward(fn, level, policy, ref)
    for level in ('token', 'sequence'):
      found = as_loss(fn, level, policy, ref)
      table[name, 'loss', level] = found
      table[name, 'both', level] = jax.tree.map(
        jnp.add, found, table[name, 'reward', 'sequence']
      )
  return table


def test_m49_table_of_placements():
  """Which of them have the gradient of the divergence of sequences."""
  policy, ref = tabular.random_policy(0), tabular.random_policy(1)
  truth = jax.grad(tabular.divergence)(policy, ref)
  table = jax.jit(placement_table)(policy, ref)
  found = {k for k, g in table.items() if tabular.gap(g, truth) < 1e-12}
  assert found == {
    ('k1', 'reward', 'reward-to-go'),
    ('k1', 'reward', 'sequence'),
    ('k1', 'both', 'token'),  # as a loss it adds 0
    ('k1', 'both', 'sequence'),
    ('k2', 'loss', 'sequence'),
    ('k3', 'both', 'token'),
    ('k3+', 'loss', 'sequence'),
    ('ratio k3', 'loss', 'sequence'),
  }
  # Exact for each state, blind for what a token does to later states.
  per_state = table['k2', 'loss', 'token']
  for key in (
    ('ratio k3', 'loss', 'token'),
    ('k3+', 'loss', 'token'),
    ('k1', 'reward', 'token'),
  ):
    assert tabular.gap(table[key], per_state) < 1e-12, key
  assert tabular.gap(per_state[-1], truth[-1]) < 1e-12
  assert tabular.gap(per_state[0], truth[0]) > 1e-3
  # As a loss k1 is wrong by all of the gradient.
  nothing = jax.tree.map(jnp.zeros_like, truth)
  assert tabular.gap(table['k1', 'loss', 'token'], nothing) < 1e-12


def regularized(policy, ref, rewards, beta):
  gain = jnp.sum(tabular.probabilities(policy) * rewards)
  return gain - beta * tabular.divergence(policy, ref)


def test_m13_value_of_any_policy():
  """J(π) = β log Z − β KL(π‖π*)."""
  ref, rewards, beta = tabular.random_policy(1), tabular.rewards(), 0.7
  best, log_z = tabular.tilted(ref, rewards, beta)
  for seed in (2, 3):
    policy = tabular.random_policy(seed)
    probs = tabular.probabilities(policy)
    divergence = jnp.sum(probs * (jnp.log(probs) - jnp.log(best)))
    np.testing.assert_allclose(
      regularized(policy, ref, rewards, beta),
      beta * log_z - beta * divergence,
      rtol=1e-12,
    )


def test_m13_the_optimum_has_the_optimal_value_and_no_slope():
  ref, rewards, beta = tabular.random_policy(1), tabular.rewards(), 0.7
  best, log_z = tabular.tilted(ref, rewards, beta)
  value, slope = jax.value_and_grad(regularized)(
    tabular.of_probabilities(best), ref, rewards, beta
  )
  np.testing.assert_allclose(value, beta * log_z, rtol=1e-12)
  assert tabular.gap(slope, jax.tree.map(jnp.zeros_like, slope)) < 1e-14


def test_m16_a_dear_divergence_keeps_the_policy_at_the_reference():
  """The optimum is as far as the rewards are spread over β."""
  ref, rewards = tabular.random_policy(1), tabular.rewards()
  chance = tabular.probabilities(ref)
  far = [
    beta * jnp.max(jnp.abs(tabular.tilted(ref, rewards, beta)[0] - chance))
    for beta in (1e3, 1e6)
  ]
  centred = rewards - jnp.sum(chance * rewards)
  limit = jnp.max(jnp.abs(chance * centred))
  np.testing.assert_allclose(far, limit, rtol=2e-3)


@functools.partial(jax.jit, static_argnames='placement')
def ascend(ref, rewards, beta, placement):
  """Expected updates with the reward and a divergence in some place."""
  mask = tabular.MASK

  def loss_gradient(policy):
    logp, ref_logp = tabular.logprobs(policy), tabular.logprobs(ref)
    penalties = kl.k3 if placement.startswith('k3 in') else kl.k1
    shaped = rewards
    if 'reward' in placement:
      args = (rewards, penalties(logp, ref_logp), mask)
      shaped = shaping.kl_penalized(*args, coef=beta)
    a = shaped[:, None] * jnp.ones_like(logp)

    def loss(x):
      values = losses.reinforce(x, x, a, mask)[0]
      if 'loss' in placement:
        term = kl.k2 if placement.startswith('k2') else kl.k3
        values = values + beta * term(x, ref_logp)
      return values

    return tabular.expected_gradient(loss, policy)

  def step(policy, _):
    update = loss_gradient(policy)
    return jax.tree.map(lambda p, g: p - 2.0 * g, policy, update), None

  return jax.lax.scan(step, ref, length=2000)[0]


@pytest.mark.parametrize(
  ('placement', 'exact'),
  [
    ('k1 in the reward', True),
    ('k3 in reward and loss', True),
    ('k2 as a loss', False),
    ('k3 as a loss', False),
  ],
)
def test_m13_m49_only_exact_placements_reach_the_optimum(placement, exact):
  ref, rewards, beta = tabular.random_policy(1), tabular.rewards(), 0.7
  policy = ascend(ref, rewards, beta, placement)
  best, log_z = tabular.tilted(ref, rewards, beta)
  missed = beta * log_z - regularized(policy, ref, rewards, beta)
  assert float(missed) > -1e-12
  if exact:
    np.testing.assert_allclose(tabular.probabilities(policy), best, atol=1e-6)
    assert missed < 1e-10
  else:
    assert tabular.gap(tabular.probabilities(policy), best) > 1e-2


def test_m14_shaped_rewards_sum_to_reward_less_penalty():
  mask = jnp.asarray([[False, True, True, False, True, False]] * 2)
  rewards = jnp.asarray([2.0, -1.0])
  penalties = jnp.arange(12.0).reshape(2, 6)
  found = shaping.kl_shaped(rewards, penalties, mask, coef=0.1)
  np.testing.assert_allclose(
    jnp.sum(found, axis=1),
    shaping.kl_penalized(rewards, penalties, mask, coef=0.1),
  )
  np.testing.assert_allclose(found[0], [0, -0.1, -0.2, 0, 1.6, 0])


def test_m14_m16_reward_is_kept_where_reference_and_policy_agree():
  mask = jnp.asarray([[True, True, False]])
  zero = jnp.zeros((1, 3))
  found = shaping.kl_shaped(jnp.ones(1), kl.k1(zero, zero, mask), mask)
  np.testing.assert_array_equal(found, [[0, 1, 0]])


def test_m14_edge_cases():
  mask = jnp.asarray([[True, True], [False, False], [True, False]])
  rewards, zero = jnp.asarray([1.0, 1.0, 1.0]), jnp.zeros((3, 2))
  truncated = jnp.asarray([True, True, False])
  found = shaping.kl_shaped(
    rewards, zero, mask, truncated, missing_eos_penalty=3.0
  )
  np.testing.assert_array_equal(found, [[0, -2], [0, 0], [1, 0]])
  with pytest.raises(Exception, match='truncated'):
    shaping.kl_shaped(rewards, zero, mask, missing_eos_penalty=3.0)


def test_m14_expected_gradient_is_that_of_the_regularised_objective():
  """GAE with γ = λ = 1 and any value of the prompt as baseline."""
  policy, ref = tabular.random_policy(2), tabular.random_policy(3)
  rewards, beta = tabular.rewards(), 0.3
  logp, mask = tabular.logprobs(policy), tabular.MASK
  penalties = kl.k1(logp, tabular.logprobs(ref), mask)
  shaped = shaping.kl_shaped(rewards, penalties, mask, coef=beta)
  values = jnp.full_like(logp, 0.4)
  a = advantages.gae(shaped, values, mask, lambda_=1.0)

  def loss(x):
    return losses.reinforce(x, x, a, mask)[0]

  found = tabular.expected_gradient(loss, policy)
  truth = jax.grad(regularized)(policy, ref, rewards, beta)
  assert tabular.gap(found, jax.tree.map(jnp.negative, truth)) < 1e-12


def test_m15_fixed_point_monotone_and_bounded():
  beta = jnp.full(5, 0.2)
  measured = jnp.asarray([-3.0, 5.0, 6.0, 7.0, 600.0])
  found = np.asarray(kl.adaptive_coef(beta, measured, num_sequences=500))
  assert found[2] == 0.2
  assert np.all(np.diff(found) > 0)
  bound = 0.2 * 500 / 10_000
  ends = 0.2 * (1 + np.array([-bound, bound]))
  np.testing.assert_allclose(found[[0, -1]], ends)
  np.testing.assert_array_equal(kl.fixed_coef(beta, measured), beta)


def test_m15_a_step_that_could_change_the_sign_is_refused():
  with pytest.raises(Exception, match='horizon'):
    kl.adaptive_coef(
      jnp.ones(1), jnp.ones(1), num_sequences=60_000, horizon=10_000
    )


def test_m47_m48_values_are_positive_but_at_the_reference():
  d = jnp.linspace(-19, 19, 77)
  for fn in (kl.k2, kl.k3):
    values = np.asarray(fn(d, jnp.zeros_like(d)))
    assert np.all(values[np.asarray(d) != 0] > 0)
    assert fn(jnp.zeros(1), jnp.zeros(1)) == 0


def test_m48_k3_varies_more_far_from_the_reference():
  """Where the reference has mass and the policy little."""
  probs = jnp.asarray([1 - 1e-3, 1e-3])
  logp, ref = jnp.log(probs), jnp.log(probs[::-1])
  spread = {}
  for fn in (kl.k1, kl.k3):
    values = fn(logp, ref)
    mean = jnp.sum(probs * values)
    spread[fn] = jnp.sum(probs * jnp.square(values - mean))
  assert spread[kl.k3] > 10 * spread[kl.k1]


def test_m50_off_policy_k3_wants_the_slope_of_the_ratio_and_k2_does_not():
  """E over another policy of the gradients, at one state."""
  z, ref_z, old_z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
  ref, old = (jax.nn.log_softmax(x) for x in (ref_z, old_z))
  stop = jax.lax.stop_gradient

  def expected(estimator, *, stopped):
    def loss(z):
      logp = jax.nn.log_softmax(z)
      own = stop(logp) if stopped else logp
      weighted = kl.importance_weighted(estimator(logp, ref), own, old)
      return jnp.sum(jnp.exp(old) * weighted)

    return jax.grad(loss)(z)

  truth = jax.grad(kl.exact)(z, ref_z)
  forward = jax.nn.softmax(z) - jnp.exp(ref)
  np.testing.assert_allclose(expected(kl.k3, stopped=False), truth, atol=1e-14)
  np.testing.assert_allclose(expected(kl.k2, stopped=True), truth, atol=1e-14)
  np.testing.assert_allclose(expected(kl.k3, stopped=True), forward, atol=1e-14)
  assert tabular.gap(expected(kl.k2, stopped=False), truth) > 1e-2


def test_m51_straight_through_has_the_value_of_one_and_gradient_of_another():
  logp, ref = jnp.asarray([-1.0, -2.0]), jnp.asarray([-1.5, -0.4])
  value, gradient = jax.value_and_grad(lambda x: jnp.sum(k3_plus(x, ref)))(logp)
  np.testing.assert_allclose(value, jnp.sum(kl.k3(logp, ref)), rtol=1e-15)
  np.testing.assert_allclose(gradient, logp - ref, rtol=1e-15)
