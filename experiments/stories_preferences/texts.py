"""What is preferred, and pairs of stories as they were sampled.

A judge that reads the text: a story is better the more its people say.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from postrain import environments
from postrain.binding import bind
from postrain.data import indices
from postrain.environments import Comparisons, Environment, Units
from postrain.environments.record import rows_of

ENOUGH = 2  # things said; more is not better
SPOKEN = re.compile(r'"([^"]{6,120}?[.!?,])"')
REPEATED = 0.15  # share of 4-grams of words, from which a story counts nothing


def talk(text: str) -> float:
  """In [0, 1]: how many different things of three words or more are said.

  Two are enough. What is said twice counts once, an open quotation does not
  count, and a story that repeats itself has 0.
  """
  words = text.lower().split()
  grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
  if len(grams) - len(set(grams)) > REPEATED * len(grams):
    return 0.0
  said = {
    ' '.join(re.findall('[a-z]+', quote.lower()))
    for quote in SPOKEN.findall(text)
  }
  return min(sum(len(s.split()) >= 3 for s in said), ENOUGH) / ENOUGH


def talking(completions: list, examples: list) -> list[float]:
  """`talk` as a reward."""
  del examples
  return [talk(each.text) for each in completions]


def sampled(
  seed: int, rewards: Any, *, pairs: str | None, text: dict
) -> Environment:
  """Texts, and pairs of a file of arrays: no token is added or cut.

  Args:
    seed: of the run.
    rewards: see `postrain.environments.text`.
    pairs: of `write`; None for none.
    text: arguments of `postrain.environments.text`.
  """
  made = bind(environments, {'name': 'text', **text})(seed, rewards)
  if pairs is None:
    return made
  with np.load(pairs) as arrays:
    learnt, others = (
      Units(*(arrays[f'{part}_{name}'] for name in Units._fields[:3]), {})
      for part in ('train', 'held_out')
    )
  length = learnt.tokens.shape[1]

  def units(step: int, size: int, num_examples: int | None) -> Units:
    number = len(learnt.tokens[::2][:num_examples])
    rows = indices(seed, step, num_prompts=size, size=number)
    return rows_of(learnt, rows, 2)

  def held_out(number: int) -> Units:
    return rows_of(others, np.arange(number) % (len(others.tokens) // 2), 2)

  compared = Comparisons(
    unit_size=2, length=length, dtypes={}, units=units, held_out=held_out,
    lengths=lambda *_: {length},
  )  # fmt: skip
  return dataclasses.replace(made, preferences=lambda kind: compared)


def pairs_of(
  arrays: tuple, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The better and the worse stories of each prompt, one behind the other.

  Args:
    arrays: tokens, valid, mask [P * G, T], grouped by prompt.
    scores: [P, G]; the best is paired with the worst, and so on inwards, as
      long as they differ.
  """
  chosen = []
  for prompt, row in enumerate(scores):
    order = np.argsort(-row, kind='stable') + prompt * scores.shape[1]
    flat = scores.reshape(-1)
    for better, worse in zip(order, order[::-1], strict=True):
      if flat[better] > flat[worse]:
        chosen += [better, worse]
  return tuple(np.asarray(x)[chosen] for x in arrays)


def write(path: str, **parts: tuple) -> None:
  """Rows of pairs, all as wide as the widest, behind blank slots."""
  width = max(rows[0].shape[1] for rows in parts.values())
  np.savez(
    path,
    **{
      f'{part}_{name}': np.pad(x, ((0, 0), (width - x.shape[1], 0)))
      for part, rows in parts.items()
      for name, x in zip(Units._fields[:3], rows, strict=True)
    },
  )
