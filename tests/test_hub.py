"""Directories in and out: bits survive, and what is broken is refused."""

import dataclasses
import json

from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from postrain import hub
from postrain.models import families
from postrain.models.transformer import Config

TINY = Config(
  vocab_size=13, num_layers=2, model_dim=8, mlp_dim=12, num_heads=4,
  num_kv_heads=2, head_dim=4, max_length=32, rope_theta=500.0, norm_eps=1e-5,
)  # fmt: skip
KINDS = {
  'llama': {},
  'llama_untied': {'tie_embeddings': False},
  'qwen2': {'family': 'qwen2', 'qkv_bias': True},
  'qwen3': {'family': 'qwen3', 'qk_norm': True, 'tie_embeddings': False},
}


def parameters(config):
  """Distinct numbers in the shapes of the model."""
  draw = np.random.default_rng(0)
  return traverse_util.unflatten_dict(
    {
      path: draw.normal(size=shape).astype(config.param_dtype)
      for path, shape in families.param_shapes(config).items()
    }
  )


def assert_same_bits(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def written(tmp_path):
  params = parameters(TINY)
  hub.save(tmp_path / 'model', TINY, params)
  return tmp_path / 'model'


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('max_shard_bytes', [10**9, 600, 1])
def test_a_round_trip_keeps_every_bit(tmp_path, kind, max_shard_bytes):
  config = dataclasses.replace(TINY, **KINDS[kind])
  params = parameters(config)
  hub.save(tmp_path / 'a', config, params, max_shard_bytes=max_shard_bytes)
  loaded = hub.load(tmp_path / 'a')
  assert loaded.config == config
  assert_same_bits(loaded.params, params)
  shards = sorted(p.name for p in (tmp_path / 'a').glob('*.safetensors'))
  if max_shard_bytes == 10**9:
    assert shards == ['model.safetensors']
  else:
    index = json.loads((tmp_path / 'a' / hub.INDEX).read_text())
    assert set(index['weight_map'].values()) == set(shards)
    assert len(shards) > 2
    assert index['metadata']['total_size'] == sum(
      x.nbytes for x in jax.tree.leaves(params)
    )
  assert list(tmp_path.iterdir()) == [tmp_path / 'a']  # no scratch is left


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_files(tmp_path, dtype):
  config = dataclasses.replace(TINY, param_dtype=dtype, dtype=dtype)
  params = parameters(config)
  hub.save(tmp_path / 'a', config, params)
  loaded = hub.load(tmp_path / 'a', dtype=dtype)
  assert loaded.config == config
  assert_same_bits(loaded.params, params)
  block = json.loads((tmp_path / 'a' / 'config.json').read_text())
  assert block['dtype'] == dtype
  wide = hub.load(tmp_path / 'a')
  np.testing.assert_array_equal(
    wide.params['embedding'],
    np.asarray(params['embedding']).astype(np.float32),
  )
  assert ml_dtypes.bfloat16 != wide.params['embedding'].dtype == np.float32


def test_an_export_is_replaced_only_on_request(written, tmp_path):
  params = jax.tree.map(lambda x: x + 1, parameters(TINY))
  with pytest.raises(ValueError, match='not empty'):
    hub.save(written, TINY, params)
  hub.save(written, TINY, params, overwrite=True)
  assert_same_bits(hub.load(written).params, params)
  other = tmp_path / 'home'
  other.mkdir()
  (other / 'thesis.txt').write_text('precious')
  with pytest.raises(ValueError, match='not empty'):
    hub.save(other, TINY, params, overwrite=True)
  assert (other / 'thesis.txt').read_text() == 'precious'


def test_a_failed_save_leaves_nothing(tmp_path):
  params = parameters(TINY)
  params['final_norm'][3] = np.nan
  with pytest.raises(ValueError, match=r'model\.norm\.weight holds NaN'):
    hub.save(tmp_path / 'a', TINY, params)
  del params['final_norm']
  with pytest.raises(ValueError, match=r"differ in .*'final_norm'"):
    hub.save(tmp_path / 'a', TINY, params)
  assert not list(tmp_path.iterdir())


def test_all_files_have_the_same_readers(written):
  assert len({path.stat().st_mode for path in written.iterdir()}) == 1


def test_tokenizer_files_travel(tmp_path, written):
  source = tmp_path / 'tokenizer'
  source.mkdir()
  (source / 'tokenizer.json').write_text('{}')
  (source / 'secret.txt').write_text('no')
  templates = ('chat_template.jinja', 'additional_chat_templates/tools.jinja')
  (source / 'additional_chat_templates').mkdir()
  for name in templates:
    (source / name).write_text(name)
  (source / 'generation_config.json').write_text('{"eos_token_id": [1, 2]}')
  hub.save(tmp_path / 'a', TINY, parameters(TINY), tokenizer=source)
  assert (tmp_path / 'a' / 'tokenizer.json').read_text() == '{}'
  assert not (tmp_path / 'a' / 'secret.txt').exists()
  for name in templates:
    assert (tmp_path / 'a' / name).read_text() == name
  kept = hub.load(tmp_path / 'a').generation_config
  assert kept == {'eos_token_id': [1, 2]}

  class Tokenizer:
    def save_pretrained(self, path):
      (path / 'tokenizer.json').write_text('saved')

  hub.save(
    tmp_path / 'b', TINY, parameters(TINY), tokenizer=Tokenizer(),
    generation_config=kept,
  )  # fmt: skip
  assert (tmp_path / 'b' / 'tokenizer.json').read_text() == 'saved'
  assert hub.load(tmp_path / 'b').generation_config == kept
  with pytest.raises(ValueError, match='no tokenizer files'):
    hub.save(tmp_path / 'c', TINY, parameters(TINY), tokenizer=tmp_path / 'no')


def change_tensors(directory, change):
  tensors = load_file(directory / hub.SINGLE)
  change(tensors)
  save_file(tensors, directory / hub.SINGLE)


def poison(tensors):
  tensors['model.layers.1.mlp.up_proj.weight'][0, 0] = np.nan


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda t: t.pop('model.norm.weight'), r'lacks 1 .*model\.norm\.weight'),
    (lambda t: t.update(odd=np.zeros(2)), r'1 unexpected \(odd\)'),
    (
      lambda t: t.update({'model.norm.weight': np.zeros(9, np.float32)}),
      r'model\.norm\.weight has shape \(9,\), expected \(8,\)',
    ),
    (poison, r'layers\.1\.mlp\.up_proj\.weight holds NaN'),
    (
      lambda t: t.update({'lm_head.weight': np.zeros((13, 8), np.float32)}),
      'tie_word_embeddings',
    ),
  ],
)
def test_wrong_tensors_are_refused(written, change, words):
  change_tensors(written, change)
  with pytest.raises(ValueError, match=words):
    hub.load(written)


