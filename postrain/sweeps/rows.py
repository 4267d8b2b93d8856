"""Rows of a sweep: named overrides of a base config, and how to make many."""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

Overrides = Mapping[str, Any]


class Row(NamedTuple):
  """One run of a sweep.

  Attributes:
    labels: axis -> what people call its choice; rows that differ in ``seed``
      alone are one cell of a table.
    overrides: path in the config (``'loss.clip_high'``) -> value, applied in
      order; a dict takes the place of a whole block.
  """

  labels: Mapping[str, str]
  overrides: Overrides

  @property
  def name(self) -> str:
    """The labels in one line."""
    return ' '.join(f'{k}={v}' for k, v in self.labels.items()) or 'base'


class Range(NamedTuple):
  """Numbers to draw from: between ``low`` and ``high``.

  Attributes:
    low: the least.
    high: the greatest; of integers it is drawn too.
    log: whether logarithms are uniform, not numbers.
    integer: whether numbers are whole.
  """

  low: float
  high: float
  log: bool = False
  integer: bool = False


Axes = Mapping[str, Any]  # path -> a list of values


def grid(axes: Axes) -> list[Row]:
  """Every combination of the values of each path; the last runs fastest."""
  _check_axes(axes)
  return [_row(axes, values) for values in itertools.product(*axes.values())]


def zipped(axes: Axes) -> list[Row]:
  """The first value of each path together, then the second, and so on.

  Raises:
    ValueError: paths with unlike numbers of values.
  """
  _check_axes(axes)
  lengths = {path: len(values) for path, values in axes.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f'zipped: {lengths} values: give each path as many')
  columns = zip(*axes.values(), strict=True)
  return [_row(axes, values) for values in columns]


def random(axes: Axes, *, number: int, seed: int) -> list[Row]:
  """Draw rows; the first rows of a larger number are those of a smaller.

  Args:
    axes: path -> values to choose from, or a `Range`.
    number: of rows.
    seed: of the draws.

  Raises:
    ValueError: a number below 1, or a range that is none.
  """
  if number < 1:
    raise ValueError(f'random: number={number}: it must be at least 1')
  _check_axes({k: v for k, v in axes.items() if not isinstance(v, Range)})
  draws = np.random.default_rng(seed)
  return [
    _row(axes, [_drawn(path, axis, draws) for path, axis in axes.items()])
    for _ in range(number)
  ]


def seeds(number: int, *, first: int = 0) -> list[Row]:
  """The seeds ``first`` to ``first + number - 1``.

  Raises:
    ValueError: a number below 1.
  """
  if number < 1:
    raise ValueError(f'seeds: number={number}: it must be at least 1')
  return grid({'seed': range(first, first + number)})


def named(axis: str, choices: Mapping[str, Overrides]) -> list[Row]:
  """Choices that change several fields or blocks, by their names.

  ``named('clip', {'tight': {'loss.clip_low': 0.02, 'loss.clip_high': 0.02}})``
  """
  return [Row({axis: label}, values) for label, values in choices.items()]


def crossed(*parts: Iterable[Row]) -> list[Row]:
  """Each row of a part with each of the others; the last runs fastest.

  Raises:
    ValueError: two parts set the same path or axis.
  """
  made = []
  for rows in itertools.product(*parts):
    for field in ('labels', 'overrides'):
      keys = [key for row in rows for key in getattr(row, field)]
      twice = sorted({key for key in keys if keys.count(key) > 1})
      if twice:
        raise ValueError(
          f'crossed: {twice[0]!r} stands in two parts: set it in one'
        )
    labels = {k: v for row in rows for k, v in row.labels.items()}
    made.append(
      Row(labels, {k: v for row in rows for k, v in row.overrides.items()})
    )
  return made


def as_row(given: Any, where: str) -> Row:
  """A row, or a dict of overrides with labels made from its values.

  Raises:
    ValueError: it is neither.
  """
  if isinstance(given, Row):
    _check_paths(given.labels, where)
    _check_paths(given.overrides, where)
    if not all(isinstance(each, str) for each in given.labels.values()):
      raise ValueError(f'{where}: labels={given.labels!r}: they must be texts')
    return given
  if not isinstance(given, Mapping):
    raise ValueError(
      f"{where} is {given!r:.80}: give a dict of overrides, {{'seed': 1}}, or"
      ' what sweeps.grid, named, crossed ... make'
    )
  _check_paths(given, where)
  return _row(given, [*given.values()])


def _check_paths(paths: Any, where: str) -> None:
  if not isinstance(paths, Mapping) or not all(
    isinstance(path, str) for path in paths
  ):
    raise ValueError(
      f'{where}: {paths!r:.80} is no dict whose keys are texts such as'
      " 'loss.clip_high'"
    )


def _check_axes(axes: Axes) -> None:
  for path, values in axes.items():
    if isinstance(values, Range):
      raise ValueError(f'{path!r}: {values} is for sweeps.random: list values')
    if isinstance(values, str) or not isinstance(values, Sequence):
      raise ValueError(
        f'{path!r}: {values!r} is no list of values: write [{values!r}]'
      )
    if not values:
      raise ValueError(f'{path!r}: an empty list of values: give it one')


def _row(paths: Iterable[str], values: Sequence[Any]) -> Row:
  overrides = dict(zip(paths, values, strict=True))
  return Row({k: label(v) for k, v in overrides.items()}, overrides)


def label(value: Any) -> str:
  """What people call a value: a block that is a name alone by its name."""
  if isinstance(value, Mapping) and set(value) == {'name'}:
    return str(value['name'])
  return f'{value:.6g}' if isinstance(value, float) else str(value)


def _drawn(path: str, axis: Any, draws: np.random.Generator) -> Any:
  if not isinstance(axis, Range):
    return axis[int(draws.integers(len(axis)))]
  low, high, log, integer = axis
  if not low <= high or (log and low <= 0):
    raise ValueError(
      f'{path!r}: {axis}: low must not exceed high, and be positive where'
      ' log=True'
    )
  if log:
    number = math.exp(draws.uniform(math.log(low), math.log(high)))
  else:
    number = draws.uniform(low, high + 1 if integer else high)
  number = min(max(number, low), high)
  return math.floor(number) if integer else float(number)
