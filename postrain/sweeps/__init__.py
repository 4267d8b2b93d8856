"""Sweeps: rows of overrides, each a run in a directory named by its config.

A sweep is a Python file with ``get_config()``, the base, and ``get_sweep()``,
which yields rows; see docs/ablations.md.
"""

from postrain.sweeps.planning import Planned, claim, plan, recorded
from postrain.sweeps.rows import (
  Range,
  Row,
  crossed,
  grid,
  named,
  random,
  seeds,
  zipped,
)
from postrain.sweeps.searching import Search

__all__ = [
  'Planned',
  'Range',
  'Row',
  'Search',
  'claim',
  'crossed',
  'grid',
  'named',
  'plan',
  'random',
  'recorded',
  'seeds',
  'zipped',
]
