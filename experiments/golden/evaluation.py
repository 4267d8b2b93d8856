"""Figures of an evaluation."""

from collections.abc import Callable

import numpy as np

from experiments.golden.common import Arrays
from postrain import evaluation


def chances(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  rows = zip(*(x[name].tolist() for name in 'cnk'), strict=True)
  found = [evaluation.pass_at_k(*row) for row in rows]
  return {'pass_at_k': np.array(found)}


def handler(case: Arrays) -> Callable | None:
  return chances if case['name'] == 'pass_at_k' else None
