"""Reward models: of pairs, rankings, outcomes and steps."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import losses


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def sigma(x):
  return 1 / (1 + np.exp(-x))


def row(*numbers):
  return jnp.asarray([numbers], float)


def test_m10_bradley_terry_sees_differences_alone():
  chosen, rejected = jnp.asarray([1.0, -2.0, 0.3]), jnp.asarray([1.0, 1.0, 5.0])
  shift = jnp.asarray([3.0, -7.0, 0.1])

  def total(a, b):
    return jnp.sum(losses.bradley_terry(a, b)[0])

  both = jax.value_and_grad(total, (0, 1))
  value, gradients = both(chosen, rejected)
  moved, same = both(chosen + shift, rejected + shift)
  np.testing.assert_allclose(value, moved, rtol=1e-13)
  for a, b in zip(gradients, same, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12)
  d = np.asarray(chosen - rejected)
  np.testing.assert_allclose(gradients[0], -sigma(-d), rtol=1e-12)
  np.testing.assert_allclose(gradients[0], -gradients[1], rtol=1e-13)
  tie = losses.bradley_terry(chosen, chosen)[0]
  np.testing.assert_allclose(tie, np.log(2), rtol=1e-15)


def test_m10_identical_texts_pay_log_two_and_teach_nothing():
  """One text has one score: the two gradients of its parameters cancel."""
  features = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)))

  def loss(w):
    scores = features @ w
    return jnp.sum(losses.bradley_terry(scores, scores)[0])

  value, gradient = jax.value_and_grad(loss)(jnp.arange(4.0))
  np.testing.assert_allclose(value, 3 * np.log(2), rtol=1e-15)
  np.testing.assert_array_equal(gradient, 0)


def test_m10_a_tie_is_the_average_of_both_orders():
  a, b = jnp.asarray([1.0, -2.0]), jnp.asarray([-0.5, 4.0])
  orders = [losses.bradley_terry(*pair)[0] for pair in ((a, b), (b, a))]
  tie, _ = losses.soft_preference(a, b, jnp.full(2, 0.5, float))
  np.testing.assert_allclose(tie, sum(orders) / 2, rtol=1e-13)


def test_m10_labels_of_an_oracle_recover_its_reward_up_to_a_shift():
  """One shift for each prompt, and no other minimiser: the loss is convex."""
  truth = jnp.asarray([[0.5, -1.0, 2.0, 0.1], [0.0, 0.7, -3.0, 1.0]])
  won, lost = map(np.ravel, np.indices((4, 4)))
  chance = jax.nn.sigmoid(truth[:, won] - truth[:, lost])

  def loss(scores):
    pairs = (jnp.ravel(scores[:, i]) for i in (won, lost))
    return jnp.sum(jnp.ravel(chance) * losses.bradley_terry(*pairs)[0])

  for shifts in ([0.0, 0.0], [3.0, -7.0]):
    gradient = jax.grad(loss)(truth + jnp.asarray(shifts)[:, None])
    np.testing.assert_allclose(gradient, 0, atol=1e-14)
  hessian = jax.jit(jax.hessian(loss))(truth)
  curvature = np.linalg.eigvalsh(hessian.reshape(8, 8))
  np.testing.assert_allclose(curvature[:2], 0, atol=1e-14)  # the shifts
  assert curvature[2] > 1e-2


def test_m10_margins_and_centering():
  a, b = jnp.asarray([1.0]), jnp.asarray([-2.0])
  values, metrics = losses.bradley_terry(a, b, jnp.asarray([3.0]))
  np.testing.assert_allclose(values, np.log(2), rtol=1e-15)
  np.testing.assert_array_equal(metrics['margin'], [3.0])
  np.testing.assert_array_equal(losses.score_centering(a, b)[0], [1.0])
  np.testing.assert_array_equal(losses.score_centering(a, -a)[0], [0.0])


def test_m11_padding_does_not_change_the_score():
  scores = row(0.1, 0.2, 0.3)
  mask = jnp.asarray([[True, True, False]])
  assert losses.last_score(scores, mask) == 0.2
  padded = jnp.pad(scores, ((0, 0), (0, 4)), constant_values=jnp.nan)
  wide = jnp.pad(mask, ((0, 0), (0, 4)))
  assert losses.last_score(padded, wide) == 0.2
  left = jnp.pad(mask, ((0, 0), (4, 0)))
  assert losses.last_score(jnp.pad(scores, ((0, 0), (4, 0))), left) == 0.2
  assert losses.last_score(padded, jnp.zeros_like(wide)) == 0


RANKINGS = (losses.ranked_pairs, losses.plackett_luce)


@pytest.mark.parametrize('loss', RANKINGS)
def test_m12_two_responses_are_a_pair(loss):
  for ranks, order in (([0, 1], (0, 1)), ([7, 2], (1, 0))):
    scores = row(0.3, 1.1)
    values, _ = loss(scores, jnp.asarray([ranks]))
    pair, _ = losses.bradley_terry(*(scores[:, i] for i in order))
    np.testing.assert_allclose(values, pair, rtol=1e-14)


@pytest.mark.parametrize('loss', RANKINGS)
def test_m12_order_of_responses_does_not_matter(loss):
  scores, ranks = row(0.3, 1.1, -0.4, 2.0), jnp.asarray([[2, 0, 3, 1]])
  order = jnp.asarray([2, 0, 3, 1])

  def run(scores, ranks):
    return jax.value_and_grad(lambda s: jnp.sum(loss(s, ranks)[0]))(scores)

  value, gradient = run(scores, ranks)
  permuted = run(scores[:, order], ranks[:, order])
  np.testing.assert_allclose(value, permuted[0], rtol=1e-14)
  np.testing.assert_allclose(gradient[:, order], permuted[1], atol=1e-15)


def test_m12_a_prompt_weighs_one_whatever_its_responses():
  for k in (2, 4, 9):
    values, _ = losses.ranked_pairs(jnp.zeros((1, k)), jnp.arange(k)[None])
    np.testing.assert_allclose(values, np.log(2), rtol=1e-14)
  ties, _ = losses.ranked_pairs(row(1.0, 2.0, 3.0), jnp.zeros((1, 3), int))
  np.testing.assert_array_equal(ties, 0)


def test_m12_the_matrix_of_differences_is_a_loop_over_pairs():
  """Of each prompt the mean over its pairs; ties are none."""
  scores, ranks = [0.3, 1.1, -0.4, 2.0, 0.9], [2, 0, 3, 0, 1]
  pairs = [
    losses.bradley_terry(row(scores[i])[0], row(scores[j])[0])[0]
    for i, j in itertools.permutations(range(5), 2)
    if ranks[i] < ranks[j]
  ]
  assert len(pairs) == math.comb(5, 2) - 1
  found, _ = losses.ranked_pairs(row(*scores), jnp.asarray([ranks]))
  np.testing.assert_allclose(found, np.mean(pairs), rtol=1e-13)


def test_m12_plackett_luce_is_a_distribution_over_rankings():
  scores = row(0.3, 1.1, -0.4, 2.0)
  rankings = [jnp.asarray([r]) for r in itertools.permutations(range(4))]
  chances = [np.exp(-losses.plackett_luce(scores, r)[0]) for r in rankings]
  np.testing.assert_allclose(np.sum(chances), 1, rtol=1e-13)
  equal, _ = losses.plackett_luce(jnp.zeros((1, 4)), rankings[5])
  np.testing.assert_allclose(equal, np.log(math.factorial(4)), rtol=1e-14)


def test_m19_soft_labels_are_matched():
  d = jnp.asarray([-2.0, 0.0, 0.4, 3.0])
  p = jax.nn.sigmoid(d)

  def loss(scores):
    return jnp.sum(losses.soft_preference(scores, jnp.zeros(4), p)[0])

  np.testing.assert_allclose(jax.grad(loss)(d), 0, atol=1e-15)
  assert loss(d) < loss(d + 0.1)
  assert loss(d) < loss(d - 0.1)
  hard, _ = losses.soft_preference(d, jnp.zeros(4), jnp.ones(4))
  pair, _ = losses.bradley_terry(d, jnp.zeros(4))
  np.testing.assert_allclose(hard, pair, rtol=1e-13)


def test_m19_both_orders_cancel_a_taste_for_a_position():
  d = jnp.asarray([-1.0, 0.3, 2.0])

  def error(bias):
    forward, backward = (jax.nn.sigmoid(d + s * bias) for s in (1, -1))
    return losses.swap_averaged(forward, backward) - jax.nn.sigmoid(d)

  small, large = (np.max(np.abs(error(b))) for b in (1e-3, 1e-2))
  assert small < 1e-6
  np.testing.assert_allclose(large / small, 100, rtol=1e-2)
  one_sided = jax.nn.sigmoid(d + 1e-3) - jax.nn.sigmoid(d)
  assert np.max(np.abs(one_sided)) > 100 * small


def test_m60_outcome_model_is_calibrated_at_its_optimum():
  """On every prefix of the tabular policy, and at the end."""
  policy, right = tabular.random_policy(0), np.asarray(tabular.rewards()) > 0
  p = np.asarray(tabular.probabilities(policy)).reshape(3, 3)
  chance = (p * right.reshape(3, 3)).sum(1) / p.sum(1)
  value = jnp.asarray(np.log(chance / (1 - chance)))
  first, labels = tabular.SEQUENCES[:, 0], jnp.asarray(right, float)

  def loss(value):
    return jnp.sum(
      p.ravel() * losses.outcome_correctness(value[first], labels)[0]
    )

  def token_loss(value):
    scores = jnp.stack([value[first], jnp.zeros(9)], axis=1)
    repeated = jnp.broadcast_to(labels[:, None], (9, 2))
    mask = jnp.asarray([[True, False]] * 9)
    values, _ = losses.step_correctness(scores, repeated, mask)
    return jnp.sum(p.ravel() * jnp.sum(values, axis=1))

  inside = (chance > 0) & (chance < 1)
  assert np.any(inside)
  for objective in (loss, token_loss):
    gradient = jax.grad(objective)(jnp.where(inside, value, 0))
    np.testing.assert_allclose(gradient[inside], 0, atol=1e-15)


def test_m61_soft_labels_tend_to_the_chance_of_success():
  policy, right = tabular.random_policy(0), np.asarray(tabular.rewards()) > 0
  p = np.asarray(tabular.probabilities(policy)).reshape(3, 3)
  after = p / p.sum(1, keepdims=True)
  chance = (after * right.reshape(3, 3)).sum(1)
  draws, count = np.random.default_rng(0), 20_000
  ends = [draws.choice(3, size=count, p=after[a]) for a in range(3)]
  correct = np.stack([right.reshape(3, 3)[a, e] for a, e in enumerate(ends)])
  labels = losses.monte_carlo_labels(jnp.asarray(correct[None], float))[0]
  spread = 4 * np.sqrt(chance * (1 - chance) / count) + 1e-12
  assert np.all(np.abs(labels - chance) <= spread)
  hard = losses.monte_carlo_labels(jnp.asarray(correct[None], float), hard=True)
  np.testing.assert_array_equal(hard[0], chance > 0)


@pytest.mark.parametrize('count', [1, 3, 8])
def test_m61_expected_labels_of_a_prefix_by_enumeration(count):
  """E soft = p; hard asks for one success, 1 − (1 − p)^n, and so grows."""
  ends = np.array(list(itertools.product([0.0, 1.0], repeat=count)))
  for p in (0.1, 0.6):
    chance = np.prod(np.where(ends > 0, p, 1 - p), axis=1)
    expected = {False: p, True: 1 - (1 - p) ** count}
    for hard, label in expected.items():
      found = losses.monte_carlo_labels(jnp.asarray(ends[None]), hard=hard)
      np.testing.assert_allclose(chance @ found[0], label, rtol=1e-12)


def test_m61_what_follows_an_error_is_not_trained():
  correct = jnp.asarray([[True, False, True, False], [True] * 4])
  mask = jnp.asarray([[True, True, True, True], [True, False, True, True]])
  found = losses.until_first_error(correct, mask)
  np.testing.assert_array_equal(found, [[1, 1, 0, 0], [1, 0, 1, 1]])
  unread = jnp.asarray([[True, False, True, True]])  # its False is no step
  found = losses.until_first_error(unread, mask[1:])
  np.testing.assert_array_equal(found, mask[1:])


def test_m61_soft_labels_have_their_optimum_at_themselves():
  labels = row(0.1, 0.5, 0.9)
  scores, mask = jnp.log(labels / (1 - labels)), jnp.ones((1, 3), bool)
  gradient = jax.grad(
    lambda s: jnp.sum(losses.step_correctness(s, labels, mask)[0])
  )(scores)
  np.testing.assert_allclose(gradient, 0, atol=1e-15)


def step_score(scores, aggregate):
  scores = row(*scores)
  mask = jnp.ones(scores.shape, bool)
  return float(losses.step_score(scores, mask, aggregate=aggregate)[0])


def test_m62_only_a_sum_pays_for_more_steps():
  steps, more = [0.9, 0.5, 0.8], [0.9, 0.5, 0.8, 0.6, 0.6]
  assert step_score(more, 'sum') > step_score(steps, 'sum')
  for aggregate in ('min', 'product'):
    assert step_score(more, aggregate) <= step_score(steps, aggregate)


def test_m62_order_matters_to_the_last_alone():
  steps = [0.9, 0.5, 0.8]
  for aggregate in ('sum', 'min', 'product', 'mean', 'last'):
    found = {
      round(step_score(s, aggregate), 12) for s in itertools.permutations(steps)
    }
    assert len(found) == (3 if aggregate == 'last' else 1)
  np.testing.assert_allclose(step_score(steps, 'product'), 0.36, rtol=1e-14)


def test_unknown_aggregate_names_the_remedy():
  with pytest.raises(Exception, match='aggregate'):
    step_score([0.5], 'median')
