"""The shape of a decoder, checked when it is made."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from postrain.models.rope import RopeScaling

DTYPES = ('bfloat16', 'float16', 'float32', 'float64')
REMAT_POLICIES = (
  'nothing_saveable',
  'dots_with_no_batch_dims_saveable',
  'dots_saveable',
  'everything_saveable',
)
CHOICES = {
  'norm': ('rms', 'rms_wide', 'rms_one_plus', 'layer'),
  'norm_order': ('pre', 'post', 'both'),
  'activation': ('silu', 'gelu', 'gelu_tanh'),
  'qk_norm_over': ('head', 'heads'),
  'position_embedding': ('rotary', 'learned'),
  'head': ('language_model', 'sequence_labels', 'token_labels'),
  'attention': ('auto', 'xla', 'cudnn', 'splash'),
}
LAYER_TYPES = ('full', 'sliding', 'unrotated')


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyperparameters of `postrain.models.transformer`.

  Attributes:
    vocab_size: rows of the embedding.
    num_layers: residual blocks.
    model_dim: width of the residual stream.
    mlp_dim: width of the MLP; of each expert where there are experts.
    num_heads: query heads.
    num_kv_heads: key and value heads; they divide the query heads.
    head_dim: width of a head.
    family: Hugging Face's ``model_type``, the layout of an export.
    rope_theta: base of the rotary frequencies.
    rope_scaling: how they reach beyond the trained length; a mapping in
      Hugging Face's words will do.
    rotary_dim: leading dimensions of a head that turn; None for all.
    local_rope_theta: base in sliding layers, which are then not scaled; None
      for that of all layers (Gemma 3).
    position_embedding: 'rotary', or 'learned' as in GPT-2.
    layer_types: of each layer, 'full', 'sliding' (sees ``sliding_window``
      tokens, itself included) or 'unrotated' (full, without positions); empty
      if all are full.
    sliding_window: width of sliding layers.
    norm: 'rms'; 'rms_wide', multiplied by its scale in float32 (OLMo 2);
      'rms_one_plus', also by one plus the parameter (Gemma); 'layer', with
      mean and bias (GPT-2).
    norm_order: 'pre' normalises what attention and MLP read, 'post' what they
      add (OLMo 2), 'both' both (Gemma 2).
    norm_eps: added to the mean square.
    tie_embeddings: unembed with the embedding.
    embedding_scale: multiplies embeddings (Gemma); None for 1.
    qkv_bias: bias of the query, key and value projections.
    output_bias: bias of the projection after attention.
    mlp_bias: biases of the MLP.
    gated_mlp: down(act(gate) * up), else down(act(up)).
    activation: of the MLP.
    qk_norm: normalise queries and keys.
    qk_norm_over: each 'head' (Qwen3) or all 'heads' at once (OLMo 2).
    attention_scale: multiplies q·k; None for head_dim^-1/2.
    attention_soft_cap: c·tanh(x/c) of attention logits (Gemma 2); None for no.
    logit_soft_cap: the same of the logits.
    num_experts: experts of each MLP; 0 for a dense one.
    experts_per_token: those that a token visits.
    normalize_gates: gates of a token's experts sum to 1.
    shared_mlp_dim: width of the gated expert of all tokens (Qwen2-MoE); 0 for
      none.
    head: 'language_model' unembeds. The others give ``num_labels`` logits a
      position in place of the vocabulary's, and need ``tie_embeddings``:
      'sequence_labels' (a reward model, read at the last token), without a
      bias, and 'token_labels' (a process reward model), with one.
    num_labels: of such a head; 0 for a language model.
    max_length: positions that the model was made for; a cache may not have
      more slots.
    dtype: of activations and of the cache; softmax, normalisation statistics
      and logits are at least float32.
    param_dtype: of the parameters.
    remat: name of a policy of `jax.checkpoint_policies` for the blocks; None
      keeps every activation for the backward pass.
    scan_layers: compile one layer and loop over it; False compiles each.
    attention: within whole sequences: 'xla', 'cudnn' (NVIDIA GPUs), 'splash'
      (TPUs), or 'auto', whichever of them the backend and the model allow; see
      `postrain.models.kernels`.
  """

  vocab_size: int
  num_layers: int
  model_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  family: str = 'llama'
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  rotary_dim: int | None = None
  local_rope_theta: float | None = None
  position_embedding: str = 'rotary'
  layer_types: tuple[str, ...] = ()
  sliding_window: int | None = None
  norm: str = 'rms'
  norm_order: str = 'pre'
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  embedding_scale: float | None = None
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  gated_mlp: bool = True
  activation: str = 'silu'
  qk_norm: bool = False
  qk_norm_over: str = 'head'
  attention_scale: float | None = None
  attention_soft_cap: float | None = None
  logit_soft_cap: float | None = None
  num_experts: int = 0
  experts_per_token: int = 0
  normalize_gates: bool = True
  shared_mlp_dim: int = 0
  head: str = 'language_model'
  num_labels: int = 0
  max_length: int = 2048
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: str | None = None
  scan_layers: bool = True
  attention: str = 'auto'

  @property
  def windows(self) -> tuple[int | None, ...]:
    """What the kinds of layers see, each once; None is everything."""
    kinds = self.layer_types or ('full',)
    seen = (self.sliding_window if k == 'sliding' else None for k in kinds)
    return tuple(dict.fromkeys(seen))

  def __post_init__(self) -> None:
    """Refuse what no model can be made of.

    Raises:
      ValueError: names the field, its value and what would do.
    """
    if isinstance(self.rope_scaling, Mapping):
      scaling = RopeScaling.from_mapping(self.rope_scaling, self.max_length)
      object.__setattr__(self, 'rope_scaling', scaling)
    object.__setattr__(self, 'layer_types', tuple(self.layer_types))
    _check_numbers(self)
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(
          f'{name}={getattr(self, name)!r}: use one of {", ".join(choices)}'
        )
    _check_heads(self)
    _check_layers(self)
    _check_experts(self)
    _check_labels(self)
    for name in ('dtype', 'param_dtype'):
      _check_dtype(name, getattr(self, name))
    if self.remat is not None and self.remat not in REMAT_POLICIES:
      raise ValueError(
        f'remat={self.remat!r} is not a policy: use None or one of'
        f' {", ".join(REMAT_POLICIES)}'
      )


