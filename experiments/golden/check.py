"""Hold the mathematics against reference values of other libraries.

  python experiments/golden/check.py FOLDER

FOLDER holds either the files of `experiments/peers/values.py` (one JSON per
family) or ``index.json`` and one npz per case: inputs ``in_*``, expected
outputs ``out_*``, hyperparameters ``hyper``. Everything runs in float64 at the
tolerance of the case; where the peer adds an epsilon that we do not, at the
tolerance the case states for that. The exit status is 1 if a case fails.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
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


def families(folder: pathlib.Path) -> Iterator[tuple[Arrays, Arrays, Arrays]]:
  """Case, inputs and expected outputs of each case of the JSON files."""
  for path in sorted(folder.glob('*.json')):
    family = json.loads(path.read_text())
    arrays = {k: np.array(v) for k, v in family['arrays'].items()}
    for case in family['cases']:
      inputs = {k: arrays[name] for k, name in case['inputs'].items()}
      expected = {k: np.array(v) for k, v in case['outputs'].items()}
      yield case, inputs, expected


def archives(folder: pathlib.Path) -> Iterator[tuple[Arrays, Arrays, Arrays]]:
  """The same of the npz files."""
  for case in json.loads((folder / 'index.json').read_text())['cases']:
    with np.load(folder / case['file']) as file:
      stored = {k: file[k] for k in file.files}
    case = case | {'hyperparameters': json.loads(str(stored.pop('hyper')))}
    inputs = {k[3:]: v for k, v in stored.items() if k[:3] == 'in_'}
    yield case, inputs, {k[4:]: v for k, v in stored.items() if k[:4] == 'out_'}


def read(folder: pathlib.Path) -> list[tuple[Arrays, Arrays, Arrays]]:
  indexed = (folder / 'index.json').exists()
  found = list((archives if indexed else families)(folder))
  if not found:
    raise ValueError(f'{folder} has no cases: experiments/peers/values.py')
  return found


def handler_of(case: Arrays) -> Callable | None:
  fns = (part.handler(case) for part in PARTS)
  return next((fn for fn in fns if fn is not None), None)


def output(case: Arrays, inputs: Arrays, names: Iterable[str]) -> Arrays:
  """Those of the named outputs that our functions give."""
  fn = handler_of(case)
  found = {} if fn is None else fn(case, case['hyperparameters'], inputs)
  shared = {name: found[name] for name in names if name in found}
  if fn is not None and not shared:
    raise ValueError(f'{case["name"]} gave none of {sorted(names)}')
  return shared


def outputs(cases: Sequence[tuple[Arrays, Arrays, Arrays]]) -> list[Arrays]:
  """Of all cases at once: one program compiles sooner than its parts."""
  given = []
  for _, inputs, _ in cases:
    given.append({k: jnp.asarray(v) for k, v in inputs.items()})
    if 'mask' in inputs:
      given[-1]['mask'] = given[-1]['mask'].astype(bool)
  pairs = list(zip(cases, given, strict=True))
  options = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  }

  @functools.partial(jax.jit, compiler_options=options)
  def program():
    return [output(case, x, expected) for (case, _, expected), x in pairs]

  return program()


def differences(
  case: Arrays, inputs: Arrays, expected: Arrays, actual: Arrays
) -> list[str]:
  hyper, found = case['hyperparameters'], []
  tolerance = case['tolerance']
  tolerance = tolerance.get('f64_without_quirks', tolerance['f64'])
  for key in actual:
    a, b = np.asarray(actual[key]), expected[key]
    compared = np.ones(b.shape, bool)
    if 'mask' in inputs and b.shape == inputs['mask'].shape:
      compared = inputs['mask'].astype(bool)
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
  cases = read(folder)
  for item, actual in zip(cases, outputs(cases), strict=True):
    found = differences(*item, actual)
    verdict = 'failed' if found else 'passed' if actual else 'not built'
    counts[verdict] += 1
    print(f'{verdict:9} {item[0]["name"]}', *found, sep='  ')
  print(', '.join(f'{n} {verdict}' for verdict, n in counts.items()))
  return int(counts['failed'] > 0)


if __name__ == '__main__':
  sys.exit(main())
