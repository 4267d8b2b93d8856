"""Rotary frequencies, and how they reach beyond the trained length."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = {
  'linear': (),
  'llama3': ('low_freq_factor', 'high_freq_factor'),
  'yarn': ('beta_fast', 'beta_slow', 'attention_factor', 'truncate'),
  'longrope': ('short_factor', 'long_factor', 'attention_factor'),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """A kind of scaling and its numbers, in Hugging Face's words.

  Attributes:
    rope_type: 'linear', 'llama3', 'yarn' or 'longrope'.
    factor: of the length.
    original_max_position_embeddings: the trained length; 'linear' has none.
    low_freq_factor: llama3: wavelengths above length / this are divided by
      ``factor``.
    high_freq_factor: llama3: those below length / this are kept.
    beta_fast: yarn: rotations over the trained length above which a frequency
      is kept.
    beta_slow: yarn: those below which it is divided by ``factor``.
    attention_factor: multiplies sine and cosine; None for the paper's.
    truncate: yarn: round the two bounds to whole dimensions.
    short_factor: longrope: divisor of each frequency when the model's
      ``max_length`` is at most the trained length.
    long_factor: longrope: the divisor otherwise.

  References:
    Chen et al. 2023, Extending Context Window of Large Language Models via
    Positional Interpolation, arXiv:2306.15595 (linear). Peng et al. 2023,
    YaRN, arXiv:2309.00071. Ding et al. 2024, LongRoPE, arXiv:2402.13753.
    Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv:2407.21783.
  """

  rope_type: str
  factor: float = 1.0
  original_max_position_embeddings: int | None = None
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()

  @classmethod
  def from_mapping(
    cls, block: Mapping[str, Any], max_length: int
  ) -> 'RopeScaling | None':
    """Read a block of config.json; None where it scales nothing.

    Args:
      block: ``rope_scaling`` or ``rope_parameters``.
      max_length: of the model, where the block leaves its factor to be told.

    Raises:
      ValueError: a kind or a key that is not known.
    """
    block = {k: v for k, v in block.items() if v is not None}
    for key in ('rope_theta', 'partial_rotary_factor'):
      block.pop(key, None)
    kind = block.pop('rope_type', block.pop('type', 'default'))
    block.pop('type', None)
    kind = {'su': 'longrope'}.get(kind, kind)
    if kind == 'default':
      return None
    if kind not in KINDS:
      raise ValueError(
        f'rope_type={kind!r} is not supported; supported: default,'
        f' {", ".join(KINDS)}'
      )
    known = {'factor', 'original_max_position_embeddings', *KINDS[kind]}
    if unknown := sorted(block.keys() - known):
      raise ValueError(
        f'{", ".join(unknown)} of rope_type {kind!r} is not supported;'
        f' supported: {", ".join(sorted(known))}'
      )
    original = block.get('original_max_position_embeddings')
    if original is None and kind != 'linear':
      raise ValueError(
        f'rope_type={kind!r} lacks original_max_position_embeddings: give the'
        ' length that the model was trained for'
      )
    if 'factor' not in block and original is not None:
      block['factor'] = max_length / original
    for key in ('short_factor', 'long_factor'):
      if key in block:
        block[key] = tuple(block[key])
    return cls(kind, **block)

  def to_mapping(self) -> dict[str, Any]:
    """The block of config.json."""
    names = ('factor', 'original_max_position_embeddings',
             *KINDS[self.rope_type])  # fmt: skip
    block = {name: getattr(self, name) for name in names}
    block = {k: list(v) if isinstance(v, tuple) else v
             for k, v in block.items() if v is not None}  # fmt: skip
    return {'rope_type': self.rope_type, **block}


def frequencies(
  dim: int, theta: float, scaling: RopeScaling | None, max_length: int,
  dtype: Any,
) -> tuple[Float[Array, ' half'], float]:  # fmt: skip
  """Radians per position of each pair, and what multiplies sine and cosine.

  theta^(-2i / dim), scaled.

  References:
    Su et al., 2021, RoFormer, arXiv:2104.09864
  """
  exponents = jnp.arange(0, dim, 2, dtype=dtype) / dim
  plain = jnp.asarray(theta, dtype) ** -exponents
  if scaling is None:
    return plain, 1.0
  kind, factor = scaling.rope_type, scaling.factor
  if kind == 'linear':
    return plain / factor, 1.0
  length = scaling.original_max_position_embeddings or max_length
  if kind == 'llama3':
    turns = length * plain / (2 * math.pi)  # over the trained length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / factor), 1.0
  if kind == 'yarn':
    kept = _yarn_kept(dim, theta, scaling, length, dtype)
    wide = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    stretched = plain * (kept + (1 - kept) / factor)
  else:
    wide = 1.0
    if factor > 1:
      wide = math.sqrt(1 + math.log(factor) / math.log(length))
    name = 'long_factor' if max_length > length else 'short_factor'
    divisor = getattr(scaling, name)
    if len(divisor) != dim // 2:
      raise ValueError(
        f'{name} has {len(divisor)} entries, expected {dim // 2}: one of each'
        ' pair of rotated dimensions'
      )
    stretched = plain / jnp.asarray(divisor, dtype)
  given = scaling.attention_factor
  return stretched, wide if given is None else given


def _yarn_kept(
  dim: int, theta: float, scaling: RopeScaling, length: int, dtype: Any
) -> Float[Array, ' half']:
  """Share of the plain frequency of each pair: 1 where it turns fast."""

  def pair(turns: float) -> float:
    return dim * math.log(length / (turns * 2 * math.pi)) / (
      2 * math.log(theta)
    )  # fmt: skip

  low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  high += 0.001 if low == high else 0
  ramp = (jnp.arange(dim // 2, dtype=dtype) - low) / (high - low)
  return 1 - jnp.clip(ramp, 0, 1)