def _check_numbers(config: Config) -> None:
  for name in (
    'vocab_size', 'num_layers', 'model_dim', 'mlp_dim', 'num_heads',
    'num_kv_heads', 'head_dim', 'max_length', 'rope_theta', 'norm_eps',
    'rotary_dim', 'local_rope_theta', 'sliding_window', 'embedding_scale',
    'attention_scale', 'attention_soft_cap', 'logit_soft_cap',
  ):  # fmt: skip
    value: Any = getattr(config, name)
    if value is not None and not value > 0:
      raise ValueError(f'{name}={value!r} must be positive')


def _check_heads(config: Config) -> None:
  if config.num_heads % config.num_kv_heads:
    raise ValueError(
      f'num_kv_heads={config.num_kv_heads} does not divide'
      f' num_heads={config.num_heads}: each key head serves equally many'
      ' query heads'
    )
  turned = config.rotary_dim or config.head_dim
  if config.position_embedding == 'rotary' and (
    turned % 2 or turned > config.head_dim
  ):
    name = 'head_dim' if config.rotary_dim is None else 'rotary_dim'
    raise ValueError(
      f'{name}={turned} with head_dim={config.head_dim}: rotary embedding'
      ' turns pairs of dimensions of a head, choose an even number, at most'
      ' head_dim'
    )


def _check_layers(config: Config) -> None:
  kinds = config.layer_types
  if kinds and len(kinds) != config.num_layers:
    raise ValueError(
      f'layer_types has {len(kinds)} entries for {config.num_layers} layers:'
      ' give one of each layer, or none'
    )
  if unknown := sorted(set(kinds) - set(LAYER_TYPES)):
    raise ValueError(
      f'layer_types with {", ".join(unknown)}: use {", ".join(LAYER_TYPES)}'
    )
  if 'sliding' in kinds and config.sliding_window is None:
    raise ValueError(
      "layer_types has 'sliding' layers without sliding_window: set its width"
    )


def _check_experts(config: Config) -> None:
  low, high = (1, config.num_experts) if config.num_experts else (0, 0)
  if not low <= config.experts_per_token <= high:
    raise ValueError(
      f'experts_per_token={config.experts_per_token} of'
      f' num_experts={config.num_experts}: choose {low} to {high}'
    )
  if config.num_experts and not config.gated_mlp:
    raise ValueError('gated_mlp=False with experts: experts are gated MLPs')


def _check_labels(config: Config) -> None:
  labelled = config.head != 'language_model'
  if labelled != (config.num_labels > 0):
    raise ValueError(
      f'num_labels={config.num_labels} of head={config.head!r}: give 1 or more'
      ' to a head of labels, 0 to a language model'
    )
  if labelled and not config.tie_embeddings:
    raise ValueError(
      f'tie_embeddings=False of head={config.head!r}: labels have no'
      ' unembedding, leave it True'
    )


def _check_dtype(name: str, value: str) -> None:
  if value not in DTYPES:
    raise ValueError(f'{name}={value!r}: use one of {", ".join(DTYPES)}')
  if value == 'float64' and not jax.config.read('jax_enable_x64'):
    raise ValueError(
      f"{name}='float64' needs 64-bit JAX: set jax_enable_x64 first"
    )
