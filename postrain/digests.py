"""Numbers that tell whether arrays have kept their bits."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

SEEDS = (0x9E3779B9, 0x7F4A7C15)  # of the two sums


def digest(array: Any) -> UInt[Array, '2']:
  """Sum the bits of an array, weighted by where they stand, twice.

  d = Σᵢ bitsᵢ · (hash(i) | 1) mod 2³², with i the position in the whole array.
  Sums of integers are exact in any order, so this does not depend on how the
  array lies on devices. The weights are odd: a change of one bit always shows,
  and one of several stays unseen with a chance of about 2⁻⁶⁴. It is no
  protection from those who change arrays on purpose.
  """
  words = _words(array)
  position = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    here = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    position = position * jnp.uint32(size % 2**32) + here
  seeds = jnp.array(SEEDS, jnp.uint32).reshape(2, *(1,) * words.ndim)
  weights = _hash(position[None] + seeds) | jnp.uint32(1)
  axes = tuple(range(1, weights.ndim))
  return jnp.sum(words[None] * weights, axes, dtype=jnp.uint32)


def _words(array: Any) -> UInt[Array, '...']:
  """The bits of each element as uint32; of 8 bytes as two."""
  array = jnp.asarray(array)
  if array.dtype in (bool, jnp.uint4):  # of fewer bits than a byte
    return array.astype(jnp.uint32)
  bits = min(8 * array.dtype.itemsize, 32)
  words = jax.lax.bitcast_convert_type(array, jnp.dtype(f'uint{bits}'))
  return words.astype(jnp.uint32)


def _hash(x: UInt[Array, '...']) -> UInt[Array, '...']:
  """The last step of MurmurHash3: neighbours become unlike."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
  return x ^ (x >> jnp.uint32(16))
