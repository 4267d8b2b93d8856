"""Rollouts on the host: summed rewards, and the groups of an iteration."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from postrain import sharding
from postrain.types import Prompts, Samples

Part = tuple[Prompts, Samples, dict[str, np.ndarray]]


def weighted_sum(
  rewards: Mapping[str, np.ndarray], weights: Mapping[str, float]
) -> np.ndarray:
  """Σ weight x reward of each completion, float32."""
  total = sum(weights[label] * rewards[label] for label in weights)
  return np.asarray(total, np.float32)


def cut(prompts: Prompts, num_parts: int) -> list[tuple[Prompts, np.ndarray]]:
  """Parts of equal numbers of prompts, and the places of these."""
  places = np.arange(len(prompts.tokens), dtype=np.int32)
  if num_parts == 1:
    return [(prompts, places)]
  prompts = fetched(prompts)
  return [(picked(prompts, ids), ids) for ids in np.split(places, num_parts)]


def picked(prompts: Prompts, ids: np.ndarray) -> Prompts:
  """Some prompts of the host, by their numbers."""
  examples = [prompts.examples[i] for i in ids]
  return Prompts(prompts.tokens[ids], prompts.mask[ids], examples)


def numbered(
  drawn: Mapping[int, Prompts], numbers: np.ndarray, width: int, pad_id: int
) -> Prompts:
  """Prompts by their numbers, counted over iterations of the data.

  Args:
    drawn: iteration -> as many prompts as there are numbers.
    numbers: which.
    width: slots of the result.
    pad_id: fills those on the left.
  """
  shape, examples = (len(numbers), width), []
  tokens, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
  for row, number in enumerate(numbers):
    prompts, place = drawn[number // len(numbers)], number % len(numbers)
    slots = prompts.tokens.shape[1]
    tokens[row, -slots:] = prompts.tokens[place]
    mask[row, -slots:] = prompts.mask[place]
    examples.append(prompts.examples[place])
  return Prompts(tokens, mask, examples)


def blank(samples: Samples, pad_id: int) -> Samples:
  """The same rows without a token."""
  zeros = jax.tree.map(np.zeros_like, samples)
  return zeros._replace(tokens=np.full_like(samples.tokens, pad_id))


def taken(samples: Samples, rows: np.ndarray) -> Samples:
  """Some rows."""
  return jax.tree.map(lambda x: x[rows], samples)


def parted(
  samples: Samples, groups: np.ndarray, pad_id: int
) -> tuple[Samples, Samples]:
  """All rows twice: only those of the groups have tokens, and only others."""
  rows = np.repeat(groups, len(samples.tokens) // len(groups))
  empty = blank(samples, pad_id)

  def kept(rows: np.ndarray) -> Samples:
    return jax.tree.map(
      lambda x, y: np.where(rows if x.ndim == 1 else rows[:, None], x, y),
      samples,
      empty,
    )

  return kept(rows), kept(~rows)


def fetched(prompts: Prompts) -> Prompts:
  """Prompts on the host, their examples as they are."""
  tokens, mask = sharding.on_host((prompts.tokens, prompts.mask))
  return Prompts(tokens, mask, prompts.examples)


def joined(parts: Sequence[Part]) -> Part:
  """The parts of `cut`, sampled and rewarded, as one."""
  if len(parts) == 1:
    return parts[0]
  prompts, samples, rewards = zip(*parts, strict=True)
  whole = Prompts(
    np.concatenate([p.tokens for p in prompts]),
    np.concatenate([p.mask for p in prompts]),
    [example for p in prompts for example in p.examples],
  )
  samples, rewards = (
    jax.tree.map(lambda *x: np.concatenate(x), *each)
    for each in (samples, rewards)
  )
  return whole, samples, rewards


def select_groups(
  parts: Sequence[Part], informative: np.ndarray, num_prompts: int, pad_id: int
) -> Part:
  """The first ``num_prompts`` informative groups, filled up with others.

  Groups keep the order in which they were sampled, so that the result is a
  function of the parts alone.
  """
  if len(parts) == 1:
    return parts[0]
  order = np.argsort(~informative, kind='stable')[:num_prompts]
  groups = np.sort(order)
  num_samples = len(parts[0][1].tokens) // num_prompts
  rows = (groups[:, None] * num_samples + np.arange(num_samples)).reshape(-1)
  width = max(prompts.tokens.shape[1] for prompts, *_ in parts)

  def widen(x: np.ndarray, value: int) -> np.ndarray:
    missing = width - x.shape[1]
    return np.pad(x, ((0, 0), (missing, 0)), constant_values=value)

  prompts = Prompts(
    np.concatenate([widen(p.tokens, pad_id) for p, *_ in parts]),
    np.concatenate([widen(p.mask, False) for p, *_ in parts]),
    [e for p, *_ in parts for e in p.examples],
  )
  prompts = picked(prompts, groups)
  parts = [(p, _widened(s, width), r) for p, s, r in parts]
  samples = jax.tree.map(
    lambda *x: np.concatenate(x)[rows], *(samples for _, samples, _ in parts)
  )
  rewards = {
    label: np.concatenate([r[label] for *_, r in parts])[rows]
    for label in parts[0][2]
  }
  return prompts, samples, rewards


def _widened(samples: Samples, prompt_length: int) -> Samples:
  """Pad the experts of prompts on the left, where none was recorded."""
  if samples.experts is None:
    return samples
  length = prompt_length + samples.tokens.shape[1]
  missing = length - samples.experts.shape[1]
  widths = ((0, 0), (missing, 0), (0, 0), (0, 0))
  experts = np.pad(samples.experts, widths, constant_values=-1)
  return samples._replace(experts=experts)
