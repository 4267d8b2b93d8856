"""Adapters train, the base keeps its bits, and PEFT reads what was trained."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain import (
  actors,
  aggregation,
  environments,
  hub,
  losses,
  objectives,
  optimizers,
  peft,
  sharding,
)
from postrain.adapted import Adapted, bases, rejoined, trainable
from postrain.binding import bind
from postrain.models import wrap
from postrain.models.heads import scalar_head
from postrain.models.lora import LoRA, lora, merged
from postrain.models.transformer import Config, transformer
from postrain.train_step import make_train_step
from postrain.trainer import Trainer
from postrain.types import Batch, TrainState

quick_compiler = tiny.quick_compiler

CONFIG = Config(
  vocab_size=13, num_layers=2, model_dim=8, mlp_dim=12, num_heads=4,
  num_kv_heads=2, head_dim=4, max_length=32, qkv_bias=True, family='qwen2',
)  # fmt: skip
ALL = 'layers/(query|key|value|output|gate|up|down)'
SPEC = LoRA(rank=3, alpha=6, targets=ALL)
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
  positions = jnp.tile(jnp.arange(3, dtype=jnp.int32), (4, 1))
  ones = jnp.ones_like(TOKENS)
  hidden, _ = model.hidden(
    params, TOKENS, positions=positions, segment_ids=ones
  )
  return model.unembed(params, hidden)


def drawn(shapes):
  """Parameters with adapters that do something."""
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: draw.normal(scale=0.3, size=x.shape).astype(x.dtype), shapes
  )


def parameters(model):
  return drawn(jax.eval_shape(model.init, KEY))


@functools.cache
def decoder():
  model = lora(transformer(CONFIG), SPEC)
  return model, jax.jit(model.init)(KEY)


def test_at_the_start_it_is_the_base_to_the_bit():
  model, params = decoder()
  base = transformer(CONFIG)
  own = jax.jit(base.init)(KEY)
  jax.tree.map(np.testing.assert_array_equal, params.base, own)
  np.testing.assert_array_equal(logits(model, params), logits(base, own))
  shapes = jax.tree.map(jnp.shape, params.adapters['layers'])
  assert shapes['query'] == {'a': (2, 8, 3), 'b': (2, 3, 4, 4)}
  assert shapes['output'] == {'a': (2, 4, 4, 3), 'b': (2, 3, 8)}
  assert sorted(shapes) == sorted(ALL[8:-1].split('|'))


def mixture():
  config = dataclasses.replace(
    CONFIG, num_experts=4, experts_per_token=2, shared_mlp_dim=6,
    family='qwen2_moe',
  )  # fmt: skip
  return transformer(config), 'layers/(query|shared_gate|shared_down)'


def stranger():
  """A network that knows nothing of adapters."""

  def init(key):
    return {'table': jax.random.normal(key, (13, 8)), 'out': jnp.eye(8, 13)}

  return wrap.plain(
    init,
    lambda params, tokens, *_: jnp.tanh(params['table'][tokens]),
    lambda params, hidden: hidden @ params['out'],
    13,
  ), 'table|out'


@pytest.mark.parametrize(
  'make', [lambda: (transformer(CONFIG), ALL), mixture, stranger]
)
def test_merged_equals_unmerged(make):
  base, targets = make()
  spec = LoRA(rank=3, alpha=6, targets=targets, rank_stabilized=True)
  model = lora(base, spec)
  params = parameters(model)
  found = logits(model, params)
  np.testing.assert_allclose(
    found, logits(base, merged(params, spec)), atol=1e-5
  )
  assert jnp.abs(found - logits(base, params.base)).max() > 0.01


def test_scales():
  assert SPEC.scale == 2
  assert dataclasses.replace(SPEC, rank=9, rank_stabilized=True).scale == 2
  weight = {'w': jnp.zeros((4, 5))}
  ones = {'w': {'a': jnp.ones((4, 3)), 'b': jnp.ones((3, 5))}}
  found = merged(Adapted(weight, ones), SPEC)['w']
  np.testing.assert_array_equal(found, jnp.full((4, 5), 6.0))


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'rank': 0}, 'rank=0'),
    ({'alpha': 0}, 'alpha=0'),
    ({'targets': '('}, 'no regular expression'),
    ({'targets': 'query'}, "'query' matches nothing: .*layers/query"),
    ({'targets': '.*'}, 'has .*embedding.*attention_norm'),
  ],
)
def test_what_cannot_be_adapted_is_named(change, words):
  with pytest.raises(ValueError, match=words):
    lora(transformer(CONFIG), dataclasses.replace(SPEC, **change))
  with pytest.raises(ValueError, match=r'has layers/gate: .*shared_gate'):
    lora(mixture()[0], dataclasses.replace(SPEC, targets='layers/gate'))


# Training.


def batch():
  mask = jnp.ones(TOKENS.shape, bool).at[:, 0].set(False)
  weights = {'policy': aggregation.token_mean(mask)}
  return Batch(TOKENS, jnp.ones(TOKENS.shape, bool), mask, weights, {})


def supervised(model):
  return objectives.supervised(model, loss=losses.negative_log_likelihood)


@functools.cache
def trained():
  """Fifty steps with clipping, weight decay and two micro-batches."""
  model, params = decoder()
  optimizer = optimizers.adamw(learning_rate=0.03, weight_decay=0.1)
  params = {'actor': jax.tree.map(jnp.copy, params)}
  state = TrainState(
    jnp.int32(0), params, optimizer.init(trainable(params)), None
  )
  step = jax.jit(
    make_train_step(supervised(model), optimizer, num_micro_batches=2),
    donate_argnums=0,
  )
  figures = []
  for _ in range(50):
    state, metrics = step(state, {}, batch())
    figures.append(float(metrics['loss'].total))
  return state, figures


def test_the_base_keeps_its_bits_for_fifty_steps():
  state, figures = trained()
  before, after = decoder()[1], state.params['actor']
  for old, new in zip(*map(jax.tree.leaves, (before.base, after.base)),
                      strict=True):  # fmt: skip
    assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
  for old, new in zip(
    *map(jax.tree.leaves, (before.adapters, after.adapters)), strict=True
  ):
    assert (old != new).mean() > 0.9
  assert figures[-1] < 0.95 * figures[0]


def test_the_optimiser_knows_the_adapters_alone():
  state, _ = trained()
  shapes = sorted(x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim)
  adapters = jax.tree.leaves(state.params['actor'].adapters)
  assert shapes == sorted([x.shape for x in adapters] * 2)


def test_a_trained_merge_equals_the_adapters():
  state, _ = trained()
  params = state.params['actor']
  np.testing.assert_allclose(
    logits(decoder()[0], params),
    logits(transformer(CONFIG), merged(params, SPEC)),
    atol=1e-5,
  )


@pytest.mark.parametrize('num_micro_batches', [1, 2])
def test_no_gradient_of_the_base_is_ever_asked_for(num_micro_batches):
  """A base whose backward pass raises does for training."""

  @jax.custom_vjp
  def guarded(x):
    return x

  def refuse(_, cotangent):
    raise AssertionError('the gradient of the base')

  guarded.defvjp(lambda x: (x, None), refuse)
  model, params = decoder()
  watched = dataclasses.replace(
    model,
    hidden=lambda params, *args, **how: model.hidden(
      params._replace(base=jax.tree.map(guarded, params.base)), *args, **how
    ),
  )
  with pytest.raises(AssertionError, match='gradient of the base'):
    jax.eval_shape(
      jax.grad(lambda p: logits(watched, p).sum()), params
    )  # it does raise
  optimizer = optimizers.sgd(learning_rate=0.1)
  step = make_train_step(
    supervised(watched), optimizer, num_micro_batches=num_micro_batches
  )
  params = {'actor': params}
  state = TrainState(jnp.int32(0), params, optimizer.init(trainable(params)))
  jax.eval_shape(step, state, {}, batch())


def test_a_tree_is_taken_apart_and_rejoined():
  tree = {'a': Adapted({'w': 1}, {'w': 2}), 'b': [3, Adapted(4, 5)]}
  parts = trainable(tree)
  assert jax.tree.leaves(parts) == [2, 3, 5]
  assert bases(tree) == [{'w': 1}, 4]
  assert rejoined(parts, bases(tree)) == tree
  plain = {'w': 1}
  assert trainable(plain) == rejoined(plain, []) == plain


def test_a_head_stands_on_an_adapted_backbone():
  model = scalar_head(decoder()[0])
  params = parameters(model)
  assert bases(params)[0].keys() == decoder()[1].base.keys()
  assert logits(model, params).shape == (4, 3, 1)


def test_adapters_are_cut_as_their_kernels():
  model, params = decoder()
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  placed = sharding.param_shardings(mesh, model)
  found = jax.tree.map(
    lambda s: s.spec, placed.adapters['layers']['query'],
    is_leaf=lambda s: hasattr(s, 'spec'),
  )  # fmt: skip
  assert tuple(found['a']) == (None, 'fsdp')
  assert tuple(found['b']) == (None, None, 'tensor')
  params = drawn(params)
  with sharding.on(mesh):
    cut = logits(model, jax.device_put(params, placed))
  np.testing.assert_allclose(cut, logits(model, params), atol=1e-5)


# Files.

FAMILIES = {
  'qwen2': CONFIG,
  'phi3': dataclasses.replace(CONFIG, family='phi3', qkv_bias=False,
                              tie_embeddings=False),
  'gpt2': dataclasses.replace(
    CONFIG, family='gpt2', num_kv_heads=4, head_dim=2, norm='layer',
    position_embedding='learned', output_bias=True, mlp_bias=True,
    gated_mlp=False, activation='gelu_tanh',
  ),
}  # fmt: skip


@pytest.mark.parametrize('stabilized', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_files_of_peft_keep_the_function(tmp_path, family, stabilized):
  config = FAMILIES[family]
  spec = LoRA(
    rank=2, alpha=3, targets='layers/(query|value|output|up|down)',
    rank_stabilized=stabilized,
  )  # fmt: skip
  params = parameters(lora(transformer(config), spec))
  peft.save(tmp_path, config, spec, params.adapters)
  found, adapters = peft.load(tmp_path, config)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    merged(Adapted(params.base, adapters), found),
    merged(params, spec),
  )
  lora(transformer(config), found)  # its targets are paths of the model
  if family == 'qwen2':
    assert found.targets.split('|') == [
      f'layers/{name}' for name in ('down', 'output', 'query', 'up', 'value')
    ]
    jax.tree.map(np.testing.assert_array_equal, adapters, params.adapters)
    block = json.loads((tmp_path / peft.CONFIG).read_text())
    assert block['target_modules'][0] == 'mlp.down_proj'
    assert block['rank_pattern'] == {}


def test_foreign_adapters_are_refused(tmp_path):
  _, params = decoder()
  with pytest.raises(ValueError, match=r'lacks adapter_config\.json'):
    peft.load(tmp_path, CONFIG)
  peft.save(tmp_path, CONFIG, SPEC, params.adapters)
  with pytest.raises(ValueError, match=r'unexpected .*layers\.1\.'):
    peft.load(tmp_path, dataclasses.replace(CONFIG, num_layers=1))
  with pytest.raises(ValueError, match='3 layers: adapt all of them'):
    peft.load(tmp_path, dataclasses.replace(CONFIG, num_layers=3))
  block = json.loads((tmp_path / peft.CONFIG).read_text())
  (tmp_path / peft.CONFIG).write_text(json.dumps({**block, 'use_dora': True}))
  with pytest.raises(ValueError, match='use_dora=True'):
    peft.load(tmp_path, CONFIG)
  broken = jax.tree.map(lambda x: x * jnp.nan, params.adapters)
  with pytest.raises(ValueError, match=r'lora_A\.weight holds NaN'):
    peft.save(tmp_path, CONFIG, SPEC, broken)


@pytest.mark.filterwarnings('ignore')  # of libraries that are not ours
@pytest.mark.parametrize('kind', ['Qwen2', 'Phi3'])
def test_transformers_with_peft_computes_the_same(tmp_path, kind):
  """Both ways; Phi-3's files have query, key and value in one matrix."""
  torch = pytest.importorskip('torch', reason='parity needs torch')
  theirs = pytest.importorskip('peft', reason='parity needs peft')
  transformers = pytest.importorskip('transformers')
  config = getattr(transformers, f'{kind}Config')(
    vocab_size=13, num_hidden_layers=2, hidden_size=16, intermediate_size=24,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
  )  # fmt: skip
  torch.manual_seed(0)
  network = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
  network.save_pretrained(tmp_path)
  loaded = hub.load(tmp_path)
  spec = LoRA(
    rank=2, alpha=5, targets='layers/(query|value|output|up)',
    rank_stabilized=True,
  )  # fmt: skip
  model = lora(loaded.model, spec)
  params = Adapted(loaded.params, parameters(model).adapters)
  peft.save(tmp_path / 'ours', loaded.config, spec, params.adapters)
  adapted = theirs.PeftModel.from_pretrained(network, tmp_path / 'ours')
  tokens = torch.tensor(np.asarray(TOKENS))
  expected = adapted(tokens).logits.detach().numpy()
  np.testing.assert_allclose(logits(model, params), expected, atol=1e-4)

  choices = theirs.LoraConfig(
    r=3, lora_alpha=7, target_modules='all-linear', init_lora_weights=False
  )
  other = theirs.get_peft_model(adapted.unload(), choices).eval()
  other.save_pretrained(tmp_path / 'theirs')
  spec, adapters = peft.load(tmp_path / 'theirs', loaded.config)
  found = logits(lora(loaded.model, spec), Adapted(loaded.params, adapters))
  expected = other(tokens).logits.detach().numpy()
  np.testing.assert_allclose(found, expected, atol=1e-4)


