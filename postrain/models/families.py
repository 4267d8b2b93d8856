"""Hugging Face model families: configurations and tensor names, both ways."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from postrain.models.config import Config


class Family(NamedTuple):
  """What sets a family apart, and the name of its class in transformers."""

  architecture: str
  qkv_bias: bool
  qk_norm: bool
  max_length: int


FAMILIES = {
  'llama': Family('LlamaForCausalLM', False, False, 2048),
  'qwen2': Family('Qwen2ForCausalLM', True, False, 32768),
  'qwen3': Family('Qwen3ForCausalLM', False, True, 32768),
}

# A key of config.json that changes the function: the values that work.
SUPPORTED = {
  'hidden_act': ('silu',),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'use_sliding_window': (False,),
  'attention_dropout': (0, None),
  'quantization_config': (None,),
}


class Tensor(NamedTuple):
  """A Hugging Face tensor: param[layer].transpose(perm).reshape(shape).

  Linear weights are stored [out, in] there, heads are not an axis.
  """

  path: tuple[str, ...]
  layer: int | None
  param_shape: tuple[int, ...]
  perm: tuple[int, ...]
  shape: tuple[int, ...]

  def stored(self, leaves: Mapping[tuple[str, ...], Any]) -> np.ndarray:
    """The tensor of a file."""
    leaf = leaves[self.path]
    param = np.asarray(leaf if self.layer is None else leaf[self.layer])
    return np.ascontiguousarray(param.transpose(self.perm).reshape(self.shape))

  def restore(
    self, value: np.ndarray, leaves: Mapping[tuple[str, ...], np.ndarray]
  ) -> None:
    """Write the tensor of a file into its (stacked) parameter."""
    permuted = [self.param_shape[axis] for axis in self.perm]
    param = value.reshape(permuted).transpose(np.argsort(self.perm))
    leaf = leaves[self.path]
    leaf[... if self.layer is None else self.layer] = param


def param_shapes(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Path of each parameter -> its shape, layers stacked."""
  return {
    place.path: place.param_shape
    if place.layer is None
    else (config.num_layers, *place.param_shape)
    for place in tensors(config).values()
  }


def from_huggingface(block: Mapping[str, Any]) -> Config:
  """Read a config.json.

  Args:
    block: the parsed file, of old or new transformers.

  Returns:
    Config of float32 parameters and activations.

  Raises:
    ValueError: a model type or a feature that this decoder lacks, or a missing
      field; the message lists what works.
  """
  name = block.get('model_type')
  if name not in FAMILIES:
    raise ValueError(
      f'model_type={name!r} is not supported; supported: {", ".join(FAMILIES)}'
    )
  family = FAMILIES[name]
  for key, values in SUPPORTED.items():
    if key in block and block[key] not in values:
      raise ValueError(
        f'{key}={block[key]!r} of {name} is not supported; supported:'
        f' {" or ".join(map(repr, values))}'
      )
  _check_layer_types(block)
  if missing := sorted(REQUIRED - block.keys()):
    raise ValueError(
      f'the {name} configuration lacks {", ".join(missing)}: is it the'
      ' config.json of a causal language model?'
    )
  heads = block['num_attention_heads']
  return Config(
    vocab_size=block['vocab_size'],
    num_layers=block['num_hidden_layers'],
    model_dim=block['hidden_size'],
    mlp_dim=block['intermediate_size'],
    num_heads=heads,
    num_kv_heads=block.get('num_key_value_heads') or heads,
    head_dim=block.get('head_dim') or block['hidden_size'] // heads,
    rope_theta=_rope_theta(block),
    norm_eps=block.get('rms_norm_eps', 1e-6),
    tie_embeddings=block.get('tie_word_embeddings', False),
    qkv_bias=family.qkv_bias,
    qk_norm=family.qk_norm,
    max_length=block.get('max_position_embeddings', family.max_length),
  )


REQUIRED = {
  'vocab_size', 'num_hidden_layers', 'hidden_size', 'intermediate_size',
  'num_attention_heads',
}  # fmt: skip


def _check_layer_types(block: Mapping[str, Any]) -> None:
  kinds = set(block.get('layer_types') or ()) - {'full_attention'}
  if kinds:
    raise ValueError(
      f'layer_types with {", ".join(sorted(kinds))} are not supported;'
      ' supported: full_attention'
    )


