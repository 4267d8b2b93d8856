"""GPT-2: learned positions, LayerNorm, biases, matrices stored [in, out]."""

from collections.abc import Mapping
from typing import Any

from postrain.models.config import Config
from postrain.models.families import reading
from postrain.models.families.layout import Names, Tensor, plain

ARCHITECTURES = {'gpt2': 'GPT2LMHeadModel'}


def read(block: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `Config` from a config.json."""
  reading.require(block, {'vocab_size', 'n_embd', 'n_layer', 'n_head'})
  reading.supported(block, {
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False,),
    'reorder_and_upcast_attn': (False,),
  })  # fmt: skip
  width, heads = block['n_embd'], block['n_head']
  return dict(
    family='gpt2',
    vocab_size=block['vocab_size'],
    num_layers=block['n_layer'],
    model_dim=width,
    mlp_dim=block.get('n_inner') or 4 * width,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width // heads,
    position_embedding='learned',
    norm='layer',
    norm_eps=block.get('layer_norm_epsilon', 1e-5),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    gated_mlp=False,
    activation=reading.activation(
      {'activation_function': 'gelu_new', **block}, 'activation_function'
    ),
    tie_embeddings=block.get('tie_word_embeddings', True),
    max_length=block.get('n_positions', 1024),
  )


def write(config: Config) -> dict[str, Any]:
  """The config.json of this family."""
  c = config
  return {
    'vocab_size': c.vocab_size,
    'n_layer': c.num_layers,
    'n_embd': c.model_dim,
    'n_inner': c.mlp_dim,
    'n_head': c.num_heads,
    'n_positions': c.max_length,
    'activation_function': 'gelu_new'
    if c.activation == 'gelu_tanh'
    else c.activation,
    'layer_norm_epsilon': c.norm_eps,
    'tie_word_embeddings': c.tie_embeddings,
  }


def layer(names: Names) -> None:
  """The tensors of one layer."""
  c = names.config
  width, heads = c.model_dim, (c.num_heads, c.head_dim)
  for place, param in (('ln_1', 'attention_norm'), ('ln_2', 'mlp_norm')):
    names.vector(f'{place}.weight', param, width)
    names.vector(f'{place}.bias', f'{param}_bias', width)
  wide = (width, c.num_heads * c.head_dim)
  params = [param for _, param, _ in names.projections()]
  names.tensors['attn.c_attn.weight'] = Tensor(
    tuple(names.part(p, (width, *heads), (0, 1, 2), wide) for p in params), 1
  )
  names.tensors['attn.c_attn.bias'] = Tensor(
    tuple(names.part(f'{p}_bias', heads, (0, 1), wide[1:]) for p in params)
  )
  matrices: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    'attn.c_proj': ('output', (*heads, width), wide[::-1]),
    'mlp.c_fc': ('up', (width, c.mlp_dim), (width, c.mlp_dim)),
    'mlp.c_proj': ('down', (c.mlp_dim, width), (c.mlp_dim, width)),
  }
  for place, (param, shape, stored) in matrices.items():
    part = names.part(param, shape, tuple(range(len(shape))), stored)
    names.tensors[f'{place}.weight'] = Tensor((part,))
    names.vector(f'{place}.bias', f'{param}_bias', shape[-1])


def tensors(config: Config) -> dict[str, Tensor]:
  """Name in the file -> its place, in writing order."""
  c = config
  out = {
    'transformer.wte.weight': plain(
      'embedding', shape=(c.vocab_size, c.model_dim)
    ),
    'transformer.wpe.weight': plain(
      'position_embedding', shape=(c.max_length, c.model_dim)
    ),
  }
  for i in range(c.num_layers):
    names = Names(c, i)
    layer(names)
    out |= {f'transformer.h.{i}.{k}': v for k, v in names.tensors.items()}
  for kind, param in (('weight', 'final_norm'), ('bias', 'final_norm_bias')):
    out[f'transformer.ln_f.{kind}'] = plain(param, shape=(c.model_dim,))
  if not c.tie_embeddings:
    out['lm_head.weight'] = plain(
      'unembedding', shape=(c.vocab_size, c.model_dim)
    )
  return out
