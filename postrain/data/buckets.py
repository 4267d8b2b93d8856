"""Few shapes for many lengths: each new shape is a compilation."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Bool, Int
import numpy as np


def bucket_sizes(max_length: int, *, num_buckets: int = 6) -> tuple[int, ...]:
  """Lengths that arrays may have: ⌈max_length / 2^i⌉ for i < num_buckets.

  Halving keeps the padding of any length below one half of its bucket, the
  smallest bucket aside.

  Args:
    max_length: the largest bucket, in tokens.
    num_buckets: shapes at most.

  Raises:
    ValueError: a number below 1.
  """
  if max_length < 1 or num_buckets < 1:
    raise ValueError(
      f'max_length={max_length}, num_buckets={num_buckets}: both must be at'
      ' least 1'
    )
  return tuple(sorted({-(-max_length >> i) for i in range(num_buckets)}))


def bucket(length: int, sizes: Sequence[int]) -> int:
  """The smallest of the sizes that holds ``length`` tokens.

  Raises:
    ValueError: none does.
  """
  fitting = [size for size in sizes if size >= length]
  if not fitting:
    raise ValueError(
      f'length={length} is over the largest bucket {max(sizes, default=0)}:'
      ' raise max_length'
    )
  return min(fitting)


def padded(
  rows: Sequence[Sequence[int]],
  *,
  length: int,
  pad_id: int,
  side: Literal['left', 'right'],
) -> tuple[Int[np.ndarray, 'B T'], Bool[np.ndarray, 'B T']]:
  """Fill rows up to ``length``: tokens, and True where they are real."""
  tokens = np.full((len(rows), length), pad_id, np.int32)
  real = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    start = length - len(row) if side == 'left' else 0
    tokens[i, start : start + len(row)] = row
    real[i, start : start + len(row)] = True
  return tokens, real
