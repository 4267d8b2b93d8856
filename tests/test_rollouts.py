"""Which groups make an iteration, and what a completion is worth."""

import jax
import numpy as np

from postrain.reporting import rollout_figures
from postrain.rollouts import (
  cut,
  joined,
  numbered,
  parted,
  select_groups,
  weighted_sum,
)
from postrain.types import Prompts, Samples


def part(first: int, width: int, rewards: list[list[float]]) -> tuple:
  """Prompts ``first``, ``first + 1``, ... with as many samples as rewards."""
  num_prompts, num_samples = np.shape(rewards)
  numbers = np.arange(first, first + num_prompts)
  prompts = Prompts(
    np.repeat(numbers[:, None], width, 1),
    np.ones((num_prompts, width), bool),
    [{'number': int(n)} for n in numbers],
  )
  rows = np.repeat(numbers, num_samples)[:, None]
  empty = np.zeros(rows.shape, np.float32)
  samples = Samples(
    rows, rows >= 0, empty, empty, np.zeros(len(rows), bool), None
  )
  return prompts, samples, {'right': np.ravel(rewards).astype(np.float32)}


SAME, MIXED = [1.0, 1.0], [0.0, 1.0]


def test_weighted_sum() -> None:
  rewards = {'a': np.array([1.0, 2.0]), 'b': np.array([10.0, 0.0])}
  total = weighted_sum(rewards, {'a': 2.0, 'b': -0.5})
  np.testing.assert_array_equal(total, [-3.0, 4.0])
  assert total.dtype == np.float32


def test_parts_of_a_rollout_come_together_again() -> None:
  whole = part(0, 4, [SAME, MIXED, SAME, MIXED])
  pieces = []
  for prompts, ids in cut(whole[0], 2):
    rows = np.flatnonzero(np.isin(np.arange(8) // 2, ids))
    samples, rewards = jax.tree.map(lambda x, r=rows: x[r], whole[1:])
    pieces.append((prompts, samples, rewards))
  prompts, samples, rewards = joined(pieces)
  assert prompts.examples == whole[0].examples
  jax.tree.map(
    np.testing.assert_array_equal,
    (prompts[:2], samples, rewards),
    (whole[0][:2], *whole[1:]),
  )


def test_prompts_by_numbers_of_several_iterations() -> None:
  drawn = {1: part(2, 2, [SAME, SAME])[0], 4: part(8, 3, [SAME, SAME])[0]}
  prompts = numbered(drawn, np.array([9, 2]), 4, -1)
  assert prompts.tokens.tolist() == [[-1, 9, 9, 9], [-1, -1, 2, 2]]
  assert prompts.mask.tolist() == [
    [False, *[True] * 3],
    [False] * 2 + [True] * 2,
  ]
  assert [e['number'] for e in prompts.examples] == [9, 2]


def test_groups_are_parted_from_others() -> None:
  _, samples, _ = part(5, 2, [SAME, SAME])
  these, others = parted(samples, np.array([False, True]), -1)
  assert these.tokens[:, 0].tolist() == [-1, -1, 6, 6]
  assert others.tokens[:, 0].tolist() == [5, 5, -1, -1]
  np.testing.assert_array_equal(these.mask, ~others.mask)


def test_one_part_is_taken_as_it_is() -> None:
  parts = [part(0, 2, [SAME, MIXED])]
  assert select_groups(parts, np.array([False, True]), 2, 9) is parts[0]


def test_informative_groups_come_first_and_keep_their_order() -> None:
  parts = [part(0, 2, [SAME, MIXED]), part(2, 3, [MIXED, SAME])]
  informative = np.array([False, True, True, False])
  prompts, samples, rewards = select_groups(parts, informative, 2, 9)
  assert [e['number'] for e in prompts.examples] == [1, 2]
  # The narrower prompt is padded on the left.
  assert prompts.tokens.tolist() == [[9, 1, 1], [2, 2, 2]]
  assert prompts.mask.tolist() == [[False, True, True], [True] * 3]
  assert samples.tokens[:, 0].tolist() == [1, 1, 2, 2]
  assert samples.kept is None
  assert rewards['right'].tolist() == [*MIXED, *MIXED]


def test_missing_groups_are_filled_up_with_the_earliest_others() -> None:
  parts = [part(0, 2, [SAME, SAME]), part(2, 2, [SAME, MIXED])]
  informative = np.array([False, False, False, True])
  prompts, samples, rewards = select_groups(parts, informative, 2, 9)
  assert [e['number'] for e in prompts.examples] == [0, 3]
  assert samples.tokens[:, 0].tolist() == [0, 0, 3, 3]
  assert rewards['right'].tolist() == [*SAME, *MIXED]


def test_variety_of_completions() -> None:
  tokens = np.array([[1, 2, 1, 2], [1, 2, 3, 0], [5, 0, 0, 0]])
  mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], bool)
  zeros = np.zeros(tokens.shape, np.float32)
  samples = Samples(tokens, mask, zeros, zeros, np.zeros(3, bool))
  found = rollout_figures(samples, {}, np.zeros(3))
  # 12 21 12 and 12 23: one said again, three distinct.
  assert found['completion/repetition'] == 1 - 4 / 5
  assert found['completion/distinct_2'] == 3 / 5
