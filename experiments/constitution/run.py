"""A constitution taught by feedback that no person gave, and what spoils it.

  python experiments/constitution/run.py --part=pipeline \\
    --workdir=runs/constitution

The first runs the stages of configs/constitution.py with each seed (started
again, it continues), --part=unhelped trains once more without a term for help,
--part=ppo with a critic in place of groups, and --part=noise judges with noise
and with a taste for a position. Each prints a table, and writes PART.json and
PART.png.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from configs import constitution
from experiments.constitution import noise
from postrain import feedback, pipeline, workdir
from postrain.compilation import use_cache

PRINCIPLES = feedback.constitution(constitution.PRINCIPLES)
FIGURES = ('any', *(p.name for p in PRINCIPLES), 'help', 'length')


def stages(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  """Figures of each model and seed."""
  reports = [_report(path, seed) for seed in seeds]
  names = ('base', 'supervised', 'online')
  return {'models': {name: [r[name] for r in reports] for name in names}}


def unhelped(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  """The last model where nothing pays for help; all before it is shared."""
  reports = [_report(path, seed, helpfulness=0.0) for seed in seeds]
  return {'models': {'online, no help': [r['online'] for r in reports]}}


def critics(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  """The last model by PPO with a critic; all before it is shared."""
  reports = [_report(path, seed, algorithm='ppo') for seed in seeds]
  return {'models': {'online, PPO': [r['online'] for r in reports]}}


def _report(path: pathlib.Path, seed: int, **choices: Any) -> dict[str, Any]:
  """What the last stage of a pipeline says: model -> figure -> value."""
  planned = pipeline.run(
    [
      pipeline.Stage(*stage)
      for stage in constitution.get_pipeline(seed, **choices).items()
    ],
    str(path / f'seed-{seed}'),
  )
  text = pathlib.Path(planned[-1].directory, 'report.json').read_text()
  return json.loads(text)


def spread(values: Any) -> str:
  """Mean, least and most over seeds."""
  return f'{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})'


def table_of_stages(found: dict[str, Any]) -> str:
  """A row for each model, a column for each figure."""
  lines = [
    '| | ' + ' | '.join(FIGURES) + ' |',
    '|' + ' --- |' * (1 + len(FIGURES)),
  ]
  for name, runs in found['models'].items():
    cells = [spread([run[figure] for run in runs]) for figure in FIGURES]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def draw_stages(found: dict[str, Any], axes: Any) -> None:
  for number, figure in enumerate(FIGURES[:-1]):
    style = 'k.' if figure == 'help' else f'C{number}.'
    values = [[r[figure] for r in runs] for runs in found['models'].values()]
    for i, run in enumerate(zip(*values, strict=True)):
      label = None if i else figure
      axes.plot([*found['models']], run, f'{style}-', lw=0.9, label=label)
  axes.set(ylabel='share of answers')


def table_of_noise(found: dict[str, Any]) -> str:
  """Each setting: accuracy of the labels, what violates after training."""
  lines = [
    '| pairs | asked in | position | noise | labels right | violating |',
    '|' + ' --- |' * 6,
  ]
  for row in found['rows']:
    orders = {'single': 'one order', 'both': 'both orders'}[row['orders']]
    lines.append(
      f'| {row["pairs"]} | {orders} | {row["bias"]} | {row["noise"]} |'
      f' {spread(row["accuracy"])} | {spread(row["violating"])} |'
    )
  base = [x for row in found['rows'] for x in row['base']]
  return '\n'.join([*lines, '', f'before training: {np.mean(base):.3f}'])


def draw_noise(found: dict[str, Any], axes: Any) -> None:
  curves: dict[str, list] = {}
  for row in found['rows']:
    if not row['noise']:
      name = f'{row["pairs"]}, {row["orders"]} order'
      curves.setdefault(name, []).append((row['bias'], row['violating']))
  for name, points in curves.items():
    biases, values = zip(*dict(points).items(), strict=True)
    axes.plot(biases, np.mean(values, axis=1), marker='.', label=name)
  axes.set(xlabel='position bias, logits', ylabel='answers that violate')


def noises(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  del path
  return {'rows': noise.study(PRINCIPLES, seeds)}


PARTS = {
  'pipeline': (stages, table_of_stages, draw_stages),
  'unhelped': (unhelped, table_of_stages, draw_stages),
  'ppo': (critics, table_of_stages, draw_stages),
  'noise': (noises, table_of_noise, draw_noise),
}


def main() -> None:
  from matplotlib.figure import Figure

  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--part', choices=PARTS, required=True)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--seeds', type=int, default=3)
  flags = parser.parse_args()
  use_cache()
  study, table, draw = PARTS[flags.part]
  flags.workdir.mkdir(parents=True, exist_ok=True)
  found = study(flags.workdir, range(flags.seeds))
  record = {'commit': workdir.commit(), 'seeds': flags.seeds, **found}
  workdir.write_json(str(flags.workdir / f'{flags.part}.json'), record)
  figure = Figure((5.6, 3.4), layout='constrained')
  axes = figure.subplots()
  draw(found, axes)
  axes.grid(alpha=0.3)
  axes.legend(fontsize='x-small')
  figure.savefig(flags.workdir / f'{flags.part}.png', dpi=80)
  print(table(found))


if __name__ == '__main__':
  main()
