"""Tiny checkpoints of every family: config.json, and weights of NumPy's.

A variant is a model type of transformers and what its configuration says
beside the sizes. Windows are shorter, and trained lengths of scaled rotary
positions are shorter, than the `LENGTH` tokens that the tests run.
"""

import json
import pathlib
from typing import Any
import zlib

import numpy as np
from safetensors.numpy import save_file
import transformers

from postrain.models import families

LENGTH = 12
SIZES = dict(
  vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
  bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
WIDE = dict(head_dim=8)
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
  """A block of rotary positions, trained for 8 tokens unless it is linear."""
  if kind not in ('default', 'linear'):
    numbers['original_max_position_embeddings'] = 8
  return dict(rope_type=kind, rope_theta=500.0, **numbers)


LLAMA3 = rope('llama3', factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = rope(
  'longrope', partial_rotary_factor=0.75, factor=8.0,
  short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
  long_factor=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
)  # fmt: skip
GEMMA3_ROPE = dict(
  full_attention=rope('linear', factor=8.0),
  sliding_attention=dict(rope_type='default', rope_theta=100.0),
)
SLIDING, FULL = 'sliding_attention', 'full_attention'
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
  'llama': ('llama', dict(tie_word_embeddings=True)),
  'llama_biased': ('llama', dict(WIDE, attention_bias=True, mlp_bias=True)),
  'llama3': ('llama', dict(WIDE, rope_parameters=LLAMA3)),
  'linear': ('llama', dict(rope_parameters=rope('linear', factor=4.0))),
  'mistral': ('mistral', dict(WIDE, sliding_window=3)),
  'qwen2': ('qwen2', dict(tie_word_embeddings=True)),
  'qwen2_yarn': ('qwen2', dict(rope_parameters=rope('yarn', factor=8.0))),
  'qwen2_sliding': (
    'qwen2',
    dict(use_sliding_window=True, sliding_window=3, max_window_layers=1),
  ),
  'qwen3': ('qwen3', WIDE),
  'olmo2': ('olmo2', {}),
  'smollm3': ('smollm3', dict(no_rope_layers=[1, 0, 1])),
  'gemma2': (
    'gemma2',
    dict(
      WIDE, sliding_window=3, query_pre_attn_scalar=12,
      attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
  ),
  'gemma3': (
    'gemma3_text',
    dict(
      WIDE, sliding_window=3, query_pre_attn_scalar=12,
      layer_types=[SLIDING, FULL, SLIDING], rope_parameters=GEMMA3_ROPE,
    ),
  ),
  'phi3': ('phi3', dict(sliding_window=3)),
  'phi4_mini': (
    'phi3',
    dict(
      hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
      rope_parameters=LONGROPE, original_max_position_embeddings=8,
    ),
  ),
  'gpt2': ('gpt2', {}),
  'mixtral': ('mixtral', dict(WIDE, num_local_experts=4, sliding_window=3)),
  'qwen2_moe': ('qwen2_moe', dict(MIXTURE, shared_expert_intermediate_size=12)),
  'qwen3_moe': ('qwen3_moe', dict(WIDE, **MIXTURE, norm_topk_prob=True)),
}  # fmt: skip


def block(variant: str) -> dict[str, Any]:
  """The config.json that transformers writes for a variant."""
  kind, changes = VARIANTS[variant]
  sizes = SIZES
  if kind == 'gpt2':
    sizes = dict(vocab_size=31, n_embd=16, n_layer=3, n_head=4, n_positions=64,
                 bos_token_id=1, eos_token_id=2)  # fmt: skip
  made = transformers.CONFIG_MAPPING[kind](**{**sizes, **changes})
  return json.loads(made.to_json_string(use_diff=False))


def names(variant: str) -> list[str]:
  """The tensors of its file."""
  return list(families.tensors(families.from_huggingface(block(variant))))


def write(variant: str, directory: pathlib.Path) -> pathlib.Path:
  """Write the checkpoint of a variant, the same whenever it is written."""
  text = block(variant)
  config = families.from_huggingface(text)
  tensors = {}
  for name, tensor in families.tensors(config).items():
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    value = 0.3 * draw.standard_normal(tensor.shape)
    if value.ndim == 1 and name.endswith('weight') and 'gemma' not in variant:
      value += 1
    tensors[name] = value.astype(np.float32)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'config.json').write_text(json.dumps(text))
  save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})
  return directory


def inputs() -> tuple[np.ndarray, np.ndarray]:
  """Tokens and which are real: no, two and five slots of left padding."""
  tokens = np.random.default_rng(0).integers(3, 31, (3, LENGTH), np.int32)
  return tokens, np.arange(LENGTH) >= np.array([[0], [2], [5]])