# A whole run.


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Two iterations on adapters, with a moving reference."""
  config = tiny.arithmetic()
  config.model.lora = dict(rank=2, alpha=4.0, targets='layers/(query|down)')
  config.kl.loss_coef = 0.1
  config.reference = dict(update='ema', decay=0.5, every=1, memory='device')
  config.evaluation.every = config.sft.num_steps = 0
  directory = tmp_path_factory.mktemp('lora')
  trainer = Trainer(config, str(directory))
  return config, directory, trainer, trainer.run()


def test_a_run_trains_adapters_only(whole):
  _, _, trainer, state = whole
  with sharding.on(trainer.mesh):
    fresh = trainer._states.fresh().params['actor']
  params = state.params['actor']
  jax.tree.map(np.testing.assert_array_equal, params.base, fresh.base)
  assert all(np.any(x != 0) for x in jax.tree.leaves(params.adapters))
  assert state.ref_params.base is None
  assert jax.tree.structure(state.ref_params) == jax.tree.structure(
    trainable(params)
  )


def test_a_restored_run_has_its_base_from_one_file(whole):
  config, directory, _, state = whole
  again = Trainer(config, str(directory)).run()
  jax.tree.map(np.testing.assert_array_equal, again, state)
  names = sorted(p.name for p in (directory / 'checkpoints').iterdir())
  assert names == ['2', 'base']


def test_a_run_exports_the_merged_model_and_the_adapter(whole):
  _, directory, _, state = whole
  exported = hub.load(directory / 'export')
  found, adapters = peft.load(directory / 'export' / 'adapter', exported.config)
  params = state.params['actor']
  jax.tree.map(np.testing.assert_array_equal, adapters, params.adapters)
  assert found.targets == 'layers/down|layers/query'
  whole_params = merged(params, found)
  jax.tree.map(np.testing.assert_array_equal, exported.params, whole_params)


def test_a_pretrained_base_is_what_the_files_have(tmp_path):
  loaded = drawn(jax.eval_shape(transformer(CONFIG).init, KEY))
  hub.save(tmp_path, CONFIG, loaded)
  recipe = tiny.sort()
  environment = bind(environments, recipe.environment.to_dict())(
    0, recipe.rewards.to_dict()
  )
  actor = actors.pretrained(
    environment, directory=str(tmp_path), lora=dataclasses.asdict(SPEC)
  )
  placed = sharding.param_shardings(sharding.make_mesh(fsdp=2), actor.model)
  params = actor.init(KEY, placed)
  jax.tree.map(np.testing.assert_array_equal, params.base, loaded)
  assert params.base['embedding'].sharding.spec[1] == 'fsdp'
  with pytest.raises(ValueError, match=r"model\.lora .*'ranks'"):
    actors.pretrained(
      environment, directory=str(tmp_path), lora=dict(ranks=2, alpha=1.0)
    )
