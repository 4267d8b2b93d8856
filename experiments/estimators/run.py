"""Hold what the estimators promise against enumeration and sampling.

  python experiments/estimators/run.py --workdir=runs/estimators

Float64 on the CPU, no data. Prints every figure beside the expected one, writes
results.json and five plots (extra `plots`); the exit status is 1 if one fails.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax

from experiments.estimators import difficulty, divergence, optimum, ratios
from experiments.estimators.common import report
from postrain import workdir


def panel(title: str, x: str, y: str, log: str = '') -> tuple:
  from matplotlib.figure import Figure

  figure = Figure((4.8, 3.2), layout='constrained')
  axes = figure.subplots()
  axes.set(title=title, xlabel=x, ylabel=y)
  if 'x' in log:
    axes.set_xscale('log')
  if 'y' in log:
    axes.set_yscale('log')
  axes.grid(alpha=0.3)
  return figure, axes


def draw_divergence(figures: dict, path: pathlib.Path) -> None:
  figure, axes = panel(
    'one token: variance of the estimate', 'KL(π‖ref)', 'variance', 'xy'
  )
  rows = figures['by_distance']
  for name in ('k1', 'k2', 'k3'):
    axes.plot(
      [row['divergence'] for row in rows],
      [row[name]['variance'] for row in rows],
      label=name,
    )
  axes.plot(
    [row['divergence'] for row in rows],
    [row['k2']['value'] ** 2 for row in rows],
    '--',
    label='k2: squared bias',
  )
  axes.legend(fontsize='small')
  figure.savefig(path / 'divergence.png', dpi=80)


def draw_optimum(figures: dict, path: pathlib.Path) -> None:
  figure, axes = panel(
    'distance to π_ref exp(R/β)', 'steps', 'total variation', 'y'
  )
  for place, curve in figures['curves'].items():
    right = tuple(place.split(', ')) in divergence.RIGHT_PLACES
    color, label = ('C0', 'exact places') if right else ('C3', 'others')
    axes.plot(figures['steps'], curve, color, lw=0.8, label=label)
  unlike = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
  axes.legend(unlike.values(), unlike, fontsize='small')
  figure.savefig(path / 'optimum.png', dpi=80)


def draw_difficulty(figures: dict, path: pathlib.Path) -> None:
  figure, axes = panel(
    'weight of a prompt under group_normalized', 'success rate p', 'w_G(p)'
  )
  for group, curve in figures['curves'].items():
    line = axes.plot(figures['rates'], curve, label=f'G {group}')[0]
    points = [row for row in figures['samples'] if row[0] == group and row[2]]
    _, p, _, mean, error = zip(*points, strict=True)
    axes.errorbar(
      p, mean, [2 * e for e in error], fmt='.', color=line.get_color()
    )
  axes.set_ylim(0, 8)
  axes.legend(fontsize='small')
  figure.savefig(path / 'difficulty.png', dpi=80)


def draw_ratios(figures: dict, path: pathlib.Path) -> None:
  figure, axes = panel(
    'token ratios against their product',
    'step from the old policy',
    'gap',
    'xy',
  )
  for length, found in figures['order'].items():
    for name, style in (('objective', '.-'), ('gradient', '.--')):
      label = f'{name}, T {length}'
      axes.plot(figures['steps'], found[name], style, label=label)
  axes.legend(fontsize='x-small')
  figure.savefig(path / 'order.png', dpi=80)

  figure, axes = panel(
    f'log-ratios of deviation {ratios.SIZE}', 'length T', 'variance', 'xy'
  )
  spread = figures['spread']
  for name, style, label in (
    ('theory', '-', 'exp(T s²) − 1'),
    ('product', 'o', 'product, drawn'),
    ('mean', 's', "GSPO's mean, drawn"),
    ('share', '^', 'effective share of products'),
  ):
    axes.plot(
      [*spread], [row[name] for row in spread.values()], style, label=label
    )
  axes.legend(fontsize='x-small')
  figure.savefig(path / 'spread.png', dpi=80)


def rounded(tree: object) -> object:
  """Six digits are enough to compare two runs."""
  if isinstance(tree, float):
    return float(f'{tree:.6g}')
  if isinstance(tree, dict):
    return {key: rounded(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [rounded(value) for value in tree]
  return tree


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  path = parser.parse_args().workdir
  path.mkdir(parents=True, exist_ok=True)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_x64', True)
  checks, figures = [], {}
  for part in (divergence, optimum, difficulty, ratios):
    found, figures[part.__name__.split('.')[-1]] = part.study()
    checks += found
  print(report(checks).strip())
  failed = sum(not check.passed for check in checks)
  print(f'\n{len(checks) - failed} of {len(checks)} figures as expected')
  results = {
    'commit': workdir.commit(),
    'versions': {p: importlib.metadata.version(p) for p in ('jax', 'numpy')},
    'checks': [check.row() for check in checks],
    'figures': figures,
  }
  (path / 'results.json').write_text(json.dumps(rounded(results)))
  draw_divergence(figures['divergence'], path)
  draw_optimum(figures['optimum'], path)
  draw_difficulty(figures['difficulty'], path)
  draw_ratios(figures['ratios'], path)
  sys.exit(int(failed > 0))


if __name__ == '__main__':
  main()
