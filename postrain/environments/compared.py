"""Preferences written down: JSON lines, as units of rows."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import numpy as np

from postrain import data
from postrain.environments.record import Comparisons, Units, rows_of


def comparisons(
  seed: int,
  tokenizer: Any,
  files: Mapping[str, Any] | None,
  max_prompt_length: int,
  reading: Mapping[str, Any],
) -> Callable[[str], Comparisons] | None:
  """The ``preferences`` of an environment; None without files.

  Args:
    seed: of the order.
    tokenizer: see `postrain.data.encode_pairs`.
    files: dict(train, held_out, ties), see `postrain.environments.text`.
    max_prompt_length: tokens of the prompts of single completions.
    reading: passed on to `postrain.data.encode_pairs` and its like.
  """
  if files is None:
    return None
  if set(files) != {'train', 'held_out', 'ties'}:
    raise ValueError(
      f'environment.preferences={dict(files)!r}: give train and held_out, each'
      " a path, the second may be None, and ties, 'error' or 'drop'"
    )
  read = functools.partial(data.read_preferences, ties=files['ties'])

  @functools.cache
  def of_kind(kind: str) -> Comparisons:
    rows = read(files['train'])
    known, unit_size = _encoded(tokenizer, rows, kind, reading)
    if kind == 'unpaired':
      known = _aligned(known, max_prompt_length, tokenizer.pad_token_id)
    others = None
    if files['held_out'] is not None:
      pairs = read(files['held_out'])
      others, _ = _encoded(tokenizer, pairs, 'pairs', reading)
    return _comparisons(seed, known, unit_size, others, kind != 'unpaired')

  return of_kind


def _encoded(
  tokenizer: Any,
  rows: Sequence[data.Preference],
  kind: str,
  reading: Mapping[str, Any],
) -> tuple[Units, int]:
  """All rows of a kind, and the rows of a unit."""
  if kind == 'pairs':
    of_pairs = data.encode_pairs(tokenizer, rows, **reading)
    known = {} if of_pairs.margins is None else {'margins': of_pairs.margins}
    return Units(*of_pairs[:3], known), 2
  if kind == 'rankings':
    size = max(len(row.completions) for row in rows)
    ranked = data.encode_rankings(
      tokenizer, rows, num_completions=size, **reading
    )
    return Units(*ranked[:3], {'ranks': ranked.ranks}), size
  single = data.encode_labels(tokenizer, rows, **reading)
  return Units(*single[:3], {'desirable': single.desirable}), 1


def _aligned(units: Units, prompt_length: int, pad_id: int) -> Units:
  """Rows whose completions all begin in slot ``prompt_length``."""
  tokens, valid, mask, arrays = units
  starts = mask.argmax(1)[:, None]
  if starts.max() > prompt_length:
    raise ValueError(
      f'the prompt of row {starts.argmax()} of the preferences has'
      f' {starts.max()} tokens, max_prompt_length={prompt_length}: raise it, or'
      ' remove the row'
    )
  width = prompt_length + (valid.sum(1) - starts[:, 0]).max()
  slots = np.arange(width)[None] - prompt_length + starts
  inside = (slots >= 0) & (slots < tokens.shape[1])
  slots = np.where(inside, slots, 0)

  def moved(x: np.ndarray, fill: Any) -> np.ndarray:
    return np.where(inside, np.take_along_axis(x, slots, 1), x.dtype.type(fill))

  return Units(
    moved(tokens, pad_id), moved(valid, False), moved(mask, False), arrays
  )


def _comparisons(
  seed: int, known: Units, unit_size: int, others: Units | None, cut: bool
) -> Comparisons:
  """Another order at each pass, rows no longer than a step needs."""
  longest = known.tokens.shape[1]

  def numbers(step: int, batch_size: int, num_examples: int | None) -> Any:
    size = len(known.tokens[::unit_size][:num_examples])
    return data.indices(seed, step, num_prompts=batch_size, size=size)

  def length(units: Units) -> int:
    if not cut:
      return longest
    needed = int(units.valid.sum(-1).max())
    return data.bucket(needed, data.bucket_sizes(longest))

  def units(step: int, batch_size: int, num_examples: int | None) -> Units:
    drawn = rows_of(known, numbers(step, batch_size, num_examples), unit_size)
    slots = length(drawn)
    tokens, valid, mask = (x[:, :slots] for x in drawn[:3])
    return Units(tokens, valid, mask, drawn.arrays)

  return Comparisons(
    unit_size=unit_size,
    length=longest,
    dtypes={name: values.dtype for name, values in known.arrays.items()},
    units=units,
    lengths=lambda steps, *choices: {
      length(rows_of(known, numbers(step, *choices), unit_size))
      for step in steps
    },
    held_out=others and functools.partial(_first, others),
  )


def _first(pairs: Units, number: int) -> Units:
  """So many pairs, from the first on and again."""
  return rows_of(pairs, np.arange(number) % (len(pairs.tokens) // 2), 2)
