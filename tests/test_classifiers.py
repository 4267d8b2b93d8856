"""Reward models of Hugging Face, in and out, beside transformers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain import hub
from postrain.models import families
from postrain.models.config import Config
from postrain.models.heads import with_labels
from postrain.models.transformer import transformer

quick_compiler = tiny.quick_compiler
SHAPE = {
  'vocab_size': 31, 'num_hidden_layers': 2, 'hidden_size': 16,
  'intermediate_size': 24, 'num_attention_heads': 4, 'num_key_value_heads': 2,
  'head_dim': 4, 'max_position_embeddings': 64, 'rms_norm_eps': 1e-5,
  'initializer_range': 0.3, 'eos_token_id': 2, 'pad_token_id': 0,
}  # fmt: skip
EXPERTS = {
  'num_experts': 3, 'moe_intermediate_size': 12, 'decoder_sparse_step': 1,
  'num_experts_per_tok': 2,
}  # fmt: skip
FAMILIES = {
  'Llama': {'tie_word_embeddings': False},
  'Qwen2': {},
  'Qwen3': {},
  'Mistral': {'sliding_window': 3},
  'Gemma2': {'query_pre_attn_scalar': 4, 'final_logit_softcapping': 0.1},
  'Gemma3Text': {},
  'Phi3': {},
  'Olmo2': {},
  'SmolLM3': {},
  'GPT2': {'n_embd': 16, 'n_layer': 2, 'n_head': 4, 'n_positions': 64},
  'Qwen3Moe': EXPERTS,
  'Mixtral': {'num_local_experts': 3, 'num_experts_per_tok': 2},
}
CASES = [
  *((name, 'Sequence', 1) for name in ('Llama', 'Gemma2', 'GPT2', 'Mixtral')),
  ('Qwen2', 'Sequence', 5),
  ('Qwen2', 'Token', 2),
]
CASES += [
  pytest.param(name, kind, 1, marks=pytest.mark.slow)
  for name in FAMILIES
  for kind in ('Sequence', 'Token')
  if (name, kind, 1) not in CASES
  and (kind == 'Sequence' or name not in ('Gemma3Text', 'GPT2', 'Olmo2'))
]


def reference(name, kind, num_labels):
  """A random classifier of transformers, no bias 0 and no scale 1."""
  torch = pytest.importorskip('torch', reason='parity needs torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  config = getattr(transformers, f'{name}Config')(
    **SHAPE | FAMILIES[name], num_labels=num_labels
  )
  model = getattr(transformers, f'{name}For{kind}Classification')(config).eval()
  with torch.no_grad():
    for param in model.parameters():
      if param.ndim == 1:
        param.add_(0.3 * torch.randn_like(param))
  return torch, model


def text():
  """Rows of three lengths, padded right and left.

  One holds the padding token inside.
  """
  lengths, slots = np.array([7, 4, 2, 7, 4, 2])[:, None], np.arange(7)
  left = np.arange(6)[:, None] >= 3
  valid = np.where(left, slots >= 7 - lengths, slots < lengths)
  tokens = np.random.default_rng(0).integers(1, 31, (6, 7))
  tokens = np.where(valid, tokens, 0)
  tokens[0, 3] = 0
  return tokens, valid, np.maximum(valid.cumsum(-1) - 1, 0)


@functools.partial(jax.jit, static_argnums=0)
def every_logit(model, params, tokens, valid, positions):
  hidden, _ = model.hidden(
    params, tokens, positions=positions, segment_ids=valid.astype(jnp.int32)
  )
  return model.unembed(params, hidden)


def logits(torch, theirs):
  tokens, valid, positions = map(torch.tensor, text())
  with torch.no_grad():
    out = theirs(tokens, attention_mask=valid, position_ids=positions)
  return out.logits.numpy()


@pytest.mark.parametrize(('name', 'kind', 'num_labels'), CASES)
def test_logits_equal_those_of_transformers_both_ways(
  tmp_path, name, kind, num_labels
):
  torch, theirs = reference(name, kind, num_labels)
  theirs.save_pretrained(tmp_path / 'a')
  head = f'{kind.lower()}_labels'
  ours = hub.load(tmp_path / 'a', head=head)
  assert (ours.config.head, ours.config.num_labels) == (head, num_labels)
  _, valid, _ = text()
  found = every_logit(ours.model, ours.params, *map(jnp.asarray, text()))
  found, expected = np.asarray(found), logits(torch, theirs)
  read = np.s_[range(6), np.where(valid, np.arange(7), 0).max(-1)]
  assert np.abs(expected).max() > 0.2
  if kind == 'Token':
    np.testing.assert_allclose(found[valid], expected[valid], atol=1e-4)
  else:
    np.testing.assert_allclose(found[read], expected, atol=1e-4)
  hub.save(tmp_path / 'b', ours.config, ours.params, source=ours.source)
  again = type(theirs).from_pretrained(tmp_path / 'b')
  assert again.config.architectures == theirs.config.architectures
  assert again.config.num_labels == num_labels
  for key, value in theirs.state_dict().items():
    assert torch.equal(again.state_dict()[key], value), key
  # The same bits, but at other addresses, which may move the last one.
  np.testing.assert_allclose(logits(torch, again), expected, atol=1e-6)


TINY = Config(
  vocab_size=13, num_layers=2, model_dim=8, mlp_dim=12, num_heads=2,
  num_kv_heads=1, head_dim=4, max_length=32,
)  # fmt: skip
REWARD = {'head': 'sequence_labels', 'num_labels': 1}
IDS = {'eos_token_id': 2, 'pad_token_id': 0}


def parameters(config):
  shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: draw.normal(size=x.shape).astype(x.dtype), shapes
  )


def test_a_language_model_becomes_a_reward_model_that_starts_at_zero():
  config = dataclasses.replace(TINY, tie_embeddings=False)
  params = parameters(config)
  found, scored = with_labels(config, params, num_labels=2, head='token_labels')
  model = transformer(found)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert jax.tree.structure(scored) == jax.tree.structure(shapes)
  assert scored['score'].shape == shapes['score'].shape == (8, 2)
  axes = model.logical_axes()
  assert (axes['score'], axes['score_bias']) == (('width', None), (None,))
  tokens = jnp.arange(6).reshape(1, 6)
  out = every_logit(model, scored, tokens, tokens > -1, tokens)
  np.testing.assert_array_equal(out, jnp.zeros((1, 6, 2)))


def test_names_of_labels_and_tokens_travel(tmp_path):
  config = dataclasses.replace(TINY, **REWARD | {'num_labels': 2})
  source = IDS | {'id2label': {'0': 'wrong', '1': 'right'}}
  hub.save(tmp_path / 'a', config, parameters(config), source=source)
  block = json.loads((tmp_path / 'a' / 'config.json').read_text())
  assert block['id2label'] == source['id2label']
  assert block['label2id'] == {'wrong': 0, 'right': 1}
  assert block['architectures'] == ['LlamaForSequenceClassification']
  assert block['pad_token_id'] == 0
  del block['id2label']  # transformers leaves its two default labels out
  assert families.from_huggingface(block) == config


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(tmp_path):
  config = dataclasses.replace(TINY, **REWARD)
  hub.save(tmp_path / 'a', config, parameters(config), source=IDS)
  with pytest.raises(ValueError, match="head='sequence_labels', not 'language"):
    hub.load(tmp_path / 'a')
  hub.save(tmp_path / 'b', TINY, parameters(TINY))
  with pytest.raises(ValueError, match="'language_model', not 'sequence_la"):
    hub.load(tmp_path / 'b', head='sequence_labels')


@pytest.mark.parametrize(
  ('source', 'words'),
  [
    (None, 'pad_token_id=None: .* no text ends with'),
    ({'pad_token_id': 13}, 'pad_token_id=13: .* of the vocabulary'),
    ({'pad_token_id': -1}, 'pad_token_id=-1'),
    ({'pad_token_id': 2, 'eos_token_id': 2}, 'the token before it'),
    ({'pad_token_id': 2, 'eos_token_id': [1, 2]}, 'give source another'),
  ],
)
def test_padding_that_moves_the_scored_token_is_refused(source, words):
  with pytest.raises(ValueError, match=words):
    families.to_huggingface(dataclasses.replace(TINY, **REWARD), source)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (
      {'architectures': ['Qwen2ForProcessRewardModel']},
      "'Qwen2ForProcess.*end",
    ),
    ({'architectures': ['LlamaForRewardModelWithGating']}, 'WithGating'),
    (
      {
        'architectures': ['Olmo2ForTokenClassification'],
        'model_type': 'olmo2',
      },
      'token classification of olmo2',
    ),
    (
      {
        'architectures': ['LlamaForTokenClassification'],
        'token_classification_bias': False,
      },
      'token_classification_bias=False',
    ),
  ],
)
def test_other_heads_are_refused_by_name(change, words):
  with pytest.raises(ValueError, match=words):
    families.from_huggingface(families.to_huggingface(TINY) | change)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'head': 'scalar'}, "head='scalar': use one of"),
    ({'head': 'token_labels'}, 'num_labels=0'),
    ({'num_labels': 2}, "num_labels=2 of head='language_model'"),
    (REWARD | {'tie_embeddings': False}, 'tie_embeddings=False'),
  ],
)
def test_a_wrong_head_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(TINY, **change)
