"""The shape of a dense decoder, checked when it is made."""

import dataclasses

import jax

DTYPES = ('bfloat16', 'float16', 'float32', 'float64')
REMAT_POLICIES = (
  'nothing_saveable',
  'dots_with_no_batch_dims_saveable',
  'dots_saveable',
  'everything_saveable',
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Hyperparameters of `postrain.models.transformer`.

  Attributes:
    vocab_size: rows of the embedding.
    num_layers: residual blocks.
    model_dim: width of the residual stream.
    mlp_dim: width of the gated MLP.
    num_heads: query heads.
    num_kv_heads: key and value heads; they divide the query heads.
    head_dim: width of a head, even (rotary halves).
    rope_theta: base of the rotary frequencies.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: unembed with the embedding.
    qkv_bias: bias of the query, key and value projections (Qwen2).
    qk_norm: RMSNorm of each query and key head (Qwen3).
    max_length: positions that the model was made for; a cache may not have
      more slots.
    dtype: of activations and of the cache; softmax, normalisation statistics
      and logits are at least float32.
    param_dtype: of the parameters.
    remat: name of a policy of `jax.checkpoint_policies` for the blocks; None
      keeps every activation for the backward pass.
  """

  vocab_size: int
  num_layers: int
  model_dim: int
  mlp_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  qkv_bias: bool = False
  qk_norm: bool = False
  max_length: int = 2048
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  remat: str | None = None

  def __post_init__(self) -> None:
    """Refuse what no model can be made of.

    Raises:
      ValueError: names the field, its value and what would do.
    """
    for name in (
      'vocab_size', 'num_layers', 'model_dim', 'mlp_dim', 'num_heads',
      'num_kv_heads', 'head_dim', 'max_length', 'rope_theta', 'norm_eps',
    ):  # fmt: skip
      if not getattr(self, name) > 0:
        raise ValueError(f'{name}={getattr(self, name)!r} must be positive')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_kv_heads={self.num_kv_heads} does not divide'
        f' num_heads={self.num_heads}: each key head serves equally many'
        ' query heads'
      )
    if self.head_dim % 2:
      raise ValueError(
        f'head_dim={self.head_dim} is odd: rotary embedding turns pairs of'
        ' dimensions, choose an even number'
      )
    for name in ('dtype', 'param_dtype'):
      _check_dtype(name, getattr(self, name))
    if self.remat is not None and self.remat not in REMAT_POLICIES:
      raise ValueError(
        f'remat={self.remat!r} is not a policy: use None or one of'
        f' {", ".join(REMAT_POLICIES)}'
      )


def _check_dtype(name: str, value: str) -> None:
  if value not in DTYPES:
    raise ValueError(f'{name}={value!r}: use one of {", ".join(DTYPES)}')
  if value == 'float64' and not jax.config.read('jax_enable_x64'):
    raise ValueError(
      f"{name}='float64' needs 64-bit JAX: set jax_enable_x64 first"
    )
