"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE."""

from collections.abc import Mapping
from typing import Any

from postrain.models.config import Config
from postrain.models.families import llama, reading
from postrain.models.families.layout import Names, Tensor

ARCHITECTURES = {
  'mixtral': 'MixtralForCausalLM',
  'qwen2_moe': 'Qwen2MoeForCausalLM',
  'qwen3_moe': 'Qwen3MoeForCausalLM',
}


def read(block: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `Config` from a config.json."""
  name = block['model_type']
  fields = reading.common(block)
  if name == 'mixtral':
    reading.supported(block, {'router_jitter_noise': (0, None)})
    reading.require(block, {'num_local_experts', 'num_experts_per_tok'})
    fields |= reading.all_sliding(block, default=None)
    return fields | dict(
      num_experts=block['num_local_experts'],
      experts_per_token=block['num_experts_per_tok'],
    )
  reading.supported(block, {
    'decoder_sparse_step': (1,),
    'mlp_only_layers': ([], None),
  })  # fmt: skip
  number = block.get('num_experts', block.get('num_local_experts'))
  block = {**block, 'num_experts': number}
  reading.require(
    block, {'num_experts', 'num_experts_per_tok', 'moe_intermediate_size'}
  )
  fields |= llama.qwen_windows(block) | dict(
    mlp_dim=block['moe_intermediate_size'],
    num_experts=number,
    experts_per_token=block['num_experts_per_tok'],
    normalize_gates=block.get('norm_topk_prob', False),
  )
  if name == 'qwen2_moe':
    reading.require(block, {'shared_expert_intermediate_size'})
    return fields | dict(
      qkv_bias=block.get('qkv_bias', True),
      shared_mlp_dim=block['shared_expert_intermediate_size'],
    )
  bias = bool(block.get('attention_bias', False))
  return fields | dict(qk_norm=True, qkv_bias=bias, output_bias=bias)


def write(config: Config) -> dict[str, Any]:
  """The config.json of these families."""
  c = config
  block = reading.common_block(c)
  block['num_experts_per_tok'] = c.experts_per_token
  if c.family == 'mixtral':
    return block | dict(
      num_local_experts=c.num_experts, sliding_window=c.sliding_window
    )
  sliding = c.sliding_window is not None
  block |= dict(
    num_experts=c.num_experts,
    moe_intermediate_size=c.mlp_dim,
    norm_topk_prob=c.normalize_gates,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    use_sliding_window=sliding,
    sliding_window=c.sliding_window,
    layer_types=reading.layer_types(c),
  )
  if c.family == 'qwen2_moe':
    return block | dict(
      qkv_bias=c.qkv_bias, shared_expert_intermediate_size=c.shared_mlp_dim
    )
  return block | dict(attention_bias=c.qkv_bias)


def layer(names: Names) -> None:
  """The tensors of one layer."""
  c = names.config
  llama.attention_tensors(names)
  llama.norm_tensors(names)
  mixtral = c.family == 'mixtral'
  place = 'block_sparse_moe' if mixtral else 'mlp'
  sizes = {
    'gate': ('w1' if mixtral else 'gate_proj', c.model_dim, c.mlp_dim),
    'down': ('w2' if mixtral else 'down_proj', c.mlp_dim, c.model_dim),
    'up': ('w3' if mixtral else 'up_proj', c.model_dim, c.mlp_dim),
  }
  names.linear(f'{place}.gate.weight', 'router', c.model_dim, c.num_experts)
  for e in range(c.num_experts):
    for param, (suffix, inputs, outputs) in sizes.items():
      names.linear(
        f'{place}.experts.{e}.{suffix}.weight', param, inputs, outputs, e
      )
  if c.shared_mlp_dim:
    llama.mlp_tensors(names, 'mlp.shared_expert', 'shared_', c.shared_mlp_dim)
    names.linear(
      'mlp.shared_expert_gate.weight', 'shared_router', c.model_dim, 1
    )


def tensors(config: Config) -> dict[str, Tensor]:
  """Name in the file -> its place, in writing order."""
  return llama.tensors(config, layer)
