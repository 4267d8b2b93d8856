"""Distillation: gradients by enumeration, modes, coarser vocabularies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import kl, logprobs, losses


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def draws(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def gradient(fn, logits, *args, **options):
  return jax.grad(lambda z: jnp.sum(fn(z, *args, **options)))(logits)


DIVERGENCES = (losses.forward_kl, losses.reverse_kl, losses.generalized_jsd)


def test_m52_forward_gradient_is_the_difference_of_probabilities():
  z, teacher = draws(3, 5), draws(3, 5, seed=1)
  for temperature in (1.0, 2.0):
    options = {'temperature': temperature}
    found = gradient(losses.forward_kl, z, teacher, **options)
    student, target = (jax.nn.softmax(x / temperature) for x in (z, teacher))
    expected = (student - target) / temperature
    np.testing.assert_allclose(found, expected, atol=1e-15)


def test_m52_a_certain_teacher_is_supervision():
  z, tokens = draws(3, 5), jnp.asarray([4, 0, 2])
  certain = jnp.where(jax.nn.one_hot(tokens, 5) > 0, 0.0, -jnp.inf)
  supervised = -logprobs.token_logprobs(z, tokens)
  found = losses.forward_kl(z, certain)
  np.testing.assert_allclose(found, supervised, rtol=1e-13)
  expected = jax.nn.softmax(z) - jax.nn.one_hot(tokens, 5)
  found = gradient(losses.forward_kl, z, certain)
  np.testing.assert_allclose(found, expected, atol=1e-15)


@pytest.mark.parametrize('fn', DIVERGENCES)
def test_m53_zero_where_equal_and_only_there(fn):
  z = draws(3, 5)
  shifted = z + jnp.asarray([[1.0], [-2.0], [9.0]])  # the same distributions
  np.testing.assert_allclose(fn(z, shifted), 0, atol=1e-14)
  np.testing.assert_allclose(gradient(fn, z, shifted), 0, atol=1e-14)
  assert np.all(fn(z, draws(3, 5, seed=1)) > 1e-2)


@pytest.mark.parametrize('fn', DIVERGENCES)
def test_m53_excluded_candidates_are_dear_and_finite(fn):
  """On either side, or on both."""
  z, teacher = draws(1, 5), draws(1, 5, seed=1)
  for student_hole, teacher_hole in ((0, 1), (2, 2)):
    own = z.at[0, student_hole].set(-jnp.inf)
    other = teacher.at[0, teacher_hole].set(-jnp.inf)
    slope = gradient(fn, own, other)
    assert np.all(np.isfinite(fn(own, other)))
    assert np.all(np.isfinite(slope))
    assert slope[0, student_hole] == 0
  # Mass where the teacher has none is pushed away.
  found = gradient(losses.reverse_kl, z, teacher.at[0, 1].set(-jnp.inf))
  assert found[0, 1] > 1


def test_m53_another_vocabulary_is_refused():
  for fn in DIVERGENCES:
    with pytest.raises(TypeError):
      fn(draws(3, 5), draws(3, 6))


def test_m53_sampled_gradient_is_the_exact_one_at_each_state():
  """E over the student's token, for every state."""
  z, teacher = draws(4, 5), draws(4, 5, seed=1)
  tokens = jnp.broadcast_to(jnp.arange(5), (4, 5))
  chance = jax.nn.softmax(z)

  def expected(z):
    own = jax.nn.log_softmax(z)
    fixed = jax.nn.log_softmax(teacher)
    mask = jnp.ones(tokens.shape, bool)
    values, metrics = losses.sampled_reverse_kl(own, fixed, mask)
    return jnp.sum(chance * values), jnp.sum(chance * metrics['kl'], axis=1)

  found, estimate = jax.grad(expected, has_aux=True)(z)
  exact = gradient(losses.reverse_kl, z, teacher)
  np.testing.assert_allclose(found, exact, atol=1e-15)
  exact = losses.reverse_kl(z, teacher)
  np.testing.assert_allclose(estimate, exact, rtol=1e-12)


def test_m53_reward_to_go_is_the_gradient_of_the_sequence_divergence():
  student, teacher = tabular.random_policy(0), tabular.random_policy(1)
  own, other = tabular.logprobs(student), tabular.logprobs(teacher)
  surprise = own - other
  to_go = -jnp.cumsum(surprise[:, ::-1], axis=1)[:, ::-1]
  truth = jax.grad(tabular.divergence)(student, teacher)

  def reinforced(advantages):
    def loss(x):
      return losses.reinforce(x, own, advantages, tabular.MASK)[0]

    return tabular.expected_gradient(loss, student)

  assert tabular.gap(reinforced(to_go), truth) < 1e-14
  # With discount 0 the effect of a token on later states is missing.
  assert tabular.gap(reinforced(-surprise), truth) > 1e-2


def bumps(x, centers, width):
  centers = jnp.asarray(centers, float)[None]
  return jax.nn.logsumexp(-((x[:, None] - centers) ** 2) / (2 * width**2), 1)


