"""Log-probs of the reference for all preferences, scored once.

A run that has them keeps no second model. They lie in a file of its directory;
the state holds the digest of the reference, the data and the table, so that a
run that goes on knows its own.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from postrain import hosts, sharding
from postrain.assembly import Assembly
from postrain.environments import Environment, Units, rows_of
from postrain.preferring import comparisons
from postrain.programs import Programs
from postrain.recipe import Recipe
from postrain.types import Params, TrainState
from postrain.workdir import replacing


def make_table(parts: Assembly, path: str) -> 'ReferenceTable | None':
  """The table of a run whose config asks for one, in the file of this path."""
  choices = parts.recipe.preference
  if not choices.num_steps or choices.ref_logprobs != 'cached':
    return None
  return ReferenceTable(parts.recipe, parts.environment, parts.programs, path)


class ReferenceTable:
  """Makes the table at the start of the stage, or reads it again.

  Args:
    recipe: of the run.
    environment: whose preferences are scored.
    programs: of the run.
    path: of the file.
  """

  def __init__(
    self, recipe: Recipe, environment: Environment, programs: Programs,
    path: str,
  ):  # fmt: skip
    self._recipe, self._programs, self._path = recipe, programs, path
    # There is one, says `check_preference`.
    self._known: Any = comparisons(recipe, environment)
    self._tables: list[np.ndarray] = []

  def ready(self, state: TrainState, *, begins: bool) -> TrainState:
    """Have the table at hand; the state of a stage that begins learns of it.

    Raises:
      ValueError: the file is not there, or that of another run.
    """
    if self._tables:
      return state
    given = self._given()
    if begins:
      reference = state.params['actor']
      self._tables = [self._scored(reference, units) for units in given]
      of_reference = _digest(reference)
      if hosts.first():
        self._write(of_reference)
    else:
      with hosts.agreed():
        of_reference = self._read()
    digest = _digest([of_reference, [x[:3] for x in given], self._tables])
    if begins:
      placed = jax.device_put(digest, state.ref_digest.sharding)
      state = dataclasses.replace(state, ref_digest=placed)
    elif (digest != np.asarray(state.ref_digest)).any():
      raise ValueError(
        f'{self._path} is not the table of this run and its data: put its own'
        ' back, or begin anew in another directory'
      )
    if self._programs.judging is not None:
      self._programs.judging.ref_logprobs = self._tables[1]
    return state

  def units(self, step: int) -> Units:
    """The units of a step, with ``ref_logprobs``."""
    choices, known = self._recipe.preference, self._known
    which = (step, choices.batch_size, choices.num_examples)
    units, table = known.units(*which), self._tables[0]
    whole = Units(table, table, table, {})
    rows = rows_of(whole, known.numbers(*which), known.unit_size).tokens
    rows = rows[:, : units.tokens.shape[1]]
    return units._replace(arrays={**units.arrays, 'ref_logprobs': rows})

  def _given(self) -> list[Units]:
    """What is learnt from, then what is held out."""
    judging = self._programs.judging
    learnt = self._known.all_units(self._recipe.preference.num_examples)
    return [learnt] if judging is None else [learnt, judging.pairs]

  def _scored(self, reference: Params, units: Units) -> np.ndarray:
    """Log-probs of all rows, as many at once as a micro-batch has."""
    choices = self._recipe.preference
    size = choices.batch_size // choices.num_micro_batches
    size, parts = size * self._known.unit_size, []
    for start in range(0, len(units.tokens), size):
      rows = np.arange(start, start + size) % len(units.tokens)
      arrays = [np.asarray(x)[rows] for x in units[:3]]
      placed = sharding.put_rows(self._programs.states.mesh, arrays)
      parts.append(self._programs.refer(reference, *placed))
    return np.concatenate(sharding.on_host(parts))[: len(units.tokens)]

  def _write(self, of_reference: np.ndarray) -> None:
    with replacing(self._path) as f:
      np.savez(f, of_reference, *self._tables)

  def _read(self) -> np.ndarray:
    try:
      with np.load(self._path) as found:
        of_reference, *self._tables = (found[name] for name in found.files)
    except (OSError, ValueError) as error:
      raise ValueError(
        f'{self._path} cannot be read ({error}): put it back, or begin anew in'
        ' another directory'
      ) from error
    return of_reference


def _digest(tree: Any) -> np.ndarray:
  """SHA-256 of all leaves, which are brought to the host one at a time."""
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    leaf = np.ascontiguousarray(sharding.on_host(leaf))
    found.update(leaf.tobytes())
  return np.frombuffer(found.digest(), np.uint32)
