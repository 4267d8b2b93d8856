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
    encoded = functools.partial(
      _encoded, tokenizer, max_prompt_length=max_prompt_length, reading=reading
    )
    known, unit_size = encoded(rows, kind)
    others = None
    if files['held_out'] is not None:
      pairs = read(files['held_out'])
      others, _ = encoded(pairs, 'pairs')
    return _comparisons(seed, known, unit_size, others, kind != 'unpaired')

  return of_kind


def _encoded(
  tokenizer: Any,
  rows: Sequence[data.Preference],
  kind: str,
  *,
  max_prompt_length: int,
  reading: Mapping[str, Any],
) -> tuple[Units, int]:
  """All rows of a kind, and the rows of a unit.

  Single completions all begin in slot ``max_prompt_length``.
  """
  if kind == 'pairs':
    of_pairs = data.encode_pairs(tokenizer, rows, **reading)
    known = {'margins': of_pairs.margins, 'preference': of_pairs.preference}
    known = {name: array for name, array in known.items() if array is not None}
    return Units(*of_pairs[:3], known), 2
  if kind == 'rankings':
    size = max(len(row.completions) for row in rows)
    ranked = data.encode_rankings(
      tokenizer, rows, num_completions=size, **reading
    )
    return Units(*ranked[:3], {'ranks': ranked.ranks}), size
  single = data.encode_labels(tokenizer, rows, **reading)
  _check_prompts(single.mask, max_prompt_length)
  single = data.align_prompts(
    single, prompt_length=max_prompt_length, pad_id=tokenizer.pad_token_id
  )
  return Units(*single[:3], {'desirable': single.desirable}), 1


def _check_prompts(mask: np.ndarray, max_prompt_length: int) -> None:
  starts = mask.argmax(1)
  if starts.max() > max_prompt_length:
    raise ValueError(
      f'the prompt of row {starts.argmax()} of the preferences has'
      f' {starts.max()} tokens, max_prompt_length={max_prompt_length}: raise'
      ' it, or remove the row'
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
    numbers=numbers,
    all_units=lambda number: rows_of(
      known, np.arange(len(known.tokens[::unit_size][:number])), unit_size
    ),
    held_out=others and functools.partial(_first, others),
  )


def _first(pairs: Units, number: int) -> Units:
  """So many pairs, from the first on and again."""
  return rows_of(pairs, np.arange(number) % (len(pairs.tokens) // 2), 2)