def _rope_theta(block: Mapping[str, Any]) -> float:
  """The base, from where new or old files keep it; no scaled variants."""
  merged = {'rope_theta': block.get('rope_theta')}
  for key in ('rope_scaling', 'rope_parameters'):
    merged |= {k: v for k, v in (block.get(key) or {}).items() if v is not None}
  kind = merged.get('rope_type', merged.get('type', 'default'))
  if kind != 'default':
    raise ValueError(
      f'rope_type={kind!r} is not supported; supported: default (no scaling)'
    )
  partial = merged.get(
    'partial_rotary_factor', block.get('partial_rotary_factor')
  )
  if partial not in (None, 1, 1.0):
    raise ValueError(
      f'partial_rotary_factor={partial!r} is not supported; supported: 1.0'
    )
  return float(merged['rope_theta'] or 10_000.0)


def to_huggingface(config: Config) -> dict[str, Any]:
  """Write a config.json that old and new transformers read.

  Raises:
    ValueError: no family has this combination of features.
  """
  names = {(f.qkv_bias, f.qk_norm): name for name, f in FAMILIES.items()}
  name = names.get((config.qkv_bias, config.qk_norm))
  if name is None:
    raise ValueError(
      f'no Hugging Face family has qkv_bias={config.qkv_bias} with'
      f' qk_norm={config.qk_norm}: use one of the two or neither'
    )
  return {
    'architectures': [FAMILIES[name].architecture],
    'model_type': name,
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.model_dim,
    'intermediate_size': config.mlp_dim,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'rms_norm_eps': config.norm_eps,
    'rope_theta': config.rope_theta,
    'rope_parameters': {
      'rope_type': 'default', 'rope_theta': config.rope_theta
    },
    'max_position_embeddings': config.max_length,
    'tie_word_embeddings': config.tie_embeddings,
    'attention_bias': False,
    'mlp_bias': False,
    'use_sliding_window': False,
    'dtype': config.param_dtype,
    'torch_dtype': config.param_dtype,
  }  # fmt: skip


def tensors(config: Config) -> dict[str, Tensor]:
  """Each tensor of the Hugging Face file and its place, in writing order."""
  c = config
  table = Tensor(
    ('embedding',), None, (c.vocab_size, c.model_dim), (0, 1),
    (c.vocab_size, c.model_dim),
  )  # fmt: skip
  out = {'model.embed_tokens.weight': table}
  for layer in range(c.num_layers):
    for name, (param, param_shape, perm, shape) in _layer_tensors(c).items():
      path = ('layers', param)
      out[f'model.layers.{layer}.{name}'] = Tensor(
        path, layer, param_shape, perm, shape
      )
  norm = (c.model_dim,)
  out['model.norm.weight'] = Tensor(('final_norm',), None, norm, (0,), norm)
  if not c.tie_embeddings:
    out['lm_head.weight'] = table._replace(path=('unembedding',))
  return out


def _layer_tensors(c: Config) -> dict[str, tuple[str, tuple, tuple, tuple]]:
  """Name in the file -> (parameter, its shape, permutation, file's shape)."""
  width, mlp, head = c.model_dim, c.mlp_dim, c.head_dim
  out: dict[str, tuple[str, tuple, tuple, tuple]] = {}

  def vector(name: str, param: str, size: int) -> None:
    out[f'{name}.weight'] = (param, (size,), (0,), (size,))

  def linear(name: str, param: str, inputs: int, outputs: int) -> None:
    shape = (inputs, outputs)
    out[f'{name}.weight'] = (param, shape, (1, 0), shape[::-1])

  def heads(name: str, param: str, num: int) -> None:
    shape, flat = (width, num, head), num * head
    out[f'{name}.weight'] = (param, shape, (1, 2, 0), (flat, width))
    if c.qkv_bias:
      out[f'{name}.bias'] = (f'{param}_bias', shape[1:], (0, 1), (flat,))

  vector('input_layernorm', 'attention_norm', width)
  heads('self_attn.q_proj', 'query', c.num_heads)
  heads('self_attn.k_proj', 'key', c.num_kv_heads)
  heads('self_attn.v_proj', 'value', c.num_kv_heads)
  out['self_attn.o_proj.weight'] = (
    'output', (c.num_heads, head, width), (2, 0, 1),
    (width, c.num_heads * head),
  )  # fmt: skip
  if c.qk_norm:
    vector('self_attn.q_norm', 'query_norm', head)
    vector('self_attn.k_norm', 'key_norm', head)
  vector('post_attention_layernorm', 'mlp_norm', width)
  linear('mlp.gate_proj', 'gate', width, mlp)
  linear('mlp.up_proj', 'up', width, mlp)
  linear('mlp.down_proj', 'down', mlp, width)
  return out
