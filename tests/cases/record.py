"""A call of a public function, and the inputs that all calls draw from."""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np
import oracles


@dataclasses.dataclass(frozen=True)
class Case:
  """A call: float64 inputs in order, and which of them are differentiated.

  ``stopped`` names the input whose copy the oracle holds fixed where the
  library stops the gradient. ``decides`` says that the output is a choice: it
  has no gradient. ``by_place`` says that rows are told apart by their place (a
  draw): their order is not free. ``padded`` is False where an option fixes the
  length of an axis, so that columns cannot be added.
  """

  name: str
  fn: Callable[..., Any]
  oracle: Callable[..., Any]
  inputs: dict[str, np.ndarray]
  options: dict[str, Any]
  gradients: tuple[str, ...]
  stopped: str | None
  decides: bool = False
  by_place: bool = False
  padded: bool = True

  def __str__(self) -> str:
    options = ','.join(f'{k}={v}' for k, v in self.options.items())
    return f'{self.name}({options})'


def draw() -> dict[str, np.ndarray]:
  """Inputs by the names of the vocabulary: gaps, an empty row, large ratios."""
  rng = np.random.default_rng(0)
  rows, length, vocab = 5, 6, 7
  mask = rng.random((rows, length)) < 0.7
  mask[0] = [False, True, True, False, True, True]
  mask[1] = False
  mask[2] = [False, False, True, False, False, False]
  logprobs = -2 * rng.random((rows, length)) - 0.05
  old = logprobs + 0.4 * rng.standard_normal((rows, length))
  old[3, 1:] = logprobs[3, 1:] + [3.0, -3.0, 1.5, -1.5, 25.0]
  where = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
  rewards = np.array([[1, 0, 0, 1], [0.5, 9, -2, 0.5], [3, 0.7, 4, 5]])
  kept = np.array([np.sort(rng.permutation(vocab)[:4]) for _ in range(30)])
  kept[::3, 3:] = -1
  kept[7] = -1
  tokens = kept[:, 1].copy()
  tokens[7] = 2

  def noise(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape)

  return {
    'logprobs': logprobs,
    'old_logprobs': old,
    'ref_logprobs': logprobs + 0.5 * noise(rows, length),
    'sampler_logprobs': logprobs + 0.8 * noise(rows, length),
    'advantages': noise(rows, length),
    'token_rewards': noise(rows, length),
    'values': noise(rows, length),
    'old_values': noise(rows, length),
    'returns': noise(rows, length),
    'weights': np.exp(noise(rows, length)),
    'mask': mask,
    'truncated': np.array([True, False, True, False, False]),
    'groups': np.array([4, 7, 4, 9, 9]),
    'bootstrap': noise(rows),
    'rewards': np.concatenate([rewards, noise(1, 4)]),
    'where': where.astype(bool),
    'logits': noise(rows, length, vocab),
    'ref_logits': noise(rows, length, vocab),
    'tokens': tokens.reshape(rows, length),
    'kept': kept.reshape(rows, length, 4),
    'hidden': noise(rows, length, 3),
    'unembedding': noise(3, vocab),
    'estimate': noise(rows, length),
    'gradient': noise(rows, length),
    'chosen': noise(rows),
    'rejected': noise(rows),
    'ref_chosen': noise(rows),
    'ref_rejected': noise(rows),
    'selected': noise(rows, length) > 0,
    'entropy': np.abs(noise(rows, length)),
    'baselines': noise(4),
    'lengths': rng.integers(0, 9, (4, 4)),
    'sequence_logprobs': -9 * rng.random((4, 4)),
    'many_rewards': np.round(noise(4, 4, 2), 1),
    'many_where': rng.random((4, 4, 2)) < where[..., None] - 0.2,
    'correct': (rng.random((4, 4)) < 0.5).astype(float),
    'collisions': rng.random((rows, length)),
    'step_ends': rng.random((rows, length)) < 0.6,
    'turn_ids': np.sort(rng.integers(0, 3, (rows, length)), axis=1),
    'outcomes': noise(rows),
    'shares': np.array([1.0, 0.25, 1.0, 0.0, 0.75]),
    'coefs': rng.random(rows),
    'divergences': np.array([-1.0, 0.09, 0.1, 0.11, 5.0]),
    'counts': rng.integers(0, 30, rows),
    'few_tokens': rng.integers(0, 2, (rows, length)),
    'chosen_lengths': rng.integers(1, 9, rows),
    'rejected_lengths': rng.integers(1, 9, rows),
    'negative_chosen': -9 * rng.random(rows) - 0.5,
    'negative_rejected': -9 * rng.random(rows) - 0.5,
    'desirable': np.array([True, False, False, True, True]),
    'reference_point': np.asarray(0.4),
    'margins': rng.random(rows),
    'preference': rng.random(rows),
    'swapped': rng.random(rows),
    'step_shares': rng.random((rows, length)),
    'steps_right': rng.random((rows, length)) < 0.6,
    'successes': (rng.random((rows, length, 8)) < 0.3).astype(float),
    'ranks': np.array([[1, 0, 3, 2], [0, 5, 0, 1], [2, 2, 1, 0], [3, 2, 1, 0]]),
    'steps': np.array([0.0, 1.0, 33.0, 80.0, 500.0]),
    'router_logits': noise(rows, length, 4),
    'experts': np.argsort(rng.random((rows, length, 4)))[..., :2],
    'expert_shares': np.array([0.5, 0.0, 0.2, 0.3]),
  }


DRAWN = draw()


def case(
  fn,
  names,
  *,
  gradients='',
  stopped=None,
  rename=None,
  decides=False,
  padded=True,
  **options,
):
  inputs = {}
  for name in names.split():
    inputs[(rename or {}).get(name, name)] = DRAWN[name]
  return Case(
    name=fn.__name__,
    fn=fn,
    oracle=getattr(oracles, fn.__name__),
    inputs=inputs,
    options=options,
    gradients=tuple(gradients.split()),
    stopped=stopped,
    decides=decides,
    padded=padded,
  )
