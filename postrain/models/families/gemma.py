"""Gemma 2 and 3: norms on both sides, scaled embeddings, local layers."""

from collections.abc import Mapping
from typing import Any

from postrain.models.config import Config
from postrain.models.families import llama, reading

ARCHITECTURES = {
  'gemma2': 'Gemma2ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
}
tensors = llama.tensors


def read(block: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `Config` from a config.json."""
  new = block['model_type'] == 'gemma3_text'
  reading.require(block, {'head_dim'})
  reading.supported(block, {'attention_bias': (False,)})
  every = block.get('sliding_window_pattern', 6) if new else 2
  layers = block['num_hidden_layers']
  default = [
    'full_attention' if (i + 1) % every == 0 else 'sliding_attention'
    for i in range(layers)
  ]
  flat = {**block, 'rope_parameters': _global_rope(block)}
  fields = reading.common(
    flat, max_length=131_072 if new else 8192, tied=True,
    theta=1_000_000.0 if new else 10_000.0,
  )  # fmt: skip
  window = {'sliding_window': block.get('sliding_window', 4096)}
  return fields | reading.windows({**block, **window}, default) | dict(
    norm='rms_one_plus',
    norm_order='both',
    activation=reading.activation(block, 'hidden_activation')
    if block.get('hidden_activation')
    else 'gelu_tanh',
    embedding_scale=block['hidden_size'] ** 0.5,
    attention_scale=block.get('query_pre_attn_scalar', 256) ** -0.5,
    attention_soft_cap=block.get(
      'attn_logit_softcapping', None if new else 50.0
    ),
    logit_soft_cap=block.get('final_logit_softcapping', None if new else 30.0),
    qk_norm=new,
    local_rope_theta=_local_theta(block) if new else None,
  )  # fmt: skip


def _global_rope(block: Mapping[str, Any]) -> dict[str, Any] | None:
  """New files have one block for each kind of layer."""
  parameters = block.get('rope_parameters') or {}
  return parameters.get('full_attention', parameters)


def _local_theta(block: Mapping[str, Any]) -> float:
  local = (block.get('rope_parameters') or {}).get('sliding_attention') or {}
  if local.get('rope_type', 'default') != 'default':
    raise ValueError(
      f'rope_type={local["rope_type"]!r} of sliding layers is not supported;'
      ' supported: default'
    )
  return float(
    local.get('rope_theta') or block.get('rope_local_base_freq') or 10_000.0
  )


def write(config: Config) -> dict[str, Any]:
  """The config.json of these families."""
  c = config
  block = reading.common_block(c)
  del block['hidden_act']
  block |= dict(
    hidden_activation='gelu_pytorch_tanh',
    query_pre_attn_scalar=round((c.attention_scale or c.head_dim**-0.5) ** -2),
    attn_logit_softcapping=c.attention_soft_cap,
    final_logit_softcapping=c.logit_soft_cap,
    sliding_window=c.sliding_window,
    layer_types=reading.layer_types(c),
    attention_bias=False,
  )
  if c.family == 'gemma3_text':
    block['rope_local_base_freq'] = c.local_rope_theta
    block['rope_parameters'] = {
      'full_attention': block['rope_parameters'],
      'sliding_attention': {
        'rope_type': 'default', 'rope_theta': c.local_rope_theta
      },
    }  # fmt: skip
  return block
