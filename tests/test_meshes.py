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

from postrain import aggregation, critics, kl, losses, objectives, sharding
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
  model = model_of(kind)
  return {'actor': model, 'critic': critics.shared(model, seed=0).model}


@functools.cache
def params_of(kind):
  """Of a fresh actor, and of a head whose values reach back into it."""
  actor = jax.jit(model_of(kind).init)(jax.random.key(0))
  head = np.random.default_rng(1).standard_normal((32, 1), np.float32)
  return {'actor': jax.device_get(actor), 'critic': {'head': head}}


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
      'policy': token, 'kl': sequence, 'value': token, 'sft': token,
      'preference': jnp.full((ROWS,), 2 / ROWS, jnp.float32),
    },
    arrays={
      'advantages': noise(), 'old_logprobs': noise() / 4 - 2.7,
      'ref_logprobs': noise() / 4 - 2.7, 'returns': noise(),
      'old_values': noise(),
    },
  )  # fmt: skip


def objectives_of(kind):
  """Terms of GRPO and of a critic as one objective, and those of DPO and SFT.

  So that the network is read as rarely as can be: compiling it takes the time.
  """
  model, critic = roles_of(kind).values()
  policy = objectives.policy_gradient(
    model, loss=losses.ppo_clip, kl=kl.k3, kl_coef=0.1, critic=critic,
    value_loss=losses.clipped_squared_error, value_coef=0.5,
    trunk=lambda states: states, chunk_size=2,
  )  # fmt: skip
  pairs = objectives.preference(
    model, loss=losses.dpo, sft_coef=0.5, chunk_size=4
  )
  shared = SharedPrompts(length=PROMPT, num_samples=2)
  return {'policy': (policy, shared), 'pairs': (pairs, None)}


def compiled(kind, **sizes):
  """Loss and gradient of all objectives on a mesh, and where things lie."""
  mesh = sharding.make_mesh(**sizes)
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
      for name, (fn, packing) in objectives_of(kind).items()
    }

  with sharding.on(mesh):
    params = jax.device_put(params_of(kind), places)
    rows, whole = sharding.put_rows(mesh, leaves), sharding.replicated(mesh)
    out = dict.fromkeys(objectives_of(kind), (whole, places))
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


CUT = {'all-reduce', 'all-gather', 'reduce-scatter'}
ALLOWED = {
  'data8': {'all-reduce'},
  'tensor8': {'all-reduce'},
  'fsdp8': CUT,
  'data2-fsdp2-tensor2': CUT,
}


def kind_of(sizes):
  return 'experts' if 'expert' in sizes else 'dense'


def name_of(sizes):
  return '-'.join(f'{name}{size}' for name, size in sizes.items())


@pytest.mark.parametrize('sizes', QUICK, ids=name_of)
def test_a_mesh_changes_no_loss_and_no_gradient(sizes):
  traffic = check_gradients(kind_of(sizes), sizes)
  assert traffic <= ALLOWED.get(name_of(sizes), set(KINDS))


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
  # Made on no mesh, for they are kept for all.
  prompts, mask = batch().tokens[:, :PROMPT], batch().valid[:, :PROMPT]
  params = params_of(kind)['actor']
  with sharding.on(mesh):
    places = sharding.param_shardings(mesh, model)
    params = jax.device_put(params, places)
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
  objective, _ = objectives_of('dense')['pairs']
  params = {'actor': model.shapes}
  message = '16 tokens of a row do not divide over mesh.context=3'
  with sharding.on(mesh), pytest.raises(ValueError, match=message):
    jax.eval_shape(objective, params, {}, batch())
