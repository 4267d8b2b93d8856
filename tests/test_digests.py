"""Digests of arrays: any changed bit shows, where they lie does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import sharding
from postrain.digests import SEEDS, digest

digested = jax.jit(digest)


def expected(array: np.ndarray) -> list[int]:
  """The sums of the docstring, in Python's integers."""
  words = array.reshape(-1).view(f'uint{8 * array.dtype.itemsize}').tolist()
  sums = [0, 0]
  for place, word in enumerate(words):
    for i, seed in enumerate(SEEDS):
      x = (place + seed) % 2**32
      for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor % 2**32
      sums[i] = (sums[i] + word * ((x ^ (x >> 16)) | 1)) % 2**32
  return sums


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'int8', 'uint32'])
def test_digest_is_its_equation(dtype: str) -> None:
  array = np.arange(-6, 6).reshape(3, 2, 2).astype(dtype)
  assert digested(array).tolist() == expected(array)


def test_every_bit_counts() -> None:
  words = np.random.default_rng(0).integers(2**32, size=64, dtype=np.uint32)
  found = digested(words).tolist()
  for bit in range(32):
    for place in (0, 13, 63):
      changed = words.copy()
      changed[place] ^= np.uint32(1 << bit)
      assert digested(changed).tolist() != found
  assert digested(words[::-1].copy()).tolist() != found


def test_where_arrays_lie_does_not_count() -> None:
  array = jnp.sin(jnp.arange(16.0 * 3)).reshape(16, 3)
  found = [
    digested(sharding.put_rows(sharding.make_mesh(data=size), array)).tolist()
    for size in (1, 2, 8)
  ]
  assert found == [digested(array).tolist()] * 3


def test_types_of_fewer_bits() -> None:
  for dtype in (bool, jnp.uint4, jnp.bfloat16, jnp.float8_e4m3fn):
    array = jnp.arange(2).astype(dtype)
    assert digested(array).tolist() != digested(array[::-1]).tolist()
