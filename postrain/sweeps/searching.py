"""Rows drawn one after another, each knowing how the earlier ones did."""

from collections.abc import Callable, Mapping
import importlib
import json
import os
from typing import Any, NamedTuple

import numpy as np

from postrain.sweeps.planning import Planned, plan
from postrain.sweeps.rows import Range, Row, label
from postrain.sweeps.tables import result

STUDY = 'study.log'  # in the workdir: every draw and what came of it


class Search(NamedTuple):
  """What is searched, and what for.

  Attributes:
    axes: path in the config -> `Range`, or a list of values.
    figure: a key of metrics.jsonl.
    number: of rows.
    seed: of the draws.
    last: how many of the figure's last values are averaged.
    maximize: whether more is better.
  """

  axes: Mapping[str, Any]
  figure: str
  number: int
  seed: int = 0
  last: int = 1
  maximize: bool = True


class Trial(NamedTuple):
  """A row of a search, and the figure it reached; None where it failed."""

  planned: Planned
  value: float | None


def search(
  base: Any,
  choices: Search,
  root: str,
  run: Callable[[list[Planned]], list[Planned]],
) -> list[Trial]:
  """Draw rows by Optuna's tree-structured Parzen estimator, and run each.

  The study stands in the workdir, and draw number n has a seed of its own, so
  that the same call again goes on and draws what it would have drawn.

  Args:
    base: the config that rows change.
    choices: of the search.
    root: the workdir.
    run: takes all rows so far, runs the last, returns it if it failed.

  Raises:
    ValueError: Optuna is not installed, a choice that cannot be, another
      search in the workdir, and what `planning.plan` raises.
  """
  optuna = _optuna()
  _check(choices)
  study = _study(optuna, choices, root)
  states = optuna.trial.TrialState
  axes = {k: _distribution(optuna, v) for k, v in choices.axes.items()}
  planned: list[Planned] = []
  trials: dict[str, Trial] = {}
  done = []
  for number in range(choices.number):
    if number == len(study.trials):
      words = np.random.SeedSequence([choices.seed, number]).generate_state(1)
      study.sampler = optuna.samplers.TPESampler(seed=int(words[0]))
      study.ask(axes)
    trial = study.trials[number]
    key = json.dumps(trial.params, sort_keys=True)
    if key not in trials:  # what is drawn twice is run once
      row = _row(number, trial.params, choices.axes)
      planned += plan(base, [row], root)
      found = planned[-1]
      failed = trial.state == states.FAIL
      if not failed and not found.finished:
        failed = bool(run(planned))
      value = None
      if not failed:
        labels = dict(found.row.labels)
        end = result(found.directory, labels, choices.figure, choices.last)
        value = end.final
      trials[key] = Trial(found, value)
    done.append(trials[key])
    if trial.state == states.RUNNING:
      value = done[-1].value
      state = states.COMPLETE if value is not None else states.FAIL
      study.tell(number, value, state=state)
  return done


def best(trials: list[Trial], choices: Search) -> Trial | None:
  """The row that reached most, or least; None where all failed."""
  reached = [(t.value, t) for t in trials if t.value is not None]
  sign = 1 if choices.maximize else -1
  ends = max(reached, key=lambda pair: sign * pair[0], default=None)
  return ends and ends[1]


def _study(optuna: Any, choices: Search, root: str) -> Any:
  """The study of a workdir, made or found."""
  os.makedirs(root, exist_ok=True)
  backend = optuna.storages.journal.JournalFileBackend(
    os.path.join(root, STUDY)
  )
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  study = optuna.create_study(
    study_name='search',
    storage=optuna.storages.JournalStorage(backend),
    direction='maximize' if choices.maximize else 'minimize',
    load_if_exists=True,
  )
  # More rows may be asked for; anything else would be another search.
  asked = repr(choices._replace(number=0, axes=dict(choices.axes)))
  known = study.user_attrs.get('search')
  if known is None:
    study.set_user_attr('search', asked)
  elif known != asked:
    raise ValueError(
      f'{root} holds another search, {known}; this one is {asked}: take another'
      ' --workdir, or change the number alone'
    )
  return study


def _optuna() -> Any:
  try:
    return importlib.import_module('optuna')
  except ImportError as error:
    raise ValueError(
      "a search needs optuna: pip install 'postrain[search]', or draw rows by"
      ' sweeps.random'
    ) from error


def _check(choices: Search) -> None:
  if choices.number < 1 or choices.seed < 0:
    raise ValueError(
      f'number={choices.number}, seed={choices.seed}: give at least 1 and 0'
    )
  for path, axis in choices.axes.items():
    if not isinstance(axis, Range | list | tuple) or not axis:
      raise ValueError(f'{path!r}: {axis!r} is no Range and no list of values')


def _distribution(optuna: Any, axis: Any) -> Any:
  kinds = optuna.distributions
  if not isinstance(axis, Range):  # by position: values may be blocks
    return kinds.CategoricalDistribution(range(len(axis)))
  if axis.integer:
    return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
  return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)


def _row(number: int, params: dict[str, Any], axes: Mapping[str, Any]) -> Row:
  overrides = {
    path: params[path] if isinstance(axis, Range) else axis[params[path]]
    for path, axis in axes.items()
  }
  labels = {path: label(value) for path, value in overrides.items()}
  return Row({'trial': str(number), **labels}, overrides)