GPT2 = dict(
  family='gpt2', num_kv_heads=4, head_dim=2, position_embedding='learned',
  norm='layer', norm_eps=1e-5, qkv_bias=True, output_bias=True, mlp_bias=True,
  gated_mlp=False, activation='gelu_tanh', rope_theta=10_000.0,
)  # fmt: skip
GEMMA2 = dict(
  family='gemma2', norm='rms_one_plus', norm_order='both',
  activation='gelu_tanh', embedding_scale=8**0.5, attention_scale=0.5,
  sliding_window=4, layer_types=('sliding', 'full'),
)  # fmt: skip


def bare(tensors, prefix):
  """Names of the model without its head."""
  for name in list(tensors):
    tensors[name.removeprefix(prefix)] = tensors.pop(name)


def of_gpt2(tensors):
  """As openai-community/gpt2 has them."""
  bare(tensors, 'transformer.')
  assert {'wte.weight', 'h.0.ln_1.weight', 'ln_f.bias'} < tensors.keys()
  masks(tensors, 'h')


def masks(tensors, layers):
  """What older transformers stored beside the parameters."""
  for i in range(2):
    tensors[f'{layers}.{i}.attn.bias'] = np.tri(32, dtype=bool)[None, None]
    tensors[f'{layers}.{i}.attn.masked_bias'] = np.array(-1e4, np.float32)


def frequencies(tensors):
  for i in range(2):
    name = f'model.layers.{i}.self_attn.rotary_emb.inv_freq'
    tensors[name] = np.ones(2, np.float32)


def twice(tensors):
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()


QUIRKS = {
  'gpt2': (GPT2, of_gpt2),
  'distilgpt2': (GPT2, lambda t: masks(t, 'transformer.h')),
  'DialoGPT': (
    GPT2,
    lambda t: t.update({'lm_head.weight': t['transformer.wte.weight'].copy()}),
  ),
  'Llama-2': (KINDS['llama_untied'], frequencies),
  'Qwen2 of an old export': (KINDS['qwen2'], frequencies),
  'Qwen3-Embedding': (
    {**KINDS['qwen3'], 'tie_embeddings': True}, lambda t: bare(t, 'model.'),
  ),
  'Gemma 2, fine-tuned': (GEMMA2, twice),
}  # fmt: skip


