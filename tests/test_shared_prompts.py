"""Prompts read once for their group, and old log-probs of the one update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import losses, objectives
from postrain.algorithm import make_algorithm
from postrain.batches import check_packing, together
from postrain.models.transformer import Config, transformer
from postrain.programs import _minibatches as minibatches
from postrain.recipe import Recipe, make_recipe
from postrain.scoring import read_states, score
from postrain.train_step import accumulate, finish
from postrain.trainer import Trainer
from postrain.types import Batch, SharedPrompts, TrainState
from tests import tiny
from tests.tiny import quick_compiler as quick_compiler

GROUPS, SAMPLES, PROMPT, COMPLETION = 2, 3, 5, 6
ROWS, LENGTH, VOCAB = GROUPS * SAMPLES, PROMPT + COMPLETION, 13
SHARED = SharedPrompts(length=PROMPT, num_samples=SAMPLES)
KINDS = {
  'plain': {},
  'windows': dict(layer_types=('sliding', 'full'), sliding_window=3),
  'remat': dict(remat='nothing_saveable'),
  'experts': dict(num_experts=4, experts_per_token=2),
}


def model_of(dtype='float32', **changes):
  shape = dict(
    vocab_size=VOCAB, num_layers=2, model_dim=16, mlp_dim=16, num_heads=4,
    num_kv_heads=2, head_dim=8, max_length=32, dtype=dtype, param_dtype=dtype,
  )  # fmt: skip
  model = transformer(Config(**shape | changes))
  params = jax.jit(model.init)(jax.random.key(0))
  return model, jax.tree.map(lambda x: x * 3, params)


@functools.cache
def batch(dtype='float32'):
  """Left-padded prompts, completions that end early."""
  draw = np.random.default_rng(0)
  tokens = draw.integers(VOCAB, size=(ROWS, LENGTH))
  valid = np.ones((ROWS, LENGTH), bool)
  for group, padding in enumerate((0, 2)):
    rows = slice(group * SAMPLES, (group + 1) * SAMPLES)
    tokens[rows, :PROMPT] = tokens[rows.start, :PROMPT]
    valid[rows, :padding] = False
  for row in range(ROWS):
    valid[row, PROMPT + 1 + row :] = False
  tokens = np.where(valid, tokens, -1)  # padding may hold any id
  mask = valid & (np.arange(LENGTH) >= PROMPT)

  def noise():
    return jnp.asarray(draw.standard_normal(mask.shape), dtype)

  arrays = {'old_logprobs': noise(), 'advantages': noise()}
  weights = {'policy': noise(), 'entropy': noise()}
  tokens = jnp.asarray(tokens, jnp.int32)
  return Batch(tokens, jnp.asarray(valid), jnp.asarray(mask), weights, arrays)


def gradient(model, params, batch, num_micro_batches=1):
  objective = objectives.policy_gradient(
    model, loss=losses.ppo_clip, entropy_coef=0.1, chunk_size=4
  )
  return jax.jit(
    lambda params, batch: accumulate(
      objective, {'actor': params}, {}, batch, num_micro_batches
    )
  )(params, batch)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('num_micro_batches', [1, 2])
def test_gradient_is_that_of_repeated_prompts(kind, num_micro_batches):
  with jax.enable_x64(True):
    model, params = model_of('float64', **KINDS[kind])
    repeated = batch('float64')
    wanted, figures = gradient(model, params, repeated)
    shared = repeated.replace(packing=SHARED, unit_size=SAMPLES)
    found, metrics = gradient(model, params, shared, num_micro_batches)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    assert scale > 1e-3
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-11 * scale),
      found, wanted,
    )  # fmt: skip
    assert finish(metrics) == pytest.approx(finish(figures), rel=1e-9)


@pytest.mark.parametrize('num_slices', [1, 2])
def test_scores_are_those_of_repeated_prompts(num_slices):
  model, params = model_of()
  x = batch()
  run = functools.partial(score, model, temperature=0.7)
  rows = params, x.tokens, x.valid, x.mask
  wanted = jax.jit(run)(*rows)
  run = functools.partial(
    run, chunk_size=4, num_slices=num_slices, packing=SHARED
  )
  found = jax.jit(run)(*rows)
  for name in ('logprobs', 'entropy', 'model_logprobs'):
    np.testing.assert_allclose(
      getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-5
    )


def test_routing_of_shared_prompts_is_recorded_and_replayed():
  model, params = model_of(**KINDS['experts'])
  x = batch()

  @functools.partial(jax.jit, static_argnums=0)
  def run(packing, experts=None):
    return score(
      model, params, x.tokens, x.valid, x.mask, packing=packing,
      experts=experts, record_routing=True,
    )  # fmt: skip

  wanted = run(None).experts
  np.testing.assert_array_equal(run(SHARED).experts, wanted)
  other = jnp.where(x.valid[..., None, None], 3 - wanted, -1)
  found, repeated = run(SHARED, other), run(None, other)
  np.testing.assert_allclose(found.logprobs, repeated.logprobs, atol=1e-5)


def test_the_model_reads_each_prompt_once():
  model, params = model_of()
  shapes = []

  def hidden(params, tokens, **where):
    shapes.append(tokens.shape)
    return model.hidden(params, tokens, **where)

  x = batch()
  counted = model.__class__(**{**vars(model), 'hidden': hidden})
  read_states(counted, params, x.tokens, x.valid, SHARED)
  assert shapes == [(GROUPS, PROMPT), (ROWS, COMPLETION)]


def test_no_slice_parts_a_group():
  assert (together(SHARED), together(None)) == (SAMPLES, 1)
  check_packing(SHARED, 2, SAMPLES)
  model, params = model_of()
  shared = batch().replace(packing=SHARED, unit_size=SAMPLES)
  with pytest.raises(ValueError, match='whole units of 3'):
    gradient(model, params, shared, 3)


def algorithm(**changes):
  config = tiny.arithmetic()
  config.environment = config.model = dict(name='none')
  config.kl.loss_coef = 0.1
  config.rl.num_epochs = config.rl.num_minibatches = 1
  config.rl.update(changes)
  recipe = make_recipe(config)
  model, params = model_of()
  return recipe, params, make_algorithm(recipe, model, pad_id=0, stop_ids=(1,))


def first_update(**changes):
  """Parameters after an update, and its figures."""
  recipe, params, functions = algorithm(**changes)
  params = {'actor': params}
  state = TrainState(
    jnp.int32(0), params, functions.rl_optimizer.init(params), params['actor']
  )
  prompts = jnp.full((recipe.rl.num_prompts, PROMPT), 2)
  mask = jnp.ones(prompts.shape, bool)
  ids = jnp.arange(len(prompts))
  samples = jax.jit(functions.sample)(
    params, prompts, mask, jax.random.key(1), ids
  )
  shape = (len(prompts), recipe.sampling.num_samples)
  rewards = jax.random.normal(jax.random.key(2), shape)
  signals = {'reward_parts': rewards[..., None]}
  batch, figures, _ = jax.jit(functions.prepare)(
    params, params['actor'], prompts, mask, samples, rewards, signals
  )
  rows = jnp.arange(rewards.size)
  state, metrics = jax.jit(functions.update)(
    state, batch, rows, jax.random.key(3)
  )
  return state.params, finish({**figures, **metrics}), batch


def test_an_update_without_rescoring_is_the_same():
  wanted, figures, scored = first_update()
  found, others, bare = first_update(rescore=False)
  assert 'old_logprobs' in scored.arrays
  assert 'old_logprobs' not in bare.arrays
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6),
    found, wanted,
  )  # fmt: skip
  for name in ('loss', 'gradient_norm', 'sampler/logprob_gap_max'):
    assert others[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize('shares', [True, False])
def test_minibatches_of_a_run_keep_groups_whole(shares):
  recipe, *_ = algorithm(num_minibatches=2, share_prompts=shares)
  rows, _ = minibatches(recipe, 0, 0, 0)
  size = recipe.sampling.num_samples
  groups = [np.bincount(r // size, minlength=recipe.rl.num_prompts)
            for r in map(np.asarray, rows)]  # fmt: skip
  assert np.all(np.sum(groups, axis=0) == size)
  assert shares == all(np.isin(g, (0, size)).all() for g in groups)


def test_several_updates_of_shared_prompts_are_those_of_repeated_ones(
  tmp_path, monkeypatch
):
  """Through the trainer, both cut into minibatches by groups."""
  monkeypatch.setattr(Recipe, 'unit_size', property(lambda recipe: GROUP))
  found = {}
  for shares in (True, False):
    config = tiny.arithmetic()
    GROUP = config.sampling.num_samples
    config.rl.update(num_minibatches=2, share_prompts=shares)
    config.rl.num_iterations, config.sft.num_steps = 1, 0
    found[shares] = Trainer(config, str(tmp_path / str(shares))).run().params
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
    found[True], found[False],
  )  # fmt: skip
