"""Llama and what names its tensors alike: Mistral, Qwen, OLMo 2, SmolLM3."""

from collections.abc import Mapping
from typing import Any

from postrain.models.config import Config
from postrain.models.families import reading
from postrain.models.families.layout import Names, Tensor, plain

ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'mistral': 'MistralForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
  'olmo2': 'Olmo2ForCausalLM',
  'smollm3': 'SmolLM3ForCausalLM',
}


def read(block: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `Config` from a config.json."""
  name = block['model_type']
  fields = reading.common(block)
  if name == 'qwen2':
    fields['qkv_bias'] = True
  elif block.get('attention_bias'):
    fields |= dict(qkv_bias=True, output_bias=True)
  fields['mlp_bias'] = bool(block.get('mlp_bias', False))
  if name in ('qwen3', 'olmo2'):
    fields['qk_norm'] = True
  if name == 'olmo2':
    fields |= dict(norm='rms_wide', norm_order='post', qk_norm_over='heads')
  if name == 'mistral':
    fields |= reading.all_sliding(block, default=4096)
  if name in ('qwen2', 'qwen3'):
    fields |= qwen_windows(block)
  if name == 'smollm3':
    fields |= unrotated_layers(block)
  if name in ('llama', 'olmo2'):
    reading.supported(block, {'use_sliding_window': (None, False)})
    if 'layer_types' in reading.windows(block, ()):
      raise ValueError(f'sliding_attention of {name} is not supported')
  return fields


def qwen_windows(block: Mapping[str, Any]) -> dict[str, Any]:
  """Windows in the layers from ``max_window_layers`` on, where switched on."""
  if not block.get('use_sliding_window'):
    return {}
  layers = block['num_hidden_layers']
  first = block.get('max_window_layers', 28)
  default = ['full_attention'] * min(first, layers)
  default += ['sliding_attention'] * (layers - len(default))
  return reading.windows(block, default)


def unrotated_layers(block: Mapping[str, Any]) -> dict[str, Any]:
  """Layers without positions: every fourth, or those that are listed."""
  if block.get('use_sliding_window'):
    raise ValueError(
      'use_sliding_window=True of smollm3 is not supported; supported: False'
    )
  layers = block['num_hidden_layers']
  every = block.get('no_rope_layer_interval', 4)
  rotated = block.get('no_rope_layers')
  if rotated is None:
    rotated = [(i + 1) % every != 0 for i in range(layers)]
  if all(rotated):
    return {}
  kinds = ['full' if r else 'unrotated' for r in rotated]
  return dict(layer_types=tuple(kinds))


def write(config: Config) -> dict[str, Any]:
  """The config.json of these families."""
  block = reading.common_block(config)
  name = config.family
  if name in ('llama', 'qwen3', 'olmo2', 'smollm3'):
    block['attention_bias'] = config.qkv_bias
  if name in ('llama', 'smollm3'):
    block['mlp_bias'] = config.mlp_bias
  if name == 'mistral':
    block['sliding_window'] = config.sliding_window
  if name in ('qwen2', 'qwen3'):
    sliding = config.sliding_window is not None
    block |= dict(
      use_sliding_window=sliding,
      sliding_window=config.sliding_window,
      layer_types=reading.layer_types(config),
    )
    if sliding:  # for readers that know no layer_types
      block['max_window_layers'] = block['layer_types'].count('full_attention')
  if name == 'smollm3':
    rotated = [k != 'unrotated' for k in config.layer_types]
    rotated = rotated or [True] * config.num_layers
    block |= dict(
      no_rope_layers=[int(r) for r in rotated],
      layer_types=['full_attention'] * config.num_layers,
      use_sliding_window=False,
    )
  return block


def attention_tensors(names: Names) -> None:
  """Projections, biases and norms of attention."""
  c = names.config
  for letter, param, num in names.projections():
    place = f'self_attn.{letter}_proj'
    names.tensors[f'{place}.weight'] = Tensor((names.head_matrix(param, num),))
    if c.qkv_bias:
      names.vector(f'{place}.bias', f'{param}_bias', num, c.head_dim)
    if c.qk_norm and letter != 'v':
      shape = (c.head_dim,) if c.qk_norm_over == 'head' else (num, c.head_dim)
      names.vector(f'self_attn.{letter}_norm.weight', f'{param}_norm', *shape)
  names.output('self_attn.o_proj.weight')
  if c.output_bias:
    names.vector('self_attn.o_proj.bias', 'output_bias', c.model_dim)


def norm_tensors(names: Names) -> None:
  """The norms of a layer, by the order that the family has."""
  c = names.config
  places = {
    'pre': {
      'input_layernorm': 'attention_norm',
      'post_attention_layernorm': 'mlp_norm',
    },
    'post': {
      'post_attention_layernorm': 'attention_post_norm',
      'post_feedforward_layernorm': 'mlp_post_norm',
    },
    'both': {
      'input_layernorm': 'attention_norm',
      'post_attention_layernorm': 'attention_post_norm',
      'pre_feedforward_layernorm': 'mlp_norm',
      'post_feedforward_layernorm': 'mlp_post_norm',
    },
  }
  for place, param in places[c.norm_order].items():
    names.vector(f'{place}.weight', param, c.model_dim)


def mlp_tensors(names: Names, place: str, prefix: str, width: int) -> None:
  """A gated MLP."""
  c = names.config
  sizes = {
    'gate': (c.model_dim, width),
    'up': (c.model_dim, width),
    'down': (width, c.model_dim),
  }
  for param, (inputs, outputs) in sizes.items():
    names.linear(
      f'{place}.{param}_proj.weight', prefix + param, inputs, outputs
    )
    if c.mlp_bias:
      names.vector(
        f'{place}.{param}_proj.bias', f'{prefix}{param}_bias', outputs
      )


def layer(names: Names) -> None:
  """The tensors of one layer."""
  attention_tensors(names)
  norm_tensors(names)
  mlp_tensors(names, 'mlp', '', names.config.mlp_dim)


def tensors(config: Config, one_layer: Any = layer) -> dict[str, Tensor]:
  """Name in the file -> its place, in writing order."""
  c = config
  table = (c.vocab_size, c.model_dim)
  out = {'model.embed_tokens.weight': plain('embedding', shape=table)}
  for i in range(c.num_layers):
    names = Names(c, i)
    one_layer(names)
    out |= {f'model.layers.{i}.{k}': v for k, v in names.tensors.items()}
  out['model.norm.weight'] = plain('final_norm', shape=(c.model_dim,))
  if not c.tie_embeddings:
    out['lm_head.weight'] = plain('unembedding', shape=table)
  return out