@pytest.mark.parametrize('kind', QUIRKS)
def test_what_published_files_have_beside_is_passed_over(tmp_path, kind):
  fields, change = QUIRKS[kind]
  config = dataclasses.replace(TINY, **fields)
  params = parameters(config)
  hub.save(tmp_path / 'a', config, params)
  change_tensors(tmp_path / 'a', change)
  loaded = hub.load(tmp_path / 'a')
  assert loaded.config == config
  assert_same_bits(loaded.params, params)


def test_files_of_phi_as_published(tmp_path):
  """Shards, an index that says more, and an archive of another tool beside."""
  config = dataclasses.replace(TINY, family='phi3', tie_embeddings=False)
  params = parameters(config)
  path = tmp_path / 'a'
  hub.save(path, config, params, max_shard_bytes=2000)
  assert len(list(path.glob('model-0000?-of-0000?.safetensors'))) > 1
  index = json.loads((path / hub.INDEX).read_text())
  assert 'model.layers.0.mlp.gate_up_proj.weight' in index['weight_map']
  index |= {'metadata': {'total_size': 1.5e9, 'mergekit_version': '0.1'}}
  (path / hub.INDEX).write_text(json.dumps(index | {'format': 'pt'}))
  (path / 'consolidated.safetensors').write_bytes(b'')
  assert_same_bits(hub.load(path).params, params)


@pytest.mark.parametrize(
  'name',
  ['../model.safetensors', '/etc/model.safetensors', 'a\\b.safetensors',
   'pytorch_model.bin', '.', 3],
)  # fmt: skip
def test_an_index_stays_in_its_directory(written, name):
  (written / hub.SINGLE).rename(written.parent / hub.SINGLE)
  block = {'weight_map': {'model.norm.weight': name}}
  (written / hub.INDEX).write_text(json.dumps(block))
  with pytest.raises(ValueError, match='beside the index'):
    hub.load(written)


def test_missing_files_are_named(tmp_path, written):
  with pytest.raises(ValueError, match=r'nowhere/config\.json is missing'):
    hub.load(tmp_path / 'nowhere')
  hub.save(tmp_path / 'a', TINY, parameters(TINY), max_shard_bytes=600)
  shard = sorted((tmp_path / 'a').glob('*.safetensors'))[1]
  shard.unlink()
  with pytest.raises(ValueError, match=f'lacks {shard.name}'):
    hub.load(tmp_path / 'a')
  (written / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='no JSON'):
    hub.load(written)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'model_type': 'mamba'}, "'mamba' is not supported; .*llama, .*qwen2"),
    ({'rope_scaling': {'type': 'yarn'}, 'rope_parameters': None}, 'yarn'),
    ({'rope_parameters': {'rope_type': 'llama3'}}, 'llama3'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'rope_parameters': {'rope_type': 'dynamic'}}, "'dynamic' .*linear"),
    ({'hidden_act': 'relu'}, "'relu' .*silu"),
    ({'use_sliding_window': True}, 'use_sliding_window=True'),
    ({'layer_types': ['sliding_attention']}, 'sliding_window'),
    ({'layer_types': ['chunked_attention']}, 'chunked_attention'),
    ({'model_type': 'gemma2', 'head_dim': None}, 'lacks head_dim'),
    ({'model_type': 'gemma2', 'attention_bias': True}, 'attention_bias=True'),
    ({'model_type': 'smollm3', 'use_sliding_window': True}, 'smollm3'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'hidden_size': ...}, 'lacks hidden_size'),
  ],
)
def test_unsupported_features_are_named(change, words):
  block = families.to_huggingface(TINY) | change
  block = {k: v for k, v in block.items() if v is not ...}
  with pytest.raises(ValueError, match=words):
    families.from_huggingface(block)


@pytest.mark.parametrize('kind', KINDS)
def test_configurations_round_trip(kind):
  config = dataclasses.replace(TINY, **KINDS[kind])
  block = families.to_huggingface(config)
  assert families.from_huggingface(block) == config
  old = {k: v for k, v in block.items() if k != 'rope_parameters'}
  assert families.from_huggingface(old) == config
  new = {k: v for k, v in block.items() if k != 'rope_theta'}
  assert families.from_huggingface(new) == config


def test_a_mixture_of_families_is_refused():
  config = dataclasses.replace(TINY, qkv_bias=True, qk_norm=True)
  with pytest.raises(ValueError, match=r"'llama' has no .*qk_norm=True"):
    families.to_huggingface(config)
