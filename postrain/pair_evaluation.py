"""Held-out pairs during training: does the model prefer what raters do?"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import numpy as np

from postrain import sharding
from postrain.compilation import make_jit
from postrain.environments import Units, rows_of
from postrain.evaluation import calibration_error
from postrain.preferring import Preferring
from postrain.recipe import Recipe
from postrain.types import TrainState


class Judging:
  """Called with a state of the stage on preferences, gives figures.

  ``eval/pair_accuracy`` is the share of held-out pairs whose chosen the model
  prefers, an equal one half; ``eval/pair_margin`` the mean of the logit; and
  ``eval/pair_ece`` the `calibration_error` of its chance, in 15 bins.
  """

  def __init__(
    self, recipe: Recipe, preferring: Preferring,
    held_out: Callable[[int], Units],
  ):  # fmt: skip
    self._choices, self._held_out = recipe.evaluation, held_out
    self._judge = make_jit()(preferring.judge)
    self._cached = recipe.preference.ref_logprobs == 'cached'
    self.ref_logprobs: np.ndarray | None = None

  def __call__(self, state: TrainState) -> dict[str, float]:
    judged = [
      self._judge(state.params, state.ref_params, *part)
      for part in self._parts()
    ]
    margins = np.concatenate(sharding.on_host(judged))
    margins = margins[: self._choices.num_prompts]
    right = (1 + np.sign(margins)) / 2
    chances = 1 / (1 + np.exp(-np.abs(margins)))
    return {
      'eval/pair_accuracy': float(right.mean()),
      'eval/pair_margin': float(margins.mean()),
      'eval/pair_ece': calibration_error(chances, right),
    }

  def traced(self, state: TrainState) -> Any:
    """The judge, traced on the shapes of what it takes."""
    part = next(self._parts())
    return self._judge.trace(state.params, state.ref_params, *part)

  @functools.cached_property
  def pairs(self) -> Units:
    """Those that are judged."""
    return self._held_out(self._choices.num_prompts)

  def _parts(self) -> Iterator[Units]:
    """Batches of one shape; the last begins again."""
    choices, known = self._choices, self.pairs
    if self._cached:
      rows = self.ref_logprobs
      if rows is None:  # a rehearsal, where shapes count alone
        rows = np.zeros(known.tokens.shape, np.float32)
      known = known._replace(arrays={**known.arrays, 'ref_logprobs': rows})
    for start in range(0, choices.num_prompts, choices.batch_size):
      pairs = np.arange(start, start + choices.batch_size) % choices.num_prompts
      yield rows_of(known, pairs, 2)
