"""Objectives against sums written out, on a model small enough to see."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import kl, losses, objectives
from postrain.models.heads import scalar_head
from postrain.models.wrap import plain
from postrain.scoring import score
from postrain.soft_labels import mean_over_labels
from postrain.train_step import finish
from postrain.types import Batch

ROWS, LENGTH, VOCAB = 4, 6, 5
BIGRAM = plain(
  lambda key: {'table': jax.random.normal(key, (VOCAB, VOCAB))},
  lambda params, tokens, positions, ids: jax.nn.one_hot(tokens, VOCAB),
  lambda params, hidden: hidden @ params['table'],
  VOCAB,
)
CRITIC = scalar_head(BIGRAM)


@pytest.fixture
def params():
  critic = CRITIC.init(jax.random.key(1))
  head = jax.random.normal(jax.random.key(2), critic['head'].shape)
  return {
    'actor': BIGRAM.init(jax.random.key(0)),
    'critic': {**critic, 'head': head},
  }


@pytest.fixture
def batch():
  draw = np.random.default_rng(0)
  mask = np.arange(LENGTH)[None] >= np.array([[2], [3], [2], [2]])
  mask[3, 4:] = False

  def noise(positive=False):
    x = draw.standard_normal((ROWS, LENGTH))
    return jnp.asarray(np.abs(x) if positive else x, jnp.float32)

  names = ('old_logprobs', 'ref_logprobs')
  figures = ('advantages', 'returns', 'old_values')
  return Batch(
    tokens=jnp.asarray(draw.integers(VOCAB, size=mask.shape), jnp.int32),
    valid=jnp.ones(mask.shape, bool),
    mask=jnp.asarray(mask),
    weights={
      k: jnp.where(jnp.asarray(mask), noise(positive=True), 0)
      for k in ('policy', 'entropy', 'kl', 'value', 'preference')
    },
    arrays={k: -noise(positive=True) for k in names}
    | {k: noise() for k in figures},
  )


def figures(params, batch, temperature=1.0):
  """Log-prob and entropy of each token by NumPy, values of the critic."""
  table = np.asarray(params['actor']['table'], float)
  logits = table[np.asarray(batch.tokens)[:, :-1]] / temperature
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(logp, np.asarray(batch.tokens)[:, 1:, None], -1)
  head = np.asarray(params['critic']['head'], float)[:, 0]
  out = (
    chosen[..., 0],
    -(np.exp(logp) * logp).sum(-1),
    head[np.asarray(batch.tokens)[:, :-1]],
  )
  mask = np.asarray(batch.mask)
  return [np.where(mask, np.pad(x, ((0, 0), (1, 0))), 0) for x in out]


def total(term, batch, values):
  return np.sum(np.asarray(batch.weights[term], float) * values)


def test_a_loss_is_the_sum_of_its_terms_under_their_weights(params, batch):
  logprobs, entropy, values = figures(params, batch, 0.7)
  arrays = {k: np.asarray(v, float) for k, v in batch.arrays.items()}
  policy = -arrays['advantages'] * logprobs
  gap = np.where(batch.mask, arrays['ref_logprobs'] - logprobs, 0)
  k3 = np.exp(gap) - 1 - gap
  squares = np.where(batch.mask, (values - arrays['returns']) ** 2 / 2, 0)
  objective = objectives.policy_gradient(
    BIGRAM, loss=losses.reinforce, kl=kl.k3, kl_coef=0.3, entropy_coef=0.2,
    value_loss=losses.squared_error, value_coef=0.5, critic=CRITIC,
    temperature=0.7, chunk_size=4,
  )  # fmt: skip
  loss, metrics = objective(params, {}, batch)
  expected = (
    total('policy', batch, policy)
    + 0.3 * total('kl', batch, k3)
    - 0.2 * total('entropy', batch, entropy)
    + 0.5 * total('value', batch, squares)
  )
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  number = np.asarray(batch.mask).sum()
  found = finish(metrics)
  assert found['loss'] == pytest.approx(expected, rel=1e-5)
  assert found['loss/policy'] == pytest.approx(
    total('policy', batch, policy), rel=1e-5
  )
  assert found['policy/entropy'] == pytest.approx(
    entropy.sum() / number, rel=1e-5
  )
  assert found['policy/kl_loss'] == pytest.approx(k3.sum() / number, rel=1e-5)
  error = np.where(batch.mask, values - arrays['returns'], 0).sum() / number
  assert found['value/error'] == pytest.approx(error, rel=1e-4)


def test_m04_the_gradient_of_reinforce_in_closed_form(params, batch):
  """Σ w A (π − 1[y]) at the row of the previous token."""
  objective = objectives.policy_gradient(BIGRAM, loss=losses.reinforce)
  found = jax.grad(lambda p: objective(p, {}, batch)[0])(params)
  expected = np.zeros((VOCAB, VOCAB))
  probs = np.asarray(jax.nn.softmax(params['actor']['table']))
  tokens = np.asarray(batch.tokens)
  scale = np.asarray(batch.weights['policy'] * batch.arrays['advantages'])
  for b, t in zip(*np.nonzero(np.asarray(batch.mask)), strict=True):
    last, token = tokens[b, t - 1], tokens[b, t]
    expected[last] += scale[b, t] * (probs[last] - np.eye(VOCAB)[token])
  np.testing.assert_allclose(found['actor']['table'], expected, atol=1e-5)
  assert all(not x.any() for x in jax.tree.leaves(found['critic']))


def test_a_coefficient_of_none_removes_its_term(params, batch):
  """Without references, values and a critic the others still run."""
  names = ('old_logprobs', 'advantages')
  arrays = {k: batch.arrays[k] for k in names}
  alone = dataclasses.replace(
    batch, arrays=arrays, weights={'policy': batch.weights['policy']}
  )
  objective = objectives.policy_gradient(
    BIGRAM, loss=losses.ppo_clip, kl=kl.k3, value_loss=losses.squared_error
  )
  _, metrics = objective({'actor': params['actor']}, {}, alone)
  assert 'policy/kl_loss' not in metrics
  assert not any(name.startswith('value') for name in metrics)


def test_coefficients_of_zero_may_be_traced_and_change_nothing(params, batch):
  def gradient(coef):
    objective = objectives.policy_gradient(
      BIGRAM, loss=losses.ppo_clip, kl=kl.k2, kl_coef=coef, entropy_coef=coef,
      value_loss=losses.squared_error, value_coef=coef, critic=CRITIC,
    )  # fmt: skip
    return jax.grad(lambda p: objective(p, {}, batch)[0])(params)

  none = gradient(None)['actor']['table']
  several = jax.jit(jax.vmap(gradient))(jnp.array([0.0, 1.0]))
  found = several['actor']['table']
  np.testing.assert_allclose(found[0], none, atol=1e-6)
  assert jnp.abs(found[1] - none).max() > 1e-2


def test_figures_have_no_gradient(params, batch):
  objective = objectives.policy_gradient(
    BIGRAM, loss=losses.ppo_clip, kl=kl.k3, kl_coef=0.1, entropy_coef=None
  )

  def entropy(params):
    return objective(params, {}, batch)[1]['policy/entropy'].total

  gradient = jax.grad(entropy)(params)['actor']['table']
  assert not gradient.any()


def test_m17_the_ratio_is_one_where_the_old_policy_is_this_one(params, batch):
  """At the temperature of the sampler, or every ratio would be off."""
  for temperature, exact in ((0.7, True), (1.0, False)):
    old = score(
      BIGRAM, params['actor'], batch.tokens, batch.valid, batch.mask,
      temperature=0.7,
    )  # fmt: skip
    current = dataclasses.replace(
      batch, arrays={**batch.arrays, 'old_logprobs': old.logprobs}
    )
    objective = objectives.policy_gradient(
      BIGRAM, loss=losses.ppo_clip, temperature=temperature
    )
    found = finish(objective(params, {}, current)[1])
    assert (found['policy/ratio'] == 1.0) == exact
    assert (found['policy/old_kl'] == 0.0) == exact


def test_a_value_term_needs_a_critic():
  with pytest.raises(ValueError, match=r'value_coef=0.5 needs a critic'):
    objectives.policy_gradient(BIGRAM, loss=losses.ppo_clip, value_coef=0.5)


def test_a_loss_names_the_arrays_that_are_missing(params, batch):
  objective = objectives.policy_gradient(BIGRAM, loss=losses.dpo)
  with pytest.raises(ValueError, match='dpo asks for chosen, rejected'):
    objective(params, {}, batch)


def test_supervised_is_the_weighted_cross_entropy(params, batch):
  objective = objectives.supervised(
    BIGRAM, loss=losses.negative_log_likelihood, chunk_size=4
  )
  logprobs, *_ = figures(params, batch)
  loss, metrics = objective(params, {}, batch)
  expected = -total('policy', batch, logprobs)
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  probability = np.where(batch.mask, np.exp(logprobs), 0).sum()
  assert finish(metrics)['sft/probability'] == pytest.approx(
    probability / np.asarray(batch.mask).sum(), rel=1e-5
  )


def pairs(batch):
  weights = jnp.array([0.5, 0.0, 1.5, 0.0])  # of the chosen rows
  return dataclasses.replace(
    batch, unit_size=2, weights={'preference': weights}
  )


def test_preference_is_the_loss_of_sequence_sums(params, batch):
  objective = objectives.preference(BIGRAM, loss=losses.dpo)
  logprobs, *_ = figures(params, batch)
  reference = np.where(batch.mask, batch.arrays['ref_logprobs'], 0).sum(-1)
  rewards = 0.1 * (logprobs.sum(-1) - reference)
  margins = rewards[::2] - rewards[1::2]
  loss, metrics = objective(params, {}, pairs(batch))
  expected = np.log1p(np.exp(-margins)) @ [0.5, 1.5]
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  found = finish(metrics)
  assert found['preference/margin'] == pytest.approx(margins.mean(), rel=1e-4)
  assert found['preference/accuracy'] == (margins > 0).mean()
  labels = {'preference': jnp.array([0.8, 0.8, 0.3, 0.3])}
  soft = dataclasses.replace(batch, arrays={**batch.arrays, **labels})
  loss, _ = objective(params, {}, pairs(soft))
  expected += np.array([0.2, 0.7]) * margins @ [0.5, 1.5]
  assert float(loss) == pytest.approx(expected, rel=1e-5)


# aot sorts the whole batch: to it an empty pair is a pair.
PAIRWISE = [
  name
  for name in losses.__all__
  if {'chosen', 'rejected'}
  <= set(inspect.signature(getattr(losses, name)).parameters)
  and name not in ('aot', 'implicit_reward', 'soft_preference')
]


def test_the_walk_finds_pairwise_losses():
  assert {'dpo', 'ipo', 'simpo', 'orpo', 'cpo', 'hinge'} <= set(PAIRWISE)


@pytest.mark.parametrize('name', PAIRWISE)
def test_every_pairwise_loss_is_an_objective(name, params, batch):
  """Empty pairs have no weight; whatever they give must stay finite."""
  batch = pairs(batch)
  objective = objectives.preference(BIGRAM, loss=getattr(losses, name))
  gradient, _ = jax.grad(objective, has_aux=True)(params, {}, batch)
  leaves = jax.tree.leaves(gradient)
  assert all(np.all(np.isfinite(g)) for g in leaves)
  assert any(np.any(g != 0) for g in leaves)
  blank = jax.tree.map(jnp.zeros_like, batch)
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, blank)
  padded, _ = jax.grad(objective, has_aux=True)(params, {}, both)
  for a, b in zip(leaves, jax.tree.leaves(padded), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def soft(h, p):
  """−p log σ(h) − (1 − p) log σ(−h)."""
  return -p * jax.nn.log_sigmoid(h) - (1 - p) * jax.nn.log_sigmoid(-h)


def test_m22_m23_soft_labels_are_the_mean_over_labels():
  """Of scores as of log-ratios; smoothing is of each label."""
  p = jnp.array([0.0, 0.2, 0.5, 0.7, 1.0])
  margins, zero = jnp.array([-1.0, 3.0, 0.4, -2.0, 0.0]), jnp.zeros(5)
  flipped = p + 0.1 * (1 - 2 * p)
  dpo = functools.partial(losses.dpo, beta=1)

  def of_pairs(loss, h):
    arrays = {'chosen': h, 'rejected': zero, 'preference': p}
    arrays |= {'ref_chosen': zero, 'ref_rejected': zero}
    return mean_over_labels(loss, arrays)[0].sum()

  cases = (
    (losses.bradley_terry, lambda h: soft(h, p)),
    (losses.soft_preference, lambda h: soft(h, p)),
    (dpo, lambda h: soft(h, p)),
    (functools.partial(dpo, label_smoothing=0.1), lambda h: soft(h, flipped)),
    (
      functools.partial(losses.ipo, beta=0.5),
      lambda h: (h - 2 * p + 1) ** 2 + 4 * p * (1 - p),
    ),
  )

  @jax.jit
  def slopes(h):
    return [
      (
        jax.value_and_grad(functools.partial(of_pairs, loss))(h),
        jax.value_and_grad(lambda h, closed=closed: closed(h).sum())(h),
      )
      for loss, closed in cases
    ]

  for found, expected in slopes(margins):
    for one, other in zip(found, expected, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_m22_preference_is_log_two_at_the_reference(params, batch):
  scores = score(BIGRAM, params['actor'], batch.tokens, batch.valid, batch.mask)
  arrays = {'ref_logprobs': scores.logprobs}
  batch = dataclasses.replace(pairs(batch), arrays=arrays)
  loss, _ = objectives.preference(BIGRAM, loss=losses.dpo)(params, {}, batch)
  assert float(loss) == pytest.approx(2 * np.log(2), rel=1e-6)
