"""Losses, gradients and samples do not depend on how devices share the work."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import aggregation, kl, losses, objectives, sharding
from postrain.models.heads import scalar_head
from postrain.models.transformer import Config, transformer
from postrain.sampling import sample
from postrain.types import Batch, SharedPrompts

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
QUICK = [
  {'data': 8},
  {'fsdp': 8},
  {'tensor': 8},
  {'context': 8},
  {'expert': 4, 'tensor': 2},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'fsdp': 2, 'context': 2, 'tensor': 2},
  {'data': 2, 'expert': 2, 'context': 2},
]
EVERY = [
  {name: size for name, size in zip(AXES, sizes, strict=True) if size > 1}
  for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
  if math.prod(sizes) == 8
]
KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip
ROWS, PROMPT, LENGTH, VOCAB = 16, 8, 16, 16


@functools.cache
def model_of(kind):
  experts = dict(num_experts=4, experts_per_token=2)
  return transformer(
    Config(
      vocab_size=VOCAB, num_layers=2, model_dim=32, mlp_dim=32, num_heads=8,
      num_kv_heads=8, head_dim=4, max_length=LENGTH, tie_embeddings=False,
      **(experts if kind == 'experts' else {}),
    )
  )  # fmt: skip


def roles_of(kind):
  return {'actor': model_of(kind), 'critic': scalar_head(model_of(kind))}


@functools.cache
def params_of(kind):
  return jax.device_get(
    {
      role: jax.jit(model.init)(jax.random.key(number))
      for number, (role, model) in enumerate(roles_of(kind).items())
    }
  )


@functools.cache
def batch():
  """Rows of 2 prompts' groups, whose completions differ in length."""
  draw = np.random.default_rng(0)
  shape = (ROWS, LENGTH)
  tokens = draw.integers(1, VOCAB, shape)
  tokens[:, :PROMPT] = np.repeat(tokens[::2, :PROMPT], 2, axis=0)
  slots = np.arange(LENGTH)[None]
  mask = (slots >= PROMPT) & (slots < draw.integers(10, 17, (ROWS, 1)))
  valid = mask | (slots < PROMPT) & (slots >= 2)

  def noise():
    return jnp.asarray(draw.standard_normal(shape), jnp.float32)

  sequence = aggregation.sequence_mean(jnp.asarray(mask))
  token = aggregation.token_mean(jnp.asarray(mask))
  return Batch(
    tokens=jnp.asarray(tokens, jnp.int32),
    valid=jnp.asarray(valid),
    mask=jnp.asarray(mask),
    weights={
      'policy': token, 'kl': sequence, 'value': token,
      'preference': jnp.full((ROWS,), 2 / ROWS, jnp.float32),
    },
    arrays={
      'advantages': noise(), 'old_logprobs': noise() / 4 - 2.7,
      'ref_logprobs': noise() / 4 - 2.7, 'returns': noise(),
      'old_values': noise(),
    },
  )  # fmt: skip


def objectives_of(model):
  """SFT, GRPO, PPO with a critic and DPO, each of its own reading."""
  grpo = objectives.policy_gradient(
    model, loss=losses.ppo_clip, kl=kl.k3, kl_coef=0.1, chunk_size=2
  )
  ppo = objectives.policy_gradient(
    model, loss=losses.ppo_clip, value_loss=losses.clipped_squared_error,
    value_coef=0.5, critic=scalar_head(model), chunk_size=4,
  )  # fmt: skip
  shared = SharedPrompts(length=PROMPT, num_samples=2)
  return {
    'sft': (objectives.supervised(
      model, loss=losses.negative_log_likelihood, chunk_size=4), None),
    'grpo': (grpo, shared),
    'ppo': (ppo, None),
    'dpo': (objectives.preference(model, loss=losses.dpo, chunk_size=4), None),
  }  # fmt: skip


