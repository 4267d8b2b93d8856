"""Phi-3 and Phi-4: Llama with fused projections."""

from collections.abc import Mapping
from typing import Any

from postrain.models.config import Config
from postrain.models.families import llama, reading
from postrain.models.families.layout import Names, Tensor

ARCHITECTURES = {'phi3': 'Phi3ForCausalLM'}


def read(block: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `Config` from a config.json."""
  fields = reading.common(block, max_length=4096, partial=True)
  return fields | reading.all_sliding(block, default=None)


def write(config: Config) -> dict[str, Any]:
  """The config.json of this family."""
  block = reading.common_block(config)
  block['sliding_window'] = config.sliding_window
  scaling = config.rope_scaling
  if scaling is not None:
    block['original_max_position_embeddings'] = (
      scaling.original_max_position_embeddings
    )
  if config.rotary_dim is not None:
    block['partial_rotary_factor'] = config.rotary_dim / config.head_dim
  return block


def layer(names: Names) -> None:
  """The tensors of one layer."""
  c = names.config
  names.tensors['self_attn.qkv_proj.weight'] = Tensor(
    tuple(names.head_matrix(p, num) for _, p, num in names.projections())
  )
  names.output('self_attn.o_proj.weight')
  llama.norm_tensors(names)
  names.tensors['mlp.gate_up_proj.weight'] = Tensor(
    tuple(names.matrix(p, c.model_dim, c.mlp_dim) for p in ('gate', 'up'))
  )
  names.linear('mlp.down_proj.weight', 'down', c.mlp_dim, c.model_dim)


def tensors(config: Config) -> dict[str, Tensor]:
  """Name in the file -> its place, in writing order."""
  return llama.tensors(config, layer)
