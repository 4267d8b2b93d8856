"""Tables and plots of a sweep, from the files of its finished rows alone.

  python experiments/report.py runs/sweep --figure=reward/exact --last=10 \\
    [--split=task]

Prints mean, standard error and bootstrap interval of each cell over its seeds,
and what each choice adds to another, all else equal. Writes report.md,
report.json, curves.png and sensitivity.png into the workdir.
"""

import argparse
import os
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))

import numpy as np

from postrain import workdir
from postrain.sweeps import tables
from postrain.sweeps.tables import Result

Parts = dict[str, list[Result]]


def split(found: list[Result], axis: str | None) -> Parts:
  """Results by their choice of an axis; all of them where there is none.

  Raises:
    ValueError: no row has such an axis.
  """
  if axis is None:
    return {'': found}
  axes = tables.choices(found)
  if axis not in axes:
    raise ValueError(
      f'--split={axis}: the axes with several choices are:'
      f' {", ".join(axes) or "none"}'
    )
  return {
    label: [r for r in found if r.labels.get(axis) == label]
    for label in axes[axis]
  }


def smooth(values: np.ndarray, width: int) -> np.ndarray:
  """Means of so many values up to each, of fewer at the beginning."""
  sums = np.cumsum(np.concatenate([[0], values]))
  ends = np.arange(1, len(sums))
  starts = np.maximum(ends - width, 0)
  return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curves(parts: Parts, figure: str, last: int, path: str) -> None:
  """A panel a part, a line a cell: the mean over seeds, within its error."""
  from matplotlib.figure import Figure

  sheet = Figure((4.6 * len(parts), 3.8), layout='constrained')
  panels = sheet.subplots(1, len(parts), squeeze=False)[0]
  for panel, (part, found) in zip(panels, parts.items(), strict=True):
    axes = tables.choices(found)
    for number, (labels, members) in enumerate(tables.cells(found).items()):
      steps = sorted(set.intersection(*({*r.steps.tolist()} for r in members)))
      curves = np.array(
        [smooth(r.values, last)[np.isin(r.steps, steps)] for r in members]
      )
      mean = curves.mean(0)
      style = dict(color=f'C{number % 10}', ls='-' if number < 10 else '--')
      name = ' '.join(label for axis, label in labels if axis in axes)
      panel.plot(steps, mean, lw=1, label=name or 'all', **style)
      if len(members) > 1:
        error = curves.std(0, ddof=1) / len(members) ** 0.5
        panel.fill_between(
          steps, mean - error, mean + error, color=style['color'], alpha=0.12,
          lw=0,
        )  # fmt: skip
    panel.set(title=part, xlabel='step', ylabel=figure)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=5, loc='lower right')
  sheet.savefig(path, dpi=75)


def draw_sensitivity(parts: Parts, figure: str, path: str) -> None:
  """A row a part, a panel an axis: a line a cell, a thick one their mean."""
  from matplotlib.figure import Figure

  axes = {k: None for found in parts.values() for k in tables.choices(found)}
  if not axes:
    return
  size = (max(2.6 * len(axes), 3), 2.4 * len(parts))
  sheet = Figure(size, layout='constrained')
  panels = sheet.subplots(len(parts), len(axes), squeeze=False)
  for row, (part, found) in zip(panels, parts.items(), strict=True):
    for panel, axis in zip(row, axes, strict=True):
      labels = tables.choices(found).get(axis, [])
      lines: dict[Any, dict[str, float]] = {}
      for cell, members in tables.cells(found).items():
        others = tuple((k, v) for k, v in cell if k != axis)
        mean = float(np.mean([r.final for r in members]))
        lines.setdefault(others, {})[dict(cell).get(axis, '')] = mean
      for line in lines.values():
        panel.plot(
          range(len(labels)), [line.get(x, np.nan) for x in labels],
          color='0.7', lw=0.8, marker='.',
        )  # fmt: skip
      means = [
        np.nanmean([line.get(x, np.nan) for line in lines.values()])
        for x in labels
      ]
      panel.plot(range(len(labels)), means, color='C0', lw=2, marker='o')
      panel.set_xticks(range(len(labels)), labels, fontsize=6)
      panel.set_title(f'{part} {axis}'.strip(), fontsize='small')
      panel.grid(alpha=0.3)
    row[0].set_ylabel(figure, fontsize='small')
  sheet.savefig(path, dpi=75)


def text(parts: Parts, figure: str, last: int) -> str:
  """Both tables of each part, in markdown."""
  of = f'`{figure}`' + (f', mean of the last {last}' if last > 1 else ', last')
  sections = [
    f'## {part or "All rows"}: {of}\n\n{tables.table_of_cells(found)}\n\n'
    f'{tables.table_of_effects(found)}\n'
    for part, found in parts.items()
  ]
  return '\n'.join(sections)


def write(flags: argparse.Namespace) -> None:
  """Print the tables and write all files."""
  found = tables.results(flags.workdir, flags.figure, last=flags.last)
  parts = split(found, flags.split)
  total = len(tables.recorded(flags.workdir))
  report = text(parts, flags.figure, flags.last)
  print(f'{len(found)} of {total} rows have finished\n\n{report}')

  def path(name: str) -> str:
    return os.path.join(flags.workdir, name)

  with open(path('report.md'), 'w') as f:
    f.write(report)
  record = {
    'figure': flags.figure,
    'last': flags.last,
    'finals': [{**r.labels, 'final': r.final} for r in found],
  }
  workdir.write_json(path('report.json'), record)
  draw_curves(parts, flags.figure, flags.last, path('curves.png'))
  draw_sensitivity(parts, flags.figure, path('sensitivity.png'))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir')
  parser.add_argument('--figure', default='reward', help='of metrics.jsonl')
  parser.add_argument(
    '--last', type=int, default=1, help='values that make the final one'
  )
  parser.add_argument('--split', help='an axis whose choices stand apart')
  try:
    write(parser.parse_args())
  except ValueError as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
  main()
