"""Hold the mathematics against reference values of other libraries.

  python experiments/golden/check.py FOLDER

FOLDER holds ``index.json`` and one npz per case: inputs ``in_*``, expected
outputs ``out_*``, hyperparameters ``hyper``. Everything runs in float64 at the
tolerance of the case; where the peer adds an epsilon that we do not, at the
tolerance the case states for that. The exit status is 1 if a case fails.
"""

import argparse
from collections.abc import Callable
import json
import os
import pathlib
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))

import jax
import jax.numpy as jnp
import numpy as np

from experiments.golden import (
  advantages,
  correction,
  distillation,
  evaluation,
  policy,
  preference,
)
from experiments.golden.common import Arrays

PARTS = (
  advantages,
  correction,
  distillation,
  evaluation,
  policy,
  preference,
)


def differences(case: Arrays, folder: pathlib.Path, fn: Callable) -> list[str]:
  """What does not agree; raises where nothing was compared."""
  with np.load(folder / case['file']) as file:
    stored = {k: file[k] for k in file.files}
  hyper = json.loads(str(stored.pop('hyper')))
  inputs = {k[3:]: jnp.asarray(v) for k, v in stored.items() if k[:3] == 'in_'}
  if 'mask' in inputs:
    inputs['mask'] = inputs['mask'].astype(bool)
  expected = {k[4:]: v for k, v in stored.items() if k[:4] == 'out_'}
  actual = fn(case, hyper, inputs)
  shared = sorted(set(actual) & set(expected))
  if not shared:
    raise ValueError(f'{case["name"]} gave none of {sorted(expected)}')
  tolerance = case['tolerance']
  tolerance = tolerance.get('f64_without_quirks', tolerance['f64'])
  found = []
  for key in shared:
    a, b = np.asarray(actual[key]), expected[key]
    compared = np.ones(b.shape, bool)
    if 'mask' in inputs and b.shape == inputs['mask'].shape:
      compared = np.asarray(inputs['mask'])
    if hyper.get('kind') == 'k3':  # the peer clamps the value, we do not
      if 'per_token' in expected:
        low = expected['per_token'] < 10
        compared = compared & low if b.shape == low.shape else compared
    elif hyper.get('kind') == 'k3+' and key == 'per_token':
      compared = compared & (b < 10)
    if not np.allclose(a[compared], b[compared], **tolerance):
      gap = np.max(np.abs(a[compared] - b[compared]))
      found.append(f'{key} differs by {gap:.2e}')
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=pathlib.Path)
  folder = parser.parse_args().folder
  jax.config.update('jax_enable_x64', True)
  counts = {'passed': 0, 'failed': 0, 'not built': 0}
  for case in json.loads((folder / 'index.json').read_text())['cases']:
    fns = [part.handler(case) for part in PARTS]
    fn, found = next((f for f in fns if f is not None), None), []
    verdict = 'not built'
    if fn is not None:
      found = differences(case, folder, fn)
      verdict = 'failed' if found else 'passed'
    counts[verdict] += 1
    print(f'{verdict:9} {case["name"]}', *found, sep='  ')
  print(', '.join(f'{n} {verdict}' for verdict, n in counts.items()))
  return int(counts['failed'] > 0)


if __name__ == '__main__':
  sys.exit(main())
