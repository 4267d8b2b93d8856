"""Is the final answer the right one?"""

from typing import Any, Literal

from postrain.rewards.answers import make_reader, reference_answer
from postrain.rewards.numbers import NUMBER, number_value
from postrain.rewards.statements import Extract
from postrain.types import Completion

Stated = Literal['marker', 'boxed', 'tags', 'phrase', 'any']


def accuracy(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  extract: Extract = 'marker',
  marker: str = '####',
  field: str = 'answer',
) -> list[float]:
  """Exact equality of the final number with the reference: 1 or 0.

  r = 1[number(completion) = number(example[field])]

  The popular graders take the first (or last) match of a loose pattern and
  compare strings or floats. Here a stated answer must hold exactly one number,
  so listing candidates earns nothing, and numbers are compared as fractions.
  `postrain.rewards.numbers.numbers` says what is read over (units, 50% is 50 as
  in the references of GSM8K) and what is no number (expressions, bounds,
  guesses, times, ratios).

  Args:
    completions: rows to grade.
    examples: rows with the reference answer.
    extract: where a completion states its answer. ``marker``: the line after
      the last ``marker``; ``boxed``: the last ``\\boxed{}``; ``tags``: the last
      ``<answer></answer>``; ``phrase``: after "the answer is"; ``any``: the
      last of these; ``last``: the last number of the text.
    marker: introduces the answer, in references too.
    field: of the example; a number, or a text that holds one number (after
      the marker, where there is one).

  Raises:
    ValueError: a reference is missing or is no number.

  References:
    Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems,
    arXiv:2110.14168.
  """
  return _graded('accuracy', completions, examples, extract, marker, field)


def choice(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  extract: Stated = 'phrase',
  marker: str = '####',
  field: str = 'answer',
) -> list[float]:
  """Whether the letter of the right option is stated: 1 or 0.

  Args:
    completions: rows to grade.
    examples: rows with the reference answer.
    extract: see `accuracy`.
    marker: introduces the answer, in references too.
    field: of the example, with a letter: B, (B).

  Raises:
    ValueError: a reference is missing or is no letter.
  """
  return _graded('choice', completions, examples, extract, marker, field)


def exact_match(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  extract: Stated = 'phrase',
  marker: str = '####',
  field: str = 'answer',
) -> list[float]:
  """Whether the stated text is the reference: 1 or 0.

  Case, spacing and look make no difference; numbers are compared as numbers.
  No algebra is done: x + 1 is not 1 + x.

  Args:
    completions: rows to grade.
    examples: rows with the reference answer.
    extract: see `accuracy`.
    marker: introduces the answer, in references too.
    field: of the example.

  Raises:
    ValueError: a reference is missing or empty.
  """
  return _graded('exact_match', completions, examples, extract, marker, field)


def answer_format(
  completions: list[Completion],
  examples: list[dict[str, Any]],
  *,
  marker: str = '####',
) -> list[float]:
  """Whether the text ends in the marker and a number, once: 1 or 0.

  Args:
    completions: rows to grade.
    examples: not read.
    marker: introduces the answer.
  """
  del examples
  rewards = []
  for completion in completions:
    _, found, answer = completion.text.rpartition(marker)
    match = NUMBER.fullmatch(answer.strip().removesuffix('.'))
    ends = match is not None and number_value(match) is not None
    rewards.append(
      float(bool(found) and ends and completion.text.count(marker) == 1)
    )
  return rewards


def _graded(
  name: str,
  completions: list[Completion],
  examples: list[dict[str, Any]],
  extract: Extract,
  marker: str,
  field: str,
) -> list[float]:
  read = make_reader(name, extract=extract, marker=marker)
  return [
    float(
      read(completion.text)
      == reference_answer(name, example, row, field=field, marker=marker)
    )
    for row, (completion, example) in enumerate(
      zip(completions, examples, strict=True)
    )
  ]
