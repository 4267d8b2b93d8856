"""Direct methods: hidden reward against distance from the reference."""

import pathlib
from typing import Any

import numpy as np

from configs import presets
from experiments.preferences.common import (
  RULE,
  make_measure,
  policies,
  run_config,
  spread,
)

METHODS = ('dpo', 'ipo', 'kto', 'orpo', 'simpo', 'cpo', 'hinge', 'robust')
NUM_STEPS, EVERY = 200, 20
AT = 0.7  # nats of KL at which methods are compared


def config_of(method: str, seed: int) -> Any:
  config = run_config(seed)
  config.preference.num_steps = NUM_STEPS
  config.preference.batch_size = 64
  config.preference.num_examples = 4096
  config.preference.data = 'unpaired' if method == 'kto' else 'pairs'
  chosen = presets.preset(f'{method}/paper')
  config.preference.loss = chosen['loss']
  if (imitated := chosen['sft']) is not None:
    config.preference.sft_coef = imitated['coef']
  config.checkpoint.update(every=EVERY, keep=NUM_STEPS, export=False)
  return config


def study(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  measure, found = make_measure(run_config(0)), {}
  for method in METHODS:
    curves = []
    for seed in seeds:
      trained = policies(config_of(method, seed), path / f'{method}-{seed}')
      curves.append([measure(p, trained[0]) for p in trained.values()])
      gold, divergence = np.array(curves[-1]).T
      print(
        method, seed, f'gold {gold[-1]:.3f} KL {divergence[-1]:.2f}', flush=True
      )
    found[method] = np.array(curves).tolist()
  return found


def gold_at(curve: Any, divergence: float) -> float | None:
  """Gold where a curve first has this KL; None where it never has."""
  gold, kl = np.array(curve).T
  over = np.flatnonzero(kl >= divergence)
  if not len(over):
    return None
  i = over[0]
  if i == 0:
    return float(gold[0])
  share = (divergence - kl[i - 1]) / (kl[i] - kl[i - 1])
  return float(gold[i - 1] + share * (gold[i] - gold[i - 1]))


def table(found: dict[str, Any]) -> str:
  lines = [
    f'| method | gold at a KL of {AT} | best gold | last gold, KL |',
    RULE,
  ]
  for method, curves in found.items():
    at = spread([gold_at(curve, AT) for curve in curves])
    best = spread([max(gold for gold, _ in curve) for curve in curves])
    gold, divergence = np.array(curves)[:, -1].mean(0)
    last = f'{gold:.3f}, {divergence:.2f}'
    lines.append(f'| `{method}` | {at} | {best} | {last} |')
  return '\n'.join(lines)


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
