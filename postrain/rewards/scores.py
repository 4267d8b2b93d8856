"""Run reward functions and check what they return."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from jaxtyping import Float, Int
import numpy as np

from postrain.types import Completion, RewardFn

# Beyond it a finite reward would turn infinite on the device.
MAX_REWARD = float(np.finfo(np.float32).max)
REAL = int | float | np.integer | np.floating | np.bool_


class Scores(NamedTuple):
  """Rewards by function and row, and how many rows each failed to judge."""

  rewards: Float[np.ndarray, 'R B']
  num_failures: Int[np.ndarray, ' R']


def score_completions(
  reward_fns: Mapping[str, RewardFn],
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  failures: Literal['error', 'zero'] = 'error',
  max_failure_share: float = 0.2,
) -> Scores:
  """Call every reward function on all rows, in the order of the mapping.

  Other stacks let a list of the wrong length broadcast, turn None into 0 and
  let one NaN poison the group. A function that raises or returns the wrong
  number of rewards is wrong as a whole: an error under either policy.

  Args:
    reward_fns: label -> function with its hyperparameters bound.
    completions: rows to grade, ``B`` of them.
    examples: the example of each row.
    failures: what becomes of a row whose reward is None, NaN or infinite:
      ``error`` raises, ``zero`` gives 0 and counts it.
    max_failure_share: under ``zero``, the share of rows in [0, 1] beyond which
      a function is held to be broken.

  Raises:
    ValueError: names the function, the row and the remedy.
  """
  if len(examples) != len(completions):
    raise ValueError(
      f'{len(completions)} completions but {len(examples)} examples: repeat'
      ' the example of a prompt for each of its samples'
    )
  rewards = np.zeros((len(reward_fns), len(completions)), np.float32)
  num_failures = np.zeros(len(reward_fns), np.int32)
  for index, (label, fn) in enumerate(reward_fns.items()):
    values = call_reward(label, fn, completions, examples)
    broken = [row for row, value in enumerate(values) if not _usable(value)]
    if broken and (
      failures == 'error' or len(broken) > max_failure_share * len(values)
    ):
      raise ValueError(_complaint(label, broken, values))
    num_failures[index] = len(broken)
    rewards[index] = [v if _usable(v) else 0.0 for v in values]
  return Scores(rewards, num_failures)


def call_reward(
  label: str,
  fn: RewardFn,
  completions: list[Completion],
  examples: list[dict[str, Any]],
) -> list[Any]:
  """Call a reward function: one value per completion, usable or not.

  Raises:
    ValueError: it raised, or returned something else; names the function.
  """
  try:
    values = fn(completions, examples)
  except Exception as error:
    raise ValueError(
      f'reward {label!r} raised {type(error).__name__}: {error}; let it return'
      ' a finite number for whatever a completion may say'
    ) from error
  if hasattr(values, '__array__'):
    values = np.asarray(values).tolist()
  if not isinstance(values, list | tuple):
    raise ValueError(
      f'reward {label!r} returned {values!r:.80}: expected a list of'
      f' {len(completions)} floats, one per completion'
    )
  if len(values) != len(completions):
    raise ValueError(
      f'reward {label!r} returned {len(values)} values for'
      f' {len(completions)} completions: return one float per completion'
    )
  return list(values)


def _usable(value: Any) -> bool:
  # False for NaN too, as every comparison with it is.
  real = isinstance(value, REAL)
  return real and bool(abs(value) <= MAX_REWARD)


def _complaint(label: str, broken: list[int], values: list[Any]) -> str:
  row = broken[0]
  return (
    f'reward {label!r} returned {values[row]!r:.80} for row {row}'
    f' ({len(broken)} of {len(values)} rows are no finite number): return a'
    " float, or score with failures='zero' if a few rows cannot be judged"
  )
