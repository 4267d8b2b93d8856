"""Normalisation, with statistics in at least float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def widened(dtype: Any) -> Any:
  """At least float32: the precision of sums."""
  return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def rms_norm(x: Array, scale: Array, *, eps: float, kind: str = 'rms') -> Array:
  """Scale by the root mean square: x / sqrt(mean(x²) + eps) * scale.

  The families differ in the last step: 'rms' multiplies in the precision of
  ``x``, 'rms_wide' before rounding to it, 'rms_one_plus' also, by 1 + scale.

  References:
    Zhang and Sennrich, 2019, Root Mean Square Layer Normalization,
    arXiv:1910.07467
  """
  wide = x.astype(widened(x.dtype))
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean_square + eps)
  if kind == 'rms':
    normed = normed.astype(x.dtype)
  scale = scale.astype(normed.dtype)
  if kind == 'rms_one_plus':
    scale = 1 + scale
  return (normed * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
  """(x - mean) / sqrt(variance + eps) * scale + bias.

  References:
    Ba et al., 2016, Layer Normalization, arXiv:1607.06450
  """
  wide = x.astype(widened(x.dtype))
  centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
  normed = centered * jax.lax.rsqrt(variance + eps)
  scale, bias = (
    jnp.broadcast_to(v.astype(wide.dtype), x.shape) for v in (scale, bias)
  )
  return (normed * scale + bias).astype(x.dtype)