def test_m54_forward_covers_and_reverse_seeks():
  """A student with one mode before a teacher with two, at ±3."""
  x = jnp.linspace(-14.0, 14.0, 281)
  teacher = bumps(x, [-3.0, 3.0], 0.6)
  means, widths = np.linspace(-4, 4, 33), np.linspace(0.4, 4, 37)
  grid = [(m, s) for m in means for s in widths]
  students = jnp.stack([bumps(x, [m], s) for m, s in grid])
  teachers = jnp.broadcast_to(teacher, students.shape)
  best = {
    fn: grid[int(jnp.argmin(fn(students, teachers)))]
    for fn in (losses.forward_kl, losses.reverse_kl)
  }
  # The forward divergence matches moments: mean 0, variance 9 + 0.6².
  mean, width = best[losses.forward_kl]
  assert mean == 0
  assert abs(width - np.sqrt(9 + 0.36)) <= 0.05
  mean, width = best[losses.reverse_kl]
  assert abs(abs(mean) - 3) <= 0.25
  assert abs(width - 0.6) <= 0.1


def test_m53_jensen_shannon_conventions():
  z, teacher = draws(3, 5), draws(3, 5, seed=1)

  def jsd(beta, *args):
    return losses.generalized_jsd(*(args or (z, teacher)), beta=beta)

  forward, reverse = (
    losses.forward_kl(z, teacher),
    losses.reverse_kl(z, teacher),
  )
  np.testing.assert_allclose(jsd(0.0), forward, rtol=1e-14)
  np.testing.assert_allclose(jsd(1.0), reverse, rtol=1e-14)
  # The ends are the limits of the slope, not of the value.
  np.testing.assert_allclose(jsd(1e-6) / 1e-6, forward, rtol=1e-4)
  np.testing.assert_allclose(jsd(1 - 1e-6) / 1e-6, reverse, rtol=1e-4)
  np.testing.assert_allclose(jsd(0.3), jsd(0.7, teacher, z), rtol=1e-12)
  assert np.all(jsd(0.5) < np.log(2))
  # A weight may be annealed through both ends.
  betas = (0.0, 0.3, 1.0)

  def slope_at(beta):
    return gradient(losses.generalized_jsd, z, teacher, beta=beta)

  slopes = jax.jit(jax.vmap(slope_at))(jnp.asarray(betas))
  for slope, beta in zip(slopes, betas, strict=True):
    alone = slope_at(beta)
    np.testing.assert_allclose(slope, alone, atol=1e-14)


def test_m53_top_candidates_bound_the_divergence_from_below():
  z, teacher = draws(4, 9), draws(4, 9, seed=1)
  for fn in (losses.forward_kl, losses.reverse_kl):
    full = fn(z, teacher)
    coarse = [fn(*losses.top_candidates(z, teacher, k=k)) for k in (1, 2, 5, 8)]
    for a, b in zip(coarse, [*coarse[1:], full], strict=True):
      assert np.all(a <= b + 1e-12)
    # One candidate and the rest, when all but the last are kept, is everything.
    np.testing.assert_allclose(coarse[-1], full, rtol=1e-9)
    whole = losses.top_candidates(z, teacher, k=9, tail=False)
    np.testing.assert_allclose(fn(*whole), full, rtol=1e-12)
    rounded = losses.top_candidates(z, teacher, k=9)
    np.testing.assert_allclose(fn(*rounded), full, atol=1e-5)


def test_m53_chunks_of_time_give_the_whole():
  hidden, head = draws(2, 5, 3), draws(3, 7, seed=1)
  teacher_hidden, teacher_head = draws(2, 5, 4, seed=2), draws(4, 7, seed=3)

  def chunked(hidden):
    return logprobs.map_time_chunks(
      lambda z, h: losses.generalized_jsd(z, h @ teacher_head, beta=0.3),
      lambda h: h @ head,
      hidden,
      teacher_hidden,
      chunk_size=2,
    )

  def whole(hidden):
    return losses.generalized_jsd(
      hidden @ head, teacher_hidden @ teacher_head, beta=0.3
    )

  np.testing.assert_allclose(chunked(hidden), whole(hidden), rtol=1e-12)
  np.testing.assert_allclose(
    gradient(chunked, hidden), gradient(whole, hidden), atol=1e-14
  )


def test_m55_kdrl_without_reward_is_sampled_distillation():
  """k2 to the teacher; without it the objective is the policy loss."""
  logp, teacher, a = (
    draws(3, 4) - 4,
    draws(3, 4, seed=1) - 4,
    draws(3, 4, seed=2),
  )
  mask = jnp.asarray([[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)

  def kdrl(x, advantages, coef):
    policy, _ = losses.ppo_clip(x, logp, advantages, mask)
    return policy + coef * kl.k2(x, teacher, mask)

  plain = gradient(lambda x: losses.ppo_clip(x, logp, a, mask)[0], logp)
  found = gradient(lambda x: kdrl(x, a, 0.0), logp)
  np.testing.assert_array_equal(found, plain)
  sampled = gradient(
    lambda x: losses.sampled_reverse_kl(x, teacher, mask)[0], logp
  )
  found = gradient(lambda x: kdrl(x, jnp.zeros_like(a), 1.0), logp)
  np.testing.assert_allclose(found, sampled, atol=1e-15)
  # Descent raises what the teacher likes better than the student.
  signs = jnp.where(mask, jnp.sign(logp - teacher), 0)
  np.testing.assert_array_equal(jnp.sign(found), signs)


def test_m56_coefficient_falls_to_its_floor():
  steps = jnp.asarray([0.0, 1.0, 40.0, 80.0, 500.0])
  expected = [5e-3, 4.95e-3, 3e-3, 1e-3, 1e-3]
  found = losses.annealed_coef(steps)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  counts = losses.annealed_coef(jnp.asarray([0, 40]))
  np.testing.assert_allclose(counts, [5e-3, 3e-3], rtol=1e-6)
