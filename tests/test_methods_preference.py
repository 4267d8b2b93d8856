"""Preference losses: what each has to be at its reference and its optimum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import aggregation, logprobs, losses


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def sequences(policy):
  """Log-probs of all whole sequences."""
  return jnp.sum(tabular.logprobs(policy), axis=1)


def at_margin(loss, margin, **options):
  """Value and gradient by the log-ratio margin of a single pair."""
  zero = jnp.zeros(1)

  def value(m):
    return jnp.sum(loss(m[None], zero, zero, zero, **options)[0])

  return jax.value_and_grad(value)(jnp.asarray(float(margin)))


def at_sides(loss, won, lost, **options):
  """Value and gradients by the two log-ratios of a single pair."""
  zero = jnp.zeros(1)

  def value(a, b):
    return jnp.sum(loss(a[None], b[None], zero, zero, **options)[0])

  sides = (jnp.asarray(float(won)), jnp.asarray(float(lost)))
  return value(*sides), *jax.grad(value, (0, 1))(*sides)


def sigma(x):
  return 1 / (1 + np.exp(-x))


def test_m01_uniform_model_pays_log_v():
  tokens = jnp.asarray([[0, 3, 4, 1]])
  logp = logprobs.token_logprobs(jnp.full((1, 4, 5), 0.7, float), tokens)
  mask = jnp.asarray([[False, True, True, True]])
  values, _ = losses.negative_log_likelihood(logp, mask)
  loss = jnp.sum(aggregation.token_mean(mask) * values)
  np.testing.assert_allclose(loss, np.log(5), rtol=1e-15)


def test_m01_the_least_loss_on_a_markov_source_is_its_entropy_rate():
  """At its true model, where the convex loss has no slope."""
  transition = np.array([[0.5, 0.4, 0.1], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])
  stationary = np.linalg.matrix_power(transition, 200)[0]
  rate = -stationary @ np.sum(transition * np.log(transition), axis=1)
  last, token = map(np.ravel, np.indices((3, 3)))
  chance = jnp.asarray(stationary[last] * transition[last, token])
  mask = jnp.ones((9, 1), bool)

  def loss(table):
    logp = logprobs.token_logprobs(table[last], jnp.asarray(token))
    values, _ = losses.negative_log_likelihood(logp[:, None], mask)
    return chance @ values[:, 0]

  value, slope = jax.value_and_grad(loss)(jnp.log(jnp.asarray(transition)))
  np.testing.assert_allclose(value, rate, rtol=1e-12)
  np.testing.assert_allclose(slope, 0, atol=1e-15)


def test_m02_supervision_is_reinforce_with_reward_one_on_the_data():
  logp = -jnp.asarray(np.random.default_rng(0).random((3, 4))) - 0.1
  mask = jnp.asarray([[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)

  def gradient(values):
    return jax.grad(lambda x: jnp.sum(values(x)))(logp)

  supervised = gradient(lambda x: losses.negative_log_likelihood(x, mask)[0])
  ones = jnp.ones_like(logp)
  reinforced = gradient(lambda x: losses.reinforce(x, logp, ones, mask)[0])
  np.testing.assert_array_equal(supervised, reinforced)
  np.testing.assert_array_equal(supervised[~mask], 0)


def test_m07_gradient_reaches_the_values_alone():
  rows = np.random.default_rng(0).standard_normal((3, 1, 4))
  arrays = [jnp.asarray(row) for row in rows]
  mask = jnp.ones((1, 4), bool)

  def total(v, old, returns):
    return jnp.sum(losses.clipped_squared_error(v, old, returns, mask)[0])

  gradients = jax.grad(total, (0, 1, 2))(*arrays)
  assert np.any(gradients[0] != 0)
  np.testing.assert_array_equal(gradients[1], 0)
  np.testing.assert_array_equal(gradients[2], 0)


def test_m22_gradient_is_the_chance_of_the_wrong_order():
  for margin in (-30.0, -1.0, 0.0, 2.0, 30.0):
    _, gradient = at_margin(losses.dpo, margin, beta=0.3)
    np.testing.assert_allclose(gradient, -0.3 * sigma(-0.3 * margin), rtol=1e-9)


def test_m22_a_pair_of_one_text_has_no_gradient():
  x, ref = jnp.asarray([-3.0]), jnp.asarray([-4.0])
  gradient = jax.grad(lambda x: jnp.sum(losses.dpo(x, x, ref, ref)[0]))(x)
  np.testing.assert_allclose(gradient, 0, atol=1e-16)


def test_m22_smoothing_has_a_finite_optimum_and_is_not_ignored():
  for e in (0.1, 0.3):
    optimum = np.log((1 - e) / e) / 0.1
    value, gradient = at_margin(losses.dpo, optimum, label_smoothing=e)
    np.testing.assert_allclose(gradient, 0, atol=1e-14)
    assert value > at_margin(losses.dpo, optimum)[0]


def test_m22_robust_is_unbiased_under_flipped_labels():
  for e, margin in itertools.product((0.0, 0.1, 0.4), (-3.0, 0.5, 20.0)):
    kept, _ = at_margin(losses.robust_dpo, margin, label_smoothing=e)
    flipped, _ = at_margin(losses.robust_dpo, -margin, label_smoothing=e)
    clean, _ = at_margin(losses.dpo, margin)
    np.testing.assert_allclose((1 - e) * kept + e * flipped, clean, rtol=1e-10)


DIVERGENCES = {
  'reverse_kl': lambda t: t * jnp.log(t),
  'forward_kl': lambda t: -jnp.log(t),
  'jensen_shannon': lambda t: t * jnp.log(t) - (t + 1) * jnp.log((t + 1) / 2),
  'alpha_divergence': lambda t: (t**0.3 - 0.3 * t - 0.7) / (0.3 * -0.7),
}


@pytest.mark.parametrize('divergence', DIVERGENCES)
def test_m22_policy_is_optimal_for_its_implicit_reward(divergence):
  """Of max E_π[r] − β Σ ref f(π / ref), for each f."""
  z = jnp.asarray([0.3, -1.0, 0.8, 0.1])
  ref = jax.nn.log_softmax(jnp.asarray([0.0, 0.5, -0.2, 1.0]))
  options = {'divergence': divergence, 'alpha': 0.3, 'beta': 0.7}
  reward = losses.implicit_reward(jax.nn.log_softmax(z), ref, **options)

  def objective(z):
    logp = jax.nn.log_softmax(z)
    penalty = jnp.sum(
      jnp.exp(ref) * DIVERGENCES[divergence](jnp.exp(logp - ref))
    )
    return jnp.sum(jnp.exp(logp) * reward) - 0.7 * penalty

  np.testing.assert_allclose(jax.grad(objective)(z), 0, atol=1e-14)
  assert np.max(np.abs(jax.grad(objective)(z + jnp.arange(4.0)))) > 1e-2


def test_m22_divergences_meet_at_the_ends_of_alpha():
  u, zero = jnp.linspace(-3.0, 3.0, 7), jnp.zeros(7)

  def reward(divergence, **options):
    return losses.implicit_reward(u, zero, divergence=divergence, **options)

  ends = {'forward_kl': 0.0, 'reverse_kl': 1 - 1e-7}
  for name, alpha in ends.items():
    found = reward('alpha_divergence', alpha=alpha)
    np.testing.assert_allclose(found, reward(name), rtol=1e-5, atol=1e-12)
  for name in DIVERGENCES:
    assert reward(name)[3] == 0
    # A limited exponent and a policy far away: finite, without a gradient.
    value, slope = jax.value_and_grad(
      lambda x, name=name: losses.implicit_reward(
        x[None], jnp.zeros(1), divergence=name
      )[0]
    )(jnp.asarray(-1e3))
    assert np.isfinite(value)
    assert np.isfinite(slope)


def test_m22_length_normalised_sees_averages_alone():
  sums = jnp.asarray([[-6.0], [-2.0], [-5.0], [-3.0]])
  short = [jnp.asarray([3]), jnp.asarray([2])]
  long = [2 * n for n in short]
  for loss in (losses.length_normalized_dpo, losses.length_normalized_ipo):
    doubled = loss(*(2 * sums), *long)[0]
    np.testing.assert_allclose(loss(*sums, *short)[0], doubled, rtol=1e-14)
    one = jnp.ones(1, int)
    plain = losses.dpo if loss is losses.length_normalized_dpo else losses.ipo
    expected = plain(*sums, beta=0.3)[0]
    found = loss(*sums, one, one, beta=0.3)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_m22_aot_pairs_quantiles():
  rng = np.random.default_rng(0)
  arrays = [jnp.asarray(rng.standard_normal(7)) for _ in range(4)]
  gaps, ref_gaps = arrays[0] - arrays[1], arrays[2] - arrays[3]
  margin = 0.1 * (jnp.sort(gaps) - jnp.sort(ref_gaps))
  values, _ = losses.aot(*arrays)
  np.testing.assert_allclose(
    jnp.sort(values), jnp.sort(jax.nn.softplus(-margin)), rtol=1e-13
  )
  first = [a[:1] for a in arrays]
  np.testing.assert_allclose(losses.aot(*first)[0], losses.dpo(*first)[0])
  shuffled = [*arrays[:2], *(a[::-1] for a in arrays[2:])]
  np.testing.assert_allclose(values, losses.aot(*shuffled)[0], rtol=1e-13)


def test_m22_hinge_rests_beyond_its_margin():
  assert at_margin(losses.hinge, 0.0) == (1.0, -0.1)
  for margin in (10.0, 11.0, 1e6):
    assert at_margin(losses.hinge, margin) == (0.0, 0.0)


def test_m22_exo_is_least_at_the_smoothed_label():
  margin = np.log(0.9 / 0.1) / 0.1
  value, gradient = at_margin(losses.exo_pair, margin, label_smoothing=0.1)
  np.testing.assert_allclose([value, gradient], 0, atol=1e-14)
  assert np.isfinite(at_margin(losses.exo_pair, -1e6)[0])


def test_m22_discopop_is_finite_far_from_the_reference():
  value, gradient = at_margin(losses.discopop, -1e5)
  np.testing.assert_allclose([value, gradient], [1e4, -0.1], rtol=1e-9)
  value, gradient = at_margin(losses.discopop, 1e5)
  np.testing.assert_allclose([value, gradient], 0, atol=1e-12)


def test_m22_anchors():
  """Which way each side is pushed at the reference, and the optima."""
  signs = {
    losses.apo_zero: (-1, 1),
    losses.apo_down: (0, 1),
    losses.bco_pair: (-1, 1),
    losses.nca_pair: (-1, 1),
    losses.sppo_hard: (-1, 1),
    losses.dpo: (-1, 1),
  }
  for loss, expected in signs.items():
    _, *gradients = at_sides(loss, 0.0, 0.0)
    np.testing.assert_array_equal(np.sign(gradients), expected)
  # Once the rejected is below, apo_down lowers the chosen too.
  assert at_sides(losses.apo_down, 0.0, -5.0)[1] > 0
  found = at_sides(losses.sppo_hard, 5.0, -5.0)
  np.testing.assert_allclose(found, 0, atol=1e-14)
  for won, lost in ((0.0, 0.0), (3.0, -4.0), (-20.0, 30.0)):
    bound, _, _ = at_sides(losses.bco_pair, won, lost)
    assert bound >= at_sides(losses.dpo, won, lost)[0]


def test_m23_ipo_has_one_optimum_at_its_target():
  for beta in (0.1, 0.5):
    value, gradient = at_margin(losses.ipo, 0.0, beta=beta)
    np.testing.assert_allclose(value, 1 / (4 * beta**2), rtol=1e-14)
    np.testing.assert_allclose(gradient, -1 / beta, rtol=1e-14)
    target = 1 / (2 * beta)
    found = at_margin(losses.ipo, target, beta=beta)
    np.testing.assert_allclose(found, 0, atol=1e-13)
    assert at_margin(losses.ipo, target + 1, beta=beta)[1] > 0
    assert at_margin(losses.dpo, target + 1, beta=beta)[1] < 0


def kto_at(u, desirable, z=0.0, **options):
  def value(u, z):
    good = jnp.asarray([desirable])
    return jnp.sum(losses.kto(u[None], jnp.zeros(1), good, z, **options)[0])

  args = (jnp.asarray(float(u)), jnp.asarray(float(z)))
  return value(*args), *jax.grad(value, (0, 1))(*args)


def test_m24_kto_at_the_reference():
  options = {'beta': 0.2, 'desirable_weight': 1.5, 'undesirable_weight': 0.8}
  good, bad = (kto_at(0.0, d, **options) for d in (True, False))
  np.testing.assert_allclose(good, [0.75, -1.5 * 0.2 / 4, 0], rtol=1e-14)
  np.testing.assert_allclose(bad, [0.4, 0.8 * 0.2 / 4, 0], rtol=1e-14)


def test_m24_swapped_labels_mirror_about_the_reference_point():
  for u in (-4.0, 0.5, 9.0):
    good = kto_at(u, True, z=1.5)
    bad = kto_at(3.0 - u, False, z=1.5)
    np.testing.assert_allclose(good[0], bad[0], rtol=1e-14)
    np.testing.assert_allclose(good[1], -bad[1], rtol=1e-14)


def test_m24_reference_point_is_clamped_constant_and_wants_two():
  logp, ref = jnp.asarray([-1.0, -4.0]), jnp.asarray([-3.0, -3.0])
  assert losses.kto_reference_point(logp, ref) == 0.5
  assert losses.kto_reference_point(ref, logp) == 0
  gradient = jax.grad(losses.kto_reference_point, (0, 1))(logp, ref)
  np.testing.assert_array_equal(gradient, 0)
  with pytest.raises(ValueError, match='1 examples have no mismatched'):
    losses.kto_reference_point(logp[:1], ref[:1])


def orpo_odds(p):
  """Log-odds of one token of log-prob p, and their slope."""
  one = jnp.ones(1, int)

  def odds(p):
    pair = (p[None], jnp.asarray([-1.0]), one, one)
    return losses.orpo(*pair)[1]['chosen_reward'][0]

  def penalty(p):
    values, _ = losses.orpo(p[None], jnp.asarray([-1.0]), one, one, coef=1.0)
    return values[0] + p

  p = jnp.asarray(p, float)
  margin = odds(p) - odds(jnp.asarray(-1.0))
  # d penalty / dp = −σ(−margin) · d odds / dp.
  return odds(p), -jax.grad(penalty)(p) / sigma(-margin)


def test_m25_odds_of_averages():
  for p in (-1e-3, -0.1, -0.6931, -0.6932, -3.0, -20.0):
    odds, slope = orpo_odds(p)
    np.testing.assert_allclose(odds, p - np.log(-np.expm1(p)), atol=1e-14)
    np.testing.assert_allclose(slope, 1 / -np.expm1(p), rtol=1e-9)
  found = [orpo_odds(p)[0] for p in (-9.0, -2.0, -0.7, -0.69, -0.1, -1e-5)]
  assert all(a < b for a, b in itertools.pairwise(found))
  np.testing.assert_allclose(orpo_odds(-30.0)[0], -30.0, atol=1e-12)
  assert np.all(np.isfinite(orpo_odds(0.0)))


def test_m25_equal_averages_pay_log_two():
  sums, lengths = jnp.asarray([-6.0, -2.0]), jnp.asarray([6, 2])
  args = (sums[:1], sums[1:], lengths[:1], lengths[1:])
  values, metrics = losses.orpo(*args)
  np.testing.assert_allclose(metrics['odds_ratio_loss'], np.log(2), rtol=1e-14)
  np.testing.assert_allclose(values, 1 + 0.1 * np.log(2), rtol=1e-14)


def test_m26_equal_averages_pay_for_the_target():
  args = [jnp.asarray([-6.0]), jnp.asarray([-2.0])]
  lengths = [jnp.asarray([6]), jnp.asarray([2])]
  values, _ = losses.simpo(*args, *lengths, beta=2.5, gamma=0.7)
  np.testing.assert_allclose(values, np.log1p(np.exp(0.7)), rtol=1e-14)


def test_m26_every_token_twice_changes_dpo_and_not_simpo():
  won, lost = jnp.asarray([[-0.5, -1.0, -0.1]]), jnp.asarray([[-0.2, -2.0]])

  def both(won, lost):
    sums = [jnp.sum(x, axis=1) for x in (won, lost)]
    lengths = [jnp.asarray([x.shape[1]]) for x in (won, lost)]
    zeros = [jnp.zeros(1)] * 2
    return losses.simpo(*sums, *lengths)[0], losses.dpo(*sums, *zeros)[0]

  simpo, dpo = both(won, lost)
  twice = (jnp.repeat(x, 2, axis=1) for x in (won, lost))
  simpo_twice, dpo_twice = both(*twice)
  np.testing.assert_allclose(simpo_twice, simpo, rtol=1e-14)
  assert abs(dpo_twice - dpo) > 1e-2


def test_m26_cpo_is_dpo_with_a_uniform_reference_and_likelihood():
  args = [jnp.asarray([-6.0]), jnp.asarray([-2.0])]
  uniform = [jnp.full(1, -3.0)] * 2
  plain = losses.dpo(*args, *uniform)[0]
  np.testing.assert_allclose(losses.cpo(*args, nll_coef=None)[0], plain)
  np.testing.assert_allclose(losses.cpo(*args, nll_coef=0.5)[0], plain + 3)


def population_gradient(policy, ref, chance, beta=0.1):
  """Of DPO on all pairs of sequences, each with its probability."""
  won, lost = map(np.ravel, np.indices(chance.shape))

  def loss(policy):
    logp, ref_logp = sequences(policy), sequences(ref)
    args = (logp[won], logp[lost], ref_logp[won], ref_logp[lost])
    return jnp.sum(chance.ravel() * losses.dpo(*args, beta=beta)[0])

  return jax.grad(loss)(policy)


def test_m27_online_gradient_at_the_reference():
  """−β/2 E[∇ log π_w − ∇ log π_l], pairs from the policy, labels by BT."""
  policy, rewards = tabular.random_policy(0), np.asarray(tabular.rewards())
  p = np.asarray(tabular.probabilities(policy))
  chance = np.outer(p, p) * 2 * sigma(rewards[:, None] - rewards[None])
  np.testing.assert_allclose(chance.sum(), 1, rtol=1e-12)
  found = population_gradient(policy, policy, chance)
  tilt = chance.sum(axis=1) - chance.sum(axis=0)
  expected = jax.grad(lambda q: -0.05 * jnp.sum(tilt * sequences(q)))(policy)
  assert tabular.gap(found, expected) < 1e-14


def test_m27_online_and_offline_pairs_share_their_optimum():
  """π* ∝ π_ref e^{r/β}, whoever wrote the pairs that BT labels."""
  ref, rewards, beta = tabular.random_policy(4), tabular.rewards(), 0.5
  best, _ = tabular.tilted(ref, rewards, beta)
  optimum = tabular.of_probabilities(best)
  right = sigma(np.asarray(rewards)[:, None] - np.asarray(rewards)[None])
  offline = np.asarray(tabular.probabilities(tabular.random_policy(5)))
  for p in (np.asarray(best), offline):
    chance = np.outer(p, p) * 2 * right
    rest = population_gradient(optimum, ref, chance, beta=beta)
    moving = population_gradient(ref, ref, chance, beta=beta)
    assert max(float(jnp.max(jnp.abs(g))) for g in rest) < 1e-14
    assert max(float(jnp.max(jnp.abs(g))) for g in moving) > 1e-2


def test_m28_spin_rests_once_the_policy_is_the_data():
  policy, other = tabular.random_policy(0), tabular.random_policy(1)
  logp = sequences(policy)
  values, _ = losses.dpo(logp, logp[::-1], logp, logp[::-1])
  np.testing.assert_allclose(values, np.log(2), rtol=1e-14)
  own, foreign = (np.asarray(tabular.probabilities(p)) for p in (policy, other))
  rest = population_gradient(policy, policy, np.outer(own, own))
  moving = population_gradient(policy, policy, np.outer(foreign, own))
  assert max(float(jnp.max(jnp.abs(g))) for g in rest) < 1e-15
  assert max(float(jnp.max(jnp.abs(g))) for g in moving) > 1e-3


def test_unknown_divergence_names_the_remedy():
  with pytest.raises(Exception, match='divergence'):
    losses.implicit_reward(jnp.zeros(1), jnp.zeros(1), divergence='chi')
