"""Process and outcome reward models on chains whose chances are known.

  python experiments/process_rewards/run.py --workdir=runs/process_rewards

Prints both tables of the README, and writes results.json and process.png (extra
`plots`).
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from experiments.process_rewards import study
from postrain import workdir
from postrain.compilation import use_cache

FIGURES = {
  'auc_first': 'AUC, first error',
  'auc_sound': 'AUC, no error so far',
  'accuracy': 'accuracy',
  'ece': 'ECE of its label',
  'ece_answer': 'ECE of the answer',
  'rmse': 'RMSE to P(answer)',
}
SHOWN = {  # in the plot
  'outcome': 'end', 'soft': 'last', 'hard': 'product',
  'verifier, then 0': 'product',
}  # fmt: skip


def spread(values: Any) -> str:
  """Mean, least and most over seeds."""
  return f'{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})'


def table_of_steps(found: list[dict[str, Any]]) -> str:
  lines = [
    f'| trained on | {" | ".join(FIGURES.values())} |',
    '|' + ' --- |' * (1 + len(FIGURES)),
  ]
  for kind in study.LABELS:
    cells = (spread([row[kind][name] for row in found]) for name in FIGURES)
    lines.append(f'| {kind} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def table_of_choices(found: list[dict[str, Any]]) -> str:
  """Right answers of the best of the most candidates, and steps in them."""
  lines = [
    '| chosen by | one score | right answers | steps written |',
    '|' + ' --- |' * 4,
  ]
  kinds = {kind: found[0][kind]['best'] for kind in study.LABELS}
  for name in ('majority', 'perfect'):
    right = spread([row['baselines'][name][-1] for row in found])
    lines.append(f'| {name} | | {right} | |')
  one = np.array([row['outcome']['best']['end'][0] for row in found]).T
  cells = ' | '.join(spread(x.tolist()) for x in one)
  lines.append(f'| the first | | {cells} |')
  for kind, aggregates in kinds.items():
    for name in aggregates:
      last = np.array([row[kind]['best'][name][-1] for row in found]).T
      cells = ' | '.join(spread(x.tolist()) for x in last)
      lines.append(f'| {kind} | {name} | {cells} |')
  return '\n'.join(lines)


def draw(found: list[dict[str, Any]], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((8.4, 3.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  left.set(xlabel='stated chance', ylabel='right answers', title='calibration')
  left.plot([0, 1], [0, 1], 'k:', lw=0.8)
  right.set(
    xlabel='candidates', ylabel='right answers', title='best of n', xscale='log'
  )
  right.set_xticks(study.SIZES, study.SIZES, minor=False)
  right.minorticks_off()
  for number, (kind, name) in enumerate(SHOWN.items()):
    for i, row in enumerate(found):
      chances, outcomes, _ = np.array(row[kind]['reliability']).T
      label = None if i else kind
      left.plot(chances, outcomes, f'C{number}.-', lw=0.8, ms=3, label=label)
    shares = np.mean([row[kind]['best'][name] for row in found], axis=0)[:, 0]
    label = f'{kind}, {name}'
    right.plot(study.SIZES, shares, f'C{number}.-', lw=0.9, label=label)
  for name, style in (('sum', 'C1--'), ('min', 'C1:')):
    shares = np.mean([row['soft']['best'][name] for row in found], axis=0)
    right.plot(study.SIZES, shares[:, 0], style, lw=0.9, label=f'soft, {name}')
  for name, style in (('majority', 'k--'), ('perfect', 'k:')):
    shares = np.mean([row['baselines'][name] for row in found], axis=0)
    right.plot(study.SIZES, shares, style, lw=0.9, label=name)
  for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend(fontsize='x-small')
  figure.savefig(path, dpi=80)


def rounded(tree: Any) -> Any:
  """Five digits are enough to compare two runs."""
  if isinstance(tree, float):
    return float(f'{tree:.5g}')
  if isinstance(tree, dict):
    return {key: rounded(value) for key, value in tree.items()}
  return [rounded(x) for x in tree] if isinstance(tree, list) else tree


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--seeds', type=int, default=3)
  flags = parser.parse_args()
  flags.workdir.mkdir(parents=True, exist_ok=True)
  use_cache()
  found = [study.study(seed) for seed in range(flags.seeds)]
  print(table_of_steps(found), table_of_choices(found), sep='\n\n')
  record = {'commit': workdir.commit(), 'seeds': rounded(found)}
  (flags.workdir / 'results.json').write_text(json.dumps(record))
  draw(found, flags.workdir / 'process.png')


if __name__ == '__main__':
  main()
