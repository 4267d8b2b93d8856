"""What the rows of a workdir have found, from their files alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
import itertools
import math
import os
from typing import NamedTuple

import numpy as np

from postrain import metrics
from postrain.evaluation import bootstrap_interval
from postrain.sweeps.planning import recorded
from postrain.workdir import FILES

SEED = 'seed'  # the axis that repeats, where all others compare
Labels = tuple[tuple[str, str], ...]


class Result(NamedTuple):
  """A finished row: its labels, and a figure along its steps."""

  labels: dict[str, str]
  steps: np.ndarray
  values: np.ndarray
  final: float  # mean of the last values


class Summary(NamedTuple):
  """Of values over seeds; NaN where one value has no spread."""

  number: int
  mean: float
  error: float  # standard error of the mean
  low: float  # of the bootstrap interval
  high: float


class Effect(NamedTuple):
  """What one choice of an axis adds to another, all else equal."""

  axis: str
  choice: str
  against: str
  difference: Summary

  @property
  def exceeds(self) -> bool:
    """Whether the interval of the difference leaves out 0."""
    return self.difference.low > 0 or self.difference.high < 0


def results(root: str, figure: str, *, last: int = 1) -> list[Result]:
  """Read a figure of every finished row.

  Args:
    root: workdir of a sweep.
    figure: a key of metrics.jsonl.
    last: how many of its last values make the final one, by their mean.

  Raises:
    ValueError: no sweep stands there, nothing has finished, or a row has not
      the figure; names those that it has.
  """
  if last < 1:
    raise ValueError(f'last={last}: it must be at least 1')
  entries = recorded(root)
  if not entries:
    raise ValueError(f'{root} holds no sweep: run experiments/sweep.py first')
  found = []
  for entry in entries:
    directory = os.path.join(root, entry['directory'])
    if not os.path.exists(os.path.join(directory, 'finished.json')):
      continue
    found.append(result(directory, entry['labels'], figure, last))
  if not found:
    raise ValueError(f'none of the {len(entries)} rows in {root} has finished')
  return found


def result(
  directory: str, labels: dict[str, str], figure: str, last: int = 1
) -> Result:
  """Read a figure of the row in a directory.

  Raises:
    ValueError: it has no such figure.
  """
  rows = list(metrics.read(os.path.join(directory, FILES[0])))
  points = [(row['step'], row[figure]) for row in rows if figure in row]
  if not points:
    names = sorted({name for row in rows for name in row} - {'step'})
    raise ValueError(
      f'({" ".join(labels.values())}) has no figure {figure!r}; it has:'
      f' {", ".join(names)}'
    )
  steps, values = map(np.array, zip(*points, strict=True))
  return Result(labels, steps, values, float(values[-last:].mean()))


def summary(values: Iterable[float]) -> Summary:
  """Mean, standard error and 95% bootstrap interval, over seeds."""
  array = np.array([*values], float)
  mean = float(array.mean())
  if len(array) < 2:
    return Summary(1, mean, math.nan, math.nan, math.nan)
  error = float(array.std(ddof=1)) / len(array) ** 0.5
  _, low, high = bootstrap_interval(array, num_resamples=2000)
  return Summary(len(array), mean, error, low, high)


def cells(found: Sequence[Result]) -> dict[Labels, list[Result]]:
  """Results by their labels without the seed, in order."""
  by_labels = defaultdict(list)
  for result in found:
    by_labels[_without(result.labels, SEED)].append(result)
  return dict(by_labels)


def choices(found: Sequence[Result]) -> dict[str, list[str]]:
  """The choices of each axis that has several, in order."""
  axes: dict[str, dict[str, None]] = defaultdict(dict)
  for result in found:
    for axis, label in result.labels.items():
      axes[axis][label] = None
  return {
    axis: [*labels]
    for axis, labels in axes.items()
    if axis != SEED and len(labels) > 1
  }


def effects(found: Sequence[Result]) -> list[Effect]:
  """Each choice of an axis against each earlier one.

  Rows are paired with those that have all other labels, the seed too. The
  differences of one seed are averaged, and the interval is over seeds: rows of
  one seed share their first parameters and prompts, and are not independent.
  """
  finals = {tuple(r.labels.items()): r.final for r in found}
  made = []
  for axis, labels in choices(found).items():
    for against, choice in itertools.combinations(labels, 2):
      by_seed = defaultdict(list)
      for result in found:
        other = {**result.labels, axis: against}
        if result.labels.get(axis) != choice:
          continue
        if (key := tuple(other.items())) in finals:
          unit = result.labels.get(SEED, _without(result.labels, axis))
          by_seed[unit].append(result.final - finals[key])
      if by_seed:
        means = [float(np.mean(each)) for each in by_seed.values()]
        made.append(Effect(axis, choice, against, summary(means)))
  return made


def _without(labels: Mapping[str, str], axis: str) -> Labels:
  return tuple((k, v) for k, v in labels.items() if k != axis)


def table_of_cells(found: Sequence[Result]) -> str:
  """A line for each cell, in markdown."""
  axes = [*choices(found)] or ['cell']
  lines = [
    f'| {" | ".join(axes)} | seeds | mean | standard error | 95% interval |',
    f'| {" | ".join("---" for _ in axes)} | --- | --- | --- | --- |',
  ]
  for labels, members in cells(found).items():
    named = dict(labels)
    words = [named.get(axis, '') for axis in axes]
    row = [*words, *_cells_of(summary(r.final for r in members))]
    lines.append(f'| {" | ".join(row)} |')
  return '\n'.join(lines)


def table_of_effects(found: Sequence[Result]) -> str:
  """A line for each pair of choices, in markdown."""
  lines = [
    '| axis | choice | against | seeds | difference | standard error |'
    ' 95% interval | exceeds it |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
  ]
  for effect in effects(found):
    row = [
      effect.axis, effect.choice, effect.against,
      *_cells_of(effect.difference), 'yes' if effect.exceeds else 'no',
    ]  # fmt: skip
    lines.append(f'| {" | ".join(row)} |')
  return '\n'.join(lines)


def _cells_of(x: Summary) -> list[str]:
  interval = '' if math.isnan(x.low) else f'{x.low:.3f} to {x.high:.3f}'
  error = '' if math.isnan(x.error) else f'{x.error:.3f}'
  return [str(x.number), f'{x.mean:.3f}', error, interval]
