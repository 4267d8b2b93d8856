"""Marks of an examination: accuracies with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
import numpy as np

from postrain.evaluation import (
  bootstrap_interval,
  majority,
  pass_at_k,
  wilson_interval,
)


def marks(
  rows: Sequence[Mapping[str, Any]],
  *,
  ks: Sequence[int] = (),
  votes: bool = True,
  seed: int = 0,
) -> dict[str, Any]:
  """Accuracies of the answers, each with a 95% interval over problems.

  Wilson's where each problem counts 0 or 1 (greedy, maj@n, pass@n, and where
  nothing is ever right), else the percentile bootstrap. The samples of a
  problem are not independent, so they are never counted as trials.

  Args:
    rows: of `postrain.exam.examine`, one per problem.
    ks: draws of pass@k, each at most the number of samples.
    votes: whether answers can be counted, for maj@n.
    seed: of the bootstrap.

  Returns:
    ``accuracies`` (name -> value, low, high, interval), number of problems and
    of samples, the share of truncated completions, greedy or sampled.
  """
  n = len(rows[0]['samples'])
  values = {'greedy': np.array([row['greedy']['correct'] for row in rows])}
  if n:
    correct = np.array([[s['correct'] for s in r['samples']] for r in rows])
    values[f'mean@{n}'] = correct.mean(-1)
    values |= {f'pass@{k}': pass_at_k(correct.sum(-1), n, k) for k in ks}
    if votes:
      voted = [_voted(row) == row['reference'] for row in rows]
      values[f'maj@{n}'] = np.array(voted)
  every = [answer for r in rows for answer in (r['greedy'], *r['samples'])]
  return {
    'num_problems': len(rows),
    'num_samples': n,
    'accuracies': {k: _interval(v * 1.0, seed) for k, v in values.items()},
    'truncated': float(np.mean([each['finish'] == 'length' for each in every])),
  }


def _interval(values: Float[np.ndarray, ' P'], seed: int) -> dict[str, Any]:
  mean = float(values.mean())
  # The bootstrap of values without spread would be a point.
  if np.isin(values, (0, 1)).all():
    low, high = wilson_interval(int(values.sum()), len(values))
    return {'value': mean, 'low': low, 'high': high, 'interval': 'Wilson'}
  _, low, high = bootstrap_interval(values, seed=seed)
  return {'value': mean, 'low': low, 'high': high, 'interval': 'bootstrap'}


def _voted(row: Mapping[str, Any]) -> Any:
  return majority([each['answer'] for each in row['samples']])


def table(results: Mapping[str, Any]) -> str:
  """The marks as a table in markdown."""
  lines = ['| figure | value | 95% interval |', '| --- | --- | --- |']
  lines += [
    f'| {name} | {a["value"]:.4f} | [{a["low"]:.4f}, {a["high"]:.4f}]'
    f' ({a["interval"]}) |'
    for name, a in results['accuracies'].items()
  ]
  lines.append(f'| truncated | {results["truncated"]:.4f} | |')
  lines.append(f'| problems | {results["num_problems"]} | |')
  return '\n'.join(lines)
