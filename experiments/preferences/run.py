"""What methods of preferences reach where the true reward is known.

  python experiments/preferences/run.py --part=scores --workdir=runs/preferences
  python experiments/preferences/run.py --part=direct --workdir=runs/preferences
  python experiments/preferences/run.py --part=optimized \\
    --workdir=runs/preferences

Prints a table, and writes PART.json and, but for scores, a plot. A run that
stands in the workdir already is not run again.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np

from experiments.preferences import direct, optimized, scores
from postrain import workdir
from postrain.compilation import use_cache

PARTS = {'scores': scores, 'direct': direct, 'optimized': optimized}
RULE = '|' + ' --- |' * 4


def spread(values: Any) -> str:
  """Mean, least and most over seeds."""
  known = [v for v in values if v is not None]
  if len(known) < len(values):
    return f'{len(known)} of {len(values)} seeds get there'
  return f'{np.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})'


def table_of_scores(found: dict[str, Any]) -> str:
  lines = ['| | held-out pair accuracy | less that of gold | ECE |', RULE]
  oracle = found.pop('oracle')
  lines.append(f'| gold | {spread(oracle)} | | |')
  for loss, rows in found.items():
    accuracy = [row['accuracy'] for row in rows]
    gaps = np.subtract(accuracy, oracle).tolist()
    ece = spread([row['ece'] for row in rows])
    lines.append(f'| `{loss}` | {spread(accuracy)} | {spread(gaps)} | {ece} |')
  return '\n'.join(lines)


def table_of_direct(found: dict[str, Any]) -> str:
  lines = [
    f'| method | gold at a KL of {direct.AT} | best gold | last gold, KL |',
    RULE,
  ]
  for method, curves in found.items():
    at = spread([direct.gold_at(curve, direct.AT) for curve in curves])
    best = spread([max(gold for gold, _ in curve) for curve in curves])
    gold, divergence = np.array(curves)[:, -1].mean(0)
    last = f'{gold:.3f}, {divergence:.2f}'
    lines.append(f'| `{method}` | {at} | {best} | {last} |')
  return '\n'.join(lines)


def table_of_optimized(found: dict[str, Any]) -> str:
  lines = ['| PPO | best gold | last gold | last proxy less first |', RULE]
  for name, runs in found.items():
    gold, proxy, _ = np.moveaxis(np.array(runs), -1, 0)  # seed, iteration
    figures = gold.max(1), gold[:, -10:].mean(1), proxy[:, -1] - proxy[:, 0]
    cells = ' | '.join(spread(x.tolist()) for x in figures)
    lines.append(f'| {name} | {cells} |')
  held = np.array(found['held'])[:, optimized.SETTLED :, 2]
  means = spread(held.mean(1).tolist())
  near = np.abs(held / optimized.TARGET - 1) < 0.2
  lines += [
    '',
    f'KL of the held runs, a target of {optimized.TARGET}: {means};'
    f' within a fifth of it in {near.mean():.0%} of iterations',
  ]
  return '\n'.join(lines)


def draw_optimized(found: dict[str, Any], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((8.4, 3), layout='constrained')
  for number, name in enumerate(('hidden reward', 'proxy', 'KL, nats')):
    axes = figure.add_subplot(1, 3, number + 1)
    axes.set(title=name, xlabel='iteration')
    axes.grid(alpha=0.3)
    for color, (label, runs) in enumerate(found.items()):
      for i, run in enumerate(runs):
        line = np.array(run)[:, number]
        axes.plot(line, f'C{color}', lw=0.9, label=None if i else label)
    axes.legend(fontsize='x-small')
  figure.savefig(path, dpi=80)


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((5.6, 3.6), layout='constrained')
  axes = figure.subplots()
  axes.set(xlabel='√KL to the reference', ylabel='hidden reward')
  axes.grid(alpha=0.3)
  for number, (method, curves) in enumerate(found.items()):
    for i, curve in enumerate(curves):
      gold, divergence = np.array(curve).T
      axes.plot(
        np.sqrt(np.maximum(divergence, 0)), gold, f'C{number}', lw=0.9,
        label=None if i else method,
      )  # fmt: skip
  axes.legend(fontsize='x-small', ncols=2)
  figure.savefig(path, dpi=80)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--part', choices=PARTS, required=True)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--seeds', type=int, default=3)
  flags = parser.parse_args()
  use_cache()
  found = PARTS[flags.part].study(flags.workdir, range(flags.seeds))
  record = {'commit': workdir.commit(), 'seeds': flags.seeds, **found}
  path = flags.workdir / f'{flags.part}.json'
  path.write_text(json.dumps(record))
  if flags.part == 'direct':
    draw(found, flags.workdir / 'direct.png')
    print(table_of_direct(found))
  elif flags.part == 'optimized':
    draw_optimized(found, flags.workdir / 'optimized.png')
    print(table_of_optimized(found))
  else:
    print(table_of_scores(found))


if __name__ == '__main__':
  main()
