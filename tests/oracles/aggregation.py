"""Weights and masks."""

import numpy as np


def token_mean(mask):
  total = sum(bool(mask[i]) for i in np.ndindex(mask.shape))
  return np.array([[m / max(total, 1) for m in row] for row in mask])


def row_count(mask, count_empty):
  return max(sum(1 for row in mask if count_empty or any(row)), 1)


def sequence_mean(mask, *, count_empty=False):
  n = row_count(mask, count_empty)
  return np.array([[m / max(sum(row), 1) / n for m in row] for row in mask])


def sequence_sum(mask, *, count_empty=False):
  n = row_count(mask, count_empty)
  return np.array([[m / n for m in row] for row in mask])


def constant_length(mask, *, length, count_empty=False):
  n = row_count(mask, count_empty)
  return np.array([[m / n / length for m in row] for row in mask])


def group_token_mean(mask, groups, *, count_empty=False):
  tokens = {}
  for row, group in zip(mask, groups, strict=True):
    tokens[group] = tokens.get(group, 0) + sum(row)
  n = max(sum(1 for c in tokens.values() if count_empty or c), 1)
  return np.array(
    [
      [m / max(tokens[group], 1) / n for m in row]
      for row, group in zip(mask, groups, strict=True)
    ]
  )


def overlong(mask, truncated):
  return np.array(
    [
      [m and not cut for m in row]
      for row, cut in zip(mask, truncated, strict=True)
    ]
  )


def informative_groups(rewards, where=None, *, low=None, high=None):
  keep = []
  for p in range(len(rewards)):
    r = [x for g, x in enumerate(rewards[p]) if where is None or where[p, g]]
    mean = sum(r) / max(len(r), 1)
    keep.append(
      bool(r)
      and max(r) > min(r)
      and (low is None or mean > low)
      and (high is None or mean < high)
    )
  return np.array(keep)
