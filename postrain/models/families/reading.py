"""What the config.json files of all families have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from postrain.models.config import Config
from postrain.models.rope import RopeScaling

# A key that changes the function -> the values that work, in every family.
SUPPORTED = {
  'quantization_config': (None,),
  'use_bidirectional_attention': (None, False),
  'is_decoder': (None, True, False),
  'add_cross_attention': (None, False),
}
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
WRITTEN = {'gelu_tanh': 'gelu_pytorch_tanh'}
REQUIRED = {
  'vocab_size', 'num_hidden_layers', 'hidden_size', 'intermediate_size',
  'num_attention_heads',
}  # fmt: skip
LAYER_TYPES = {'full_attention': 'full', 'sliding_attention': 'sliding'}


def require(block: Mapping[str, Any], names: set[str]) -> None:
  """Refuse a file that lacks fields.

  Raises:
    ValueError: names them.
  """
  if missing := sorted(name for name in names if block.get(name) is None):
    raise ValueError(
      f'the {block["model_type"]} configuration lacks {", ".join(missing)}: is'
      ' it the config.json of a causal language model?'
    )


def supported(block: Mapping[str, Any], values: Mapping[str, tuple]) -> None:
  """Refuse values that change the function in a way that is not built.

  Raises:
    ValueError: names the key and what works.
  """
  for key, choices in values.items():
    if key in block and block[key] not in choices:
      raise ValueError(
        f'{key}={block[key]!r} of {block["model_type"]} is not supported;'
        f' supported: {" or ".join(map(repr, choices))}'
      )


def activation(block: Mapping[str, Any], key: str) -> str:
  """The activation that a key names."""
  name = block.get(key) or 'silu'
  if name not in ACTIVATIONS:
    raise ValueError(
      f'{key}={name!r} of {block["model_type"]} is not supported; supported:'
      f' {", ".join(ACTIVATIONS)}'
    )
  return ACTIVATIONS[name]


def common(
  block: Mapping[str, Any], *, max_length: int = 2048, theta: float = 10_000.0,
  tied: bool = False, partial: bool = False,
) -> dict[str, Any]:  # fmt: skip
  """Fields of `Config` that every rotary family has.

  Args:
    block: config.json.
    max_length: of the family, where the file does not say.
    theta: likewise.
    tied: likewise.
    partial: whether the family may turn a part of each head.

  Raises:
    ValueError: a field is missing, or the model is of another kind.
  """
  require(block, REQUIRED)
  heads = block['num_attention_heads']
  length = block.get('max_position_embeddings') or max_length
  head_dim = block.get('head_dim') or block['hidden_size'] // heads
  rotary = rope(block, rope_block(block), head_dim, length, theta)
  if rotary['rotary_dim'] is not None and not partial:
    raise ValueError(
      f'partial_rotary_factor={rotary["rotary_dim"] / head_dim:g} of'
      f' {block["model_type"]} is not supported; supported: 1'
    )
  return dict(
    family=block['model_type'],
    vocab_size=block['vocab_size'],
    num_layers=block['num_hidden_layers'],
    model_dim=block['hidden_size'],
    mlp_dim=block['intermediate_size'],
    num_heads=heads,
    num_kv_heads=block.get('num_key_value_heads') or heads,
    head_dim=head_dim,
    norm_eps=block.get('rms_norm_eps', 1e-6),
    tie_embeddings=block.get('tie_word_embeddings', tied),
    activation=activation(block, 'hidden_act'),
    max_length=length,
    **rotary,
  )


def rope_block(block: Mapping[str, Any]) -> dict[str, Any]:
  """What old (rope_scaling) and new (rope_parameters) files say together."""
  merged: dict[str, Any] = {}
  for key in ('rope_scaling', 'rope_parameters'):
    merged |= {k: v for k, v in (block.get(key) or {}).items() if v is not None}
  return merged


def rope(
  block: Mapping[str, Any], parameters: dict[str, Any], head_dim: int,
  length: int, theta: float,
) -> dict[str, Any]:  # fmt: skip
  """The rotary fields of `Config`."""
  original = block.get('original_max_position_embeddings')
  kind = parameters.get('rope_type', parameters.get('type', 'default'))
  if original is not None and kind != 'default':
    parameters = {'original_max_position_embeddings': original, **parameters}
  fraction = parameters.get(
    'partial_rotary_factor', block.get('partial_rotary_factor')
  )
  turned = int(head_dim * (1 if fraction is None else fraction))
  return dict(
    rope_theta=float(
      parameters.get('rope_theta') or block.get('rope_theta') or theta
    ),
    rope_scaling=RopeScaling.from_mapping(parameters, length),
    rotary_dim=None if turned == head_dim else turned,
  )


def windows(block: Mapping[str, Any], default: Sequence[str]) -> dict[str, Any]:
  """Fields of `Config` for layers that slide and layers that do not."""
  kinds = block.get('layer_types') or default
  if unknown := sorted(set(kinds) - LAYER_TYPES.keys()):
    raise ValueError(
      f'layer_types with {", ".join(unknown)} are not supported; supported:'
      f' {", ".join(LAYER_TYPES)}'
    )
  if 'sliding_attention' not in kinds:
    return {}
  require(block, {'sliding_window'})
  return dict(
    layer_types=tuple(LAYER_TYPES[kind] for kind in kinds),
    sliding_window=block['sliding_window'],
  )


def all_sliding(
  block: Mapping[str, Any], *, default: int | None
) -> dict[str, Any]:
  """Every layer slides where ``sliding_window`` is a number."""
  window = block.get('sliding_window', default)
  if window is None:
    return {}
  kinds = ['sliding_attention'] * block['num_hidden_layers']
  return windows({**block, 'sliding_window': window}, kinds)


def layer_types(config: Config) -> list[str]:
  """The list that a config.json has."""
  names = {v: k for k, v in LAYER_TYPES.items()}
  return [names[k] for k in config.layer_types or ['full'] * config.num_layers]


def common_block(config: Config) -> dict[str, Any]:
  """The config.json that every rotary family shares."""
  c = config
  rope: dict[str, Any] = {'rope_type': 'default'}
  if c.rope_scaling is not None:
    rope = c.rope_scaling.to_mapping()
  rope = {'rope_theta': c.rope_theta, **rope}
  if c.rotary_dim is not None:
    rope['partial_rotary_factor'] = c.rotary_dim / c.head_dim
  block = {
    'vocab_size': c.vocab_size,
    'num_hidden_layers': c.num_layers,
    'hidden_size': c.model_dim,
    'intermediate_size': c.mlp_dim,
    'num_attention_heads': c.num_heads,
    'num_key_value_heads': c.num_kv_heads,
    'head_dim': c.head_dim,
    'hidden_act': WRITTEN.get(c.activation, c.activation),
    'rms_norm_eps': c.norm_eps,
    'rope_theta': c.rope_theta,
    'rope_parameters': rope,
    'max_position_embeddings': c.max_length,
    'tie_word_embeddings': c.tie_embeddings,
  }
  if c.rope_scaling is not None:  # for readers of old files
    block['rope_scaling'] = c.rope_scaling.to_mapping()
  return block
