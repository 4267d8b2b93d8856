"""Networks from elsewhere train through the same sampler and train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import (
  advantages,
  aggregation,
  losses,
  objectives,
  optimizers,
)
from postrain.batches import assemble, reweigh
from postrain.models.wrap import from_nnx, plain
from postrain.sampling import sample
from postrain.scoring import score
from postrain.train_step import finish, make_train_step
from postrain.types import Batch, Rollout, TrainState

VOCAB, WIDTH, LENGTH, LIKED = 7, 8, 4, 5


def averages(embedding, positions, segment_ids):
  """Means over the visible past, with the last token beside them."""
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  seen = jnp.tril(same).astype(jnp.float32)
  seen = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
  mean = jnp.einsum('bmn,bnd->bmd', seen, embedding)
  wave = jnp.cos(positions.astype(jnp.float32))[..., None]
  return jnp.concatenate([embedding, mean * wave], axis=-1)


def a_plain_pytree():
  def init(key):
    first, second = jax.random.split(key)
    return [
      jax.random.normal(first, (VOCAB, WIDTH)),
      0.3 * jax.random.normal(second, (2 * WIDTH, VOCAB)),
    ]

  def hidden(params, tokens, positions, segment_ids):
    return averages(params[0][tokens], positions, segment_ids)

  return plain(init, hidden, lambda params, h: h @ params[1], VOCAB)


def an_nnx_module():
  nnx = pytest.importorskip(
    'flax.nnx', reason='this pair of flax and jax has no working nnx'
  )

  class Network(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
      self.head = nnx.Linear(2 * WIDTH, VOCAB, rngs=rngs, use_bias=False)

    def __call__(self, tokens, positions, segment_ids):
      return averages(self.embed(tokens), positions, segment_ids)

    def unembed(self, hidden):
      return self.head(hidden)

  return from_nnx(lambda rngs: Network(rngs), VOCAB)


each = pytest.mark.parametrize('make', [a_plain_pytree, an_nnx_module])
OPTIMIZER = optimizers.adamw(learning_rate=0.05)


def fresh(model):
  params = {'actor': model.init(jax.random.key(0))}
  return TrainState(jnp.int32(0), params, OPTIMIZER.init(params))


def reward(completions):
  """The share of tokens that are the one that is liked."""
  return (completions == LIKED).astype(jnp.float32).mean(-1)


def rollout(model, params, key):
  prompts = jnp.arange(4)[:, None]
  real = jnp.ones(prompts.shape, bool)
  samples = sample(
    model, params, prompts, real, key, num_samples=8, max_new_tokens=LENGTH,
    stop_ids=(), pad_id=0,
  )  # fmt: skip
  tokens = jnp.concatenate([jnp.repeat(prompts, 8, axis=0), samples.tokens], 1)
  mask = jnp.pad(samples.mask, ((0, 0), (1, 0)))
  valid = jnp.ones(mask.shape, bool)
  scores = score(model, params, tokens, valid, mask)
  ids = jnp.zeros(tokens.shape, jnp.int32)
  return Rollout(
    tokens, valid, mask, reward(samples.tokens).reshape(4, 8),
    samples.truncated, ids, ids, {'old_logprobs': scores.logprobs},
  ), jnp.abs(scores.logprobs[:, 1:] - samples.model_logprobs).max()  # fmt: skip


@each
def test_a_stranger_learns_by_reinforcement(make):
  model = make()
  step = make_train_step(
    objectives.policy_gradient(model, loss=losses.ppo_clip),
    OPTIMIZER,
    num_micro_batches=2,
  )

  @jax.jit
  def iterate(state, key):
    data, gap = rollout(model, state.params['actor'], key)
    batch = assemble(data, advantage=advantages.group_normalized)
    batch = reweigh(batch, aggregation=aggregation.token_mean)
    state, metrics = step(state, {}, batch)
    return state, (data.rewards.mean(), gap, metrics['skipped'].total)

  keys = jax.random.split(jax.random.key(1), 25)
  state, (rewards, gaps, skipped) = jax.lax.scan(iterate, fresh(model), keys)
  assert gaps.max() < 1e-5  # its cache and its whole forward agree
  assert rewards[:3].mean() < 0.5
  assert rewards[-3:].mean() > 0.9
  assert not skipped.any()
  assert state.step == 25


@each
def test_a_stranger_learns_by_imitation(make):
  model = make()
  step = jax.jit(
    make_train_step(
      objectives.supervised(model, loss=losses.negative_log_likelihood),
      OPTIMIZER,
    )
  )
  tokens = jnp.array([[1, 2, 3, 4], [4, 3, 2, 1], [0, 5, 0, 5]])
  valid = jnp.ones(tokens.shape, bool)
  mask = valid.at[:, 0].set(False)
  batch = Batch(
    tokens, valid, mask, {'policy': aggregation.token_mean(mask)}, {}
  )
  state, figures = fresh(model), []
  for _ in range(40):
    state, metrics = step(state, {}, batch)
    figures.append(finish(metrics))
  assert figures[0]['loss'] > 1.2
  assert figures[-1]['loss'] < 0.1
  assert figures[-1]['sft/probability'] > 0.9
  greedy = functools.partial(
    sample, model, state.params['actor'], num_samples=1, max_new_tokens=3,
    stop_ids=(), pad_id=0, temperature=0.0, key=jax.random.key(0),
  )  # fmt: skip
  found = greedy(prompts=tokens[:, :1], prompt_mask=valid[:, :1])
  np.testing.assert_array_equal(found.tokens, tokens[:, 1:])
