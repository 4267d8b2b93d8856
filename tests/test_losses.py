"""Closed forms of the losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from postrain import advantages, aggregation, losses


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def row(*numbers):
  return jnp.asarray([numbers], float)


def token_gradients(loss, ratios, advantage, **options):
  """d loss_t / d logprob_t of single tokens with the given ratios."""
  logp = jnp.log(row(*ratios))
  args = (jnp.zeros_like(logp), advantage * jnp.ones_like(logp))
  args = (*args, jnp.ones_like(logp, bool))
  return jax.grad(lambda x: jnp.sum(loss(x, *args, **options)[0]))(logp)[0]


POLICY_LOSSES = ('reinforce', 'ppo_clip', 'gspo', 'gspo_token', 'cispo')


@pytest.mark.parametrize('name', POLICY_LOSSES)
def test_m04_expected_gradient_is_the_policy_gradient(name):
  """On policy every surrogate is REINFORCE, and REINFORCE is ∇E[R]."""
  policy, rewards = tabular.random_policy(0), tabular.rewards()
  old = tabular.logprobs(policy)
  a = jnp.broadcast_to(rewards[:, None], old.shape)
  loss = getattr(losses, name)
  found = tabular.expected_gradient(
    lambda x: loss(x, old, a, tabular.MASK)[0], policy
  )
  truth = jax.grad(lambda p: -jnp.sum(tabular.probabilities(p) * rewards))
  assert tabular.gap(found, truth(policy)) < 1e-10


@pytest.mark.parametrize('name', POLICY_LOSSES)
def test_m08_nothing_is_clipped_on_policy(name):
  logp = row(-1.0, -2.0, -0.5)
  mask = jnp.ones_like(logp, bool)
  a = row(1.0, -1.0, 0.0)
  _, metrics = getattr(losses, name)(logp, logp, a, mask)
  for key in ('clip_low', 'clip_high', 'limit_hits', 'old_kl'):
    np.testing.assert_array_equal(metrics.get(key, 0), 0)
  np.testing.assert_array_equal(metrics['ratio'], 1)


def test_m08_four_corners():
  ratios = np.array([0.7, 0.9, 1.1, 1.3])
  positive = token_gradients(losses.ppo_clip, ratios, 2.0)
  negative = token_gradients(losses.ppo_clip, ratios, -2.0)
  alive = -2 * ratios
  np.testing.assert_allclose(positive, alive * [1, 1, 1, 0], rtol=1e-12)
  np.testing.assert_allclose(negative, -alive * [0, 1, 1, 1], rtol=1e-12)


def test_m08_gradient_is_whole_on_the_bounds():
  """min and clip would halve it at a tie."""
  logp = row(0.0)
  mask = jnp.ones_like(logp, bool)
  for bounds in ({'clip_low': 0.0}, {'clip_high': 0.0}):
    for sign in (1.0, -1.0):
      gradient = jax.grad(
        lambda x, sign=sign, bounds=bounds: jnp.sum(
          losses.ppo_clip(x, logp, row(sign), mask, **bounds)[0]
        )
      )(logp)
      np.testing.assert_array_equal(gradient, row(-sign))


def test_m08_dual_clip_touches_only_negative_advantages_beyond_it():
  ratios = np.array([0.5, 1.0, 2.9, 3.1, 9.0])
  for sign in (1.0, -1.0):
    plain = token_gradients(losses.ppo_clip, ratios, sign)
    dual = token_gradients(losses.ppo_clip, ratios, sign, dual_clip=3.0)
    changed = np.asarray(plain) != np.asarray(dual)
    np.testing.assert_array_equal(changed, (ratios > 3) & (sign < 0))
    np.testing.assert_array_equal(np.asarray(dual)[changed], 0)


def test_m37_clip_higher_keeps_the_gradient_alive():
  ratios = np.array([0.75, 1.25])
  higher = token_gradients(losses.ppo_clip, ratios, 1.0, clip_high=0.28)
  plain = token_gradients(losses.ppo_clip, ratios, 1.0)
  np.testing.assert_allclose(higher, [-0.75, -1.25], rtol=1e-12)
  np.testing.assert_allclose(plain, [-0.75, 0], rtol=1e-12)
  for high in (0.2, 0.28):
    down = token_gradients(losses.ppo_clip, ratios, -1.0, clip_high=high)
    np.testing.assert_allclose(down, [0, 1.25], rtol=1e-12)


def test_m08_log_ratio_limit_is_reported_and_stops_the_gradient():
  logp, old = row(0.0, 0.0), row(-25.0, -0.1)
  mask = jnp.ones_like(logp, bool)
  a = row(-1.0, -1.0)

  def total(x):
    values, metrics = losses.ppo_clip(x, old, a, mask)
    return jnp.sum(values), metrics

  gradient, metrics = jax.grad(total, has_aux=True)(logp)
  np.testing.assert_array_equal(metrics['limit_hits'], row(1, 0))
  np.testing.assert_allclose(gradient, row(0, np.exp(0.1)), rtol=1e-12)


def test_m42_gspo_gradient_is_equal_within_a_response():
  rng = np.random.default_rng(0)
  old = jnp.asarray(-rng.random((2, 5)) - 0.1)
  logp = old + 1e-5 * jnp.asarray(rng.standard_normal((2, 5)))
  mask = jnp.arange(5)[None, :] < jnp.asarray([[3], [5]])
  a = jnp.asarray([[1.0], [-1.0]]) * jnp.ones((2, 5))
  weights = aggregation.sequence_mean(mask)

  def gradient(loss):
    return jax.grad(lambda x: jnp.sum(weights * loss(x, old, a, mask)[0]))(logp)

  whole, tokens = gradient(losses.gspo), gradient(losses.gspo_token)
  delta = jnp.where(mask, logp - old, 0)
  lengths = jnp.sum(mask, axis=1, keepdims=True).astype(float)
  s = jnp.exp(jnp.sum(delta, axis=1, keepdims=True) / lengths)
  expected = jnp.where(mask, -s * a / (2 * lengths), 0)
  np.testing.assert_allclose(whole, expected, atol=1e-15)
  np.testing.assert_allclose(whole, tokens, atol=1e-15)


def test_m42_a_response_is_clipped_as_a_whole():
  old = jnp.zeros((1, 4))
  logp = row(0.5, -0.3, 0.1, 0.1)  # the mean 0.1 is above the bound
  mask = jnp.ones_like(logp, bool)
  for loss in (losses.gspo, losses.gspo_token):
    gradient = jax.grad(
      lambda x, loss=loss: jnp.sum(loss(x, old, jnp.ones((1, 4)), mask)[0])
    )(logp)
    np.testing.assert_array_equal(gradient, 0)


def test_m43_cispo_weighs_every_token():
  ratios = np.array([0.1, 0.9, 1.1, 3.0, 9.0])
  found = token_gradients(losses.cispo, ratios, 2.0)
  np.testing.assert_allclose(found, -2 * np.minimum(ratios, 5), rtol=1e-12)
  banded = token_gradients(
    losses.cispo, ratios, 2.0, clip_low=0.2, clip_high=0.2
  )
  expected = -2 * np.clip(ratios, 0.8, 1.2)
  np.testing.assert_allclose(banded, expected, rtol=1e-12)
  ppo = token_gradients(losses.ppo_clip, ratios, 2.0)
  np.testing.assert_allclose(banded[1:3], ppo[1:3], rtol=1e-12)


def test_m30_grpo_on_policy_value_is_zero_and_gradient_is_not():
  rewards = jnp.asarray([[1.0, 0.0, 0.0, 1.0]])
  a = advantages.group_normalized(rewards).T * jnp.ones((4, 3))
  logp = jnp.full((4, 3), -1.0)
  mask = jnp.ones((4, 3), bool)
  weights = aggregation.sequence_mean(mask)
  value, gradient = jax.value_and_grad(
    lambda x: jnp.sum(weights * losses.ppo_clip(x, logp, a, mask)[0])
  )(logp)
  np.testing.assert_allclose(value, 0, atol=1e-15)
  np.testing.assert_allclose(gradient, -a / 12, rtol=1e-12)


def test_m22_dpo_is_log2_at_reference():
  x = jnp.asarray([-3.0, -9.0])
  y = jnp.asarray([-4.0, -2.0])
  values, metrics = losses.dpo(x, y, x, y)
  np.testing.assert_allclose(values, np.log(2), rtol=1e-12)
  np.testing.assert_array_equal(metrics['accuracy'], 0)
  chosen, rejected = jax.grad(
    lambda a, b: jnp.sum(losses.dpo(a, b, x, y, beta=0.3)[0]), (0, 1)
  )(x, y)
  np.testing.assert_allclose(chosen, -0.15, rtol=1e-12)
  np.testing.assert_allclose(rejected, 0.15, rtol=1e-12)


def test_m22_dpo_sees_only_differences_of_log_ratios():
  x, y, f, g = jnp.asarray([[-3.0], [-4.0], [-3.5], [-4.8]])
  values, metrics = losses.dpo(x, y, f, g, label_smoothing=0.1)
  shifted, _ = losses.dpo(x + 7, y + 7, f, g, label_smoothing=0.1)
  np.testing.assert_allclose(values, shifted, rtol=1e-12)
  swapped, other = losses.dpo(y, x, g, f, label_smoothing=0.9)
  np.testing.assert_allclose(values, swapped, rtol=1e-12)
  np.testing.assert_allclose(metrics['margin'], -other['margin'], rtol=1e-12)


def test_m22_optimum_is_the_tilted_reference():
  """With exact Bradley-Terry labels, π* ∝ π_ref exp(r / β) is stationary."""
  beta, rewards = 0.5, tabular.rewards()
  ref = jnp.sum(tabular.logprobs(tabular.random_policy(4)), axis=1)
  optimum = jax.nn.log_softmax(ref + rewards / beta)
  pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
  won, lost = map(np.asarray, zip(*pairs, strict=True))
  chance = jax.nn.sigmoid(rewards[won] - rewards[lost])

  def loss(logp):
    logp = jax.nn.log_softmax(logp)
    args = (logp[won], logp[lost], ref[won], ref[lost])
    return jnp.sum(chance * losses.dpo(*args, beta=beta)[0])

  np.testing.assert_allclose(jax.grad(loss)(optimum), 0, atol=1e-10)
  assert jnp.max(jnp.abs(jax.grad(loss)(ref))) > 1e-2


def test_m02_gradient_of_likelihood_is_softmax_minus_onehot():
  logits = jnp.asarray([[[1.0, 0.0, -1.0], [0.5, 0.2, 0.0]]])
  tokens, mask = jnp.asarray([[2, 0]]), jnp.asarray([[False, True]])

  def loss(z):
    logp = jnp.take_along_axis(jax.nn.log_softmax(z), tokens[..., None], -1)
    values, _ = losses.negative_log_likelihood(logp[..., 0], mask)
    return jnp.sum(aggregation.token_mean(mask) * values)

  expected = np.asarray(jax.nn.softmax(logits) - jax.nn.one_hot(tokens, 3))
  expected = expected * np.asarray(mask)[..., None]
  np.testing.assert_allclose(jax.grad(loss)(logits), expected, atol=1e-15)


def test_m07_value_loss_without_bound_is_half_the_squared_error():
  v, old, returns = row(1.0, 2.0), row(0.0, 9.0), row(3.0, -1.0)
  mask = jnp.ones_like(v, bool)
  plain, _ = losses.squared_error(v, returns, mask)
  np.testing.assert_allclose(plain, row(2.0, 4.5), rtol=1e-12)
  far, _ = losses.clipped_squared_error(v, old, returns, mask, clip=jnp.inf)
  np.testing.assert_allclose(far, plain, rtol=1e-12)


def test_m07_no_gradient_where_the_clipped_branch_is_larger():
  v, old, returns = row(1.0, 1.0, 0.1), row(0.0, 0.0, 0.0), row(2.0, -2.0, 2.0)
  mask = jnp.ones_like(v, bool)

  def total(v):
    values, metrics = losses.clipped_squared_error(v, old, returns, mask)
    return jnp.sum(values), metrics

  gradient, metrics = jax.grad(total, has_aux=True)(v)
  np.testing.assert_allclose(gradient, row(0.0, 3.0, -1.9), rtol=1e-12)
  np.testing.assert_array_equal(metrics['clipped'], row(1, 0, 0))
