"""Which examples an iteration uses: a pure function, exact across epochs."""

import functools

from jaxtyping import Int
import numpy as np


def indices(
  seed: int, iteration: int, *, num_prompts: int, size: int
) -> Int[np.ndarray, ' P']:
  """Draw the examples of an iteration without replacement within an epoch.

  The epochs, each a permutation by (seed, epoch), stand one after the other,
  and iteration ``i`` takes the places [i P, (i + 1) P). An iteration may span
  two epochs or more; nothing is dropped at the border.

  Args:
    seed: of the order, not negative.
    iteration: counts from 0.
    num_prompts: P, examples of an iteration.
    size: of the data set.

  Raises:
    ValueError: a number is out of its range.
  """
  for name, value, least in (
    ('seed', seed, 0),
    ('iteration', iteration, 0),
    ('num_prompts', num_prompts, 1),
    ('size', size, 1),
  ):
    if value < least:
      raise ValueError(f'{name}={value}: it must be at least {least}')
  places = np.arange(iteration * num_prompts, (iteration + 1) * num_prompts)
  epochs, offsets = np.divmod(places, size)
  chosen = np.empty(num_prompts, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    chosen[here] = _permutation(seed, int(epoch), size)[offsets[here]]
  return chosen


@functools.lru_cache(maxsize=2)  # an iteration spans two epochs, mostly
def _permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, ' N']:
  # NumPy promises the raw stream of a bit generator, not its shuffles, to stay
  # the same from version to version.
  key = np.array([seed, epoch], np.uint64)
  return np.argsort(np.random.Philox(key=key).random_raw(size), kind='stable')
