"""Values and gradients of the functions of other libraries.

  python experiments/peers/values.py tests/reference/values

For an environment of its own with trl 1.16.0 and verl 0.9.1: their functions
are called, on inputs that this program draws, and methods of their trainers on
stand-ins for the trainer; what had to be retyped says so where it stands. One
file per family: `arrays`, and `cases` which name them. The tests and
`python experiments/golden/check.py tests/reference/values` hold the library
against them.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))

import numpy as np
import torch

from experiments.peers import (
  advantages,
  correction,
  distillation,
  divergences,
  preference,
  trl_policy,
  verl_policy,
)
from experiments.peers.common import Arrays

FAMILIES = {
  'advantages': advantages.advantages,
  'corrections': correction.corrections,
  'policy_trl': trl_policy.policy,
  'policy_verl': verl_policy.policy,
  'divergences': divergences.divergences,
  'preferences': preference.preferences,
  'distillation': distillation.distillation,
}


def plain(x: object) -> object:
  """Lists of integers, or of floats with ten significant digits."""
  array = np.asarray(x)
  if array.dtype.kind in 'bi':
    return array.astype(int).tolist()
  flat = [float(f'{v:.11g}') for v in array.ravel()]
  return np.reshape(flat, array.shape).tolist()


def lines(cases: list[Arrays]) -> str:
  """JSON with a line per array and per case; equal inputs share an array."""
  names = {}
  for case in cases:
    inputs = {}
    for name, value in case['inputs'].items():
      key = (name, json.dumps(plain(value)))
      same = sum(other == name for other, _ in names)
      inputs[name] = names.setdefault(key, f'{name}_{same}')
    outputs = {k: plain(v) for k, v in case['outputs'].items()}
    case |= dict(inputs=inputs, outputs=outputs)
  versions = {
    k: importlib.metadata.version(k) for k in ('trl', 'verl', 'torch')
  }
  arrays = [f'"{key}": {text}' for (_, text), key in names.items()]
  rows = [json.dumps(case) for case in cases]
  return (
    f'{{"versions": {json.dumps(versions)},\n"arrays": {{\n'
    + ',\n'.join(arrays)
    + '\n},\n"cases": [\n'
    + ',\n'.join(rows)
    + '\n]}\n'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=pathlib.Path)
  folder = parser.parse_args().folder
  # Constants that a peer makes itself are then not rounded to float32.
  torch.set_default_dtype(torch.float64)
  folder.mkdir(parents=True, exist_ok=True)
  for family, fn in FAMILIES.items():
    cases = fn()
    (folder / f'{family}.json').write_text(lines(cases))
    print(f'{family}: {len(cases)} cases')


if __name__ == '__main__':
  main()