def compiled(kind, **sizes):
  """Loss and gradient of all objectives on a mesh, and where things lie."""
  model, mesh = model_of(kind), sharding.make_mesh(**sizes)
  places = {
    role: sharding.param_shardings(mesh, model)
    for role, model in roles_of(kind).items()
  }

  leaves, structure = jax.tree.flatten(batch())

  def step(params, leaves):
    read = jax.tree.unflatten(structure, leaves)
    return {
      name: jax.value_and_grad(
        lambda p, fn=fn, packing=packing: fn(
          p, {}, read.replace(packing=packing)
        )[0]
      )(params)
      for name, (fn, packing) in objectives_of(model).items()
    }

  with sharding.on(mesh):
    params = jax.device_put(params_of(kind), places)
    rows, whole = sharding.put_rows(mesh, leaves), sharding.replicated(mesh)
    out = dict.fromkeys(objectives_of(model), (whole, places))
    traced = jax.jit(step, out_shardings=out).trace(params, rows)
    program = traced.lower().compile()
    return jax.device_get(program(params, rows)), program.as_text()


@functools.cache
def on_one_device(kind):
  return compiled(kind)[0]


def check_gradients(kind, sizes):
  found, text = compiled(kind, **sizes)
  for (path, a), (_, b) in zip(
    jax.tree.leaves_with_path(found),
    jax.tree.leaves_with_path(on_one_device(kind)),
    strict=True,
  ):
    scale = np.abs(b).max()
    np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path)
    )
  return {
    match[1]
    for line in text.splitlines()
    if (match := re.search(rf' ({"|".join(KINDS)})(?:-start)?\(', line))
  }


ALLOWED = {
  'data': {'all-reduce'},
  'tensor': {'all-reduce'},
  'fsdp': {'all-reduce', 'all-gather', 'reduce-scatter'},
}


def kind_of(sizes):
  return 'experts' if 'expert' in sizes else 'dense'


def name_of(sizes):
  return '-'.join(f'{name}{size}' for name, size in sizes.items())


@pytest.mark.parametrize('sizes', QUICK, ids=name_of)
def test_a_mesh_changes_no_loss_and_no_gradient(sizes):
  traffic = check_gradients(kind_of(sizes), sizes)
  (*others, axis) = sizes
  if not others and axis in ALLOWED:
    assert traffic <= ALLOWED[axis]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dense', 'experts'])
@pytest.mark.parametrize('sizes', EVERY, ids=name_of)
def test_no_mesh_changes_a_loss_or_a_gradient(sizes, kind):
  if sizes not in QUICK or kind != kind_of(sizes):
    check_gradients(kind, sizes)


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['data', 'fsdp', 'tensor'])
def test_more_devices_bring_no_other_kind_of_traffic(axis):
  kinds = [check_gradients('dense', {axis: n}) for n in (2, 4, 8)]
  assert kinds[0] == kinds[1] == kinds[2]


def drawn(kind, sizes):
  model, mesh = model_of(kind), sharding.make_mesh(**sizes)
  with sharding.on(mesh):
    places = sharding.param_shardings(mesh, model)
    params = jax.device_put(params_of(kind)['actor'], places)
    prompts, mask = batch().tokens[:, :PROMPT], batch().valid[:, :PROMPT]
    program = jax.jit(
      sharding.for_sampling(
        functools.partial(
          sample, model, num_samples=2, max_new_tokens=LENGTH - PROMPT,
          stop_ids=(3,), pad_id=0,
        )
      )
    )  # fmt: skip
    placed = sharding.put_rows(mesh, (prompts, mask))
    return jax.device_get(program(params, *placed, jax.random.key(7)))


@functools.cache
def drawn_on_one_device(kind):
  return drawn(kind, {})


def check_samples(kind, sizes):
  found, expected = drawn(kind, sizes), drawn_on_one_device(kind)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_array_equal(found.mask, expected.mask)
  np.testing.assert_allclose(
    found.sampler_logprobs, expected.sampler_logprobs, atol=1e-5
  )


@pytest.mark.parametrize('sizes', QUICK[5:], ids=name_of)
def test_a_mesh_changes_no_sample(sizes):
  check_samples(kind_of(sizes), sizes)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dense', 'experts'])
@pytest.mark.parametrize('sizes', EVERY, ids=name_of)
def test_no_mesh_changes_a_sample(sizes, kind):
  check_samples(kind, sizes)


def test_rows_that_do_not_divide_over_context_are_an_error():
  model, mesh = model_of('dense'), sharding.make_mesh(context=3)
  objective, _ = objectives_of(model)['sft']
  params = {'actor': model.shapes}
  message = '16 tokens of a row do not divide over mesh.context=3'
  with sharding.on(mesh), pytest.raises(ValueError, match=message):
    jax.eval_shape(objective, params, {}, batch())
