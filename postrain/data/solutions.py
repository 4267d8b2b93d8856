"""Pairs from solutions that somebody graded."""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

from postrain.data.order import indices
from postrain.data.preferences import Preference, checked_prompt


def solution_pairs(
  examples: Sequence[Mapping[str, Any]],
  *,
  question: str = 'question',
  num_pairs: int | None = 1,
  seed: int = 0,
) -> list[Preference]:
  """Pair right and wrong solutions of a question, as in GSM8K's samples.

  A solution is any field that holds an object with ``solution``, a text, and
  ``is_correct``. Equal solutions count once. Which of the right x wrong pairs
  of a question are taken depends on (seed, row) alone.

  Args:
    examples: rows of a data set.
    question: field with the prompt.
    num_pairs: of a question at most; None for all.
    seed: of the choice, not negative.

  Returns:
    Pairs in the order of the rows; a row whose solutions are all right or all
    wrong gives none.

  Raises:
    ValueError: names the row and the field; no pair at all.
  """
  if num_pairs is not None and num_pairs < 1:
    raise ValueError(f'num_pairs={num_pairs}: take at least 1, or None for all')
  pairs: list[Preference] = []
  for row, example in enumerate(examples):
    try:
      right, wrong = _solutions(example)
      both = list(itertools.product(right, wrong))
      if both:
        prompt = checked_prompt(example, question)
        order = indices(seed, row, num_prompts=len(both), size=len(both))
        pairs += [
          Preference(prompt, both[i], ranks=(0, 1)) for i in order[:num_pairs]
        ]
    except ValueError as error:
      raise ValueError(f'row {row}: {error}') from error
  if not pairs:
    raise ValueError(
      f'no pair in {len(examples)} rows: a row needs a right and a wrong'
      ' solution'
    )
  return pairs


def _solutions(example: Mapping[str, Any]) -> tuple[list[str], list[str]]:
  """The right solutions and the wrong ones, each once."""
  found: dict[str, bool] = {}
  for field, value in example.items():
    if not isinstance(value, Mapping) or 'is_correct' not in value:
      continue
    text, correct = value.get('solution'), value['is_correct']
    if not isinstance(text, str) or not text.strip():
      raise ValueError(f'field {field} has solution={text!r}: expected a text')
    if not isinstance(correct, bool):
      raise ValueError(
        f'field {field} has is_correct={correct!r}: expected true or false'
      )
    if found.setdefault(text, correct) != correct:
      raise ValueError(
        f'field {field} has a solution that is both right and wrong: remove one'
      )
  if not found:
    raise ValueError(
      f'none of the fields {", ".join(example)} holds an object with solution'
      ' and is_correct'
    )
  right, wrong = (
    [t for t, c in found.items() if c is x] for x in (True, False)
  )
  return right, wrong
