"""Is the final answer the right number?

Numbers are compared exactly, as fractions. Nothing here evaluates text, every
pattern runs in linear time, and a number of more than 64 characters is none:
a hostile completion costs a reward of 0, not a hang.
"""

from fractions import Fraction
import re
from typing import Any, Literal

from postrain.types import Completion

MAX_NUMBER_LENGTH = 64

# A sign counts where it cannot be a subtraction: 10-5 ends in 5, not in -5.
# The run of digits and separators is taken whole and judged afterwards, so
# that 1.2.3 or 3:30 or 1,5 is no number instead of its last part.
_NUMBER = re.compile(
  r'(?P<sign>(?<![\w)\]}%])-)?(?:\\?[$€£](?P<inner>-)?)?'
  r'(?<![\w^])(?<![0-9][.,:/])'
  r'(?P<run>(?:(?<!\.)\.)?[0-9](?:[0-9.,:/]*[0-9])?)'
  r'(?P<power>\^|!|[eE][+-]?[0-9])?'
)
_DECIMAL = r'(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+'
_QUOTIENT = re.compile(rf'({_DECIMAL})(?:/({_DECIMAL}))?')
_FRAC = re.compile(r'(?<![0-9])\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}')
_BOXED = re.compile(r'\\boxed\s*\{')
_ANSWER_TAG = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)

Extract = Literal['marker', 'boxed', 'tags', 'last']


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
  compare strings or floats. Here a marked answer must hold exactly one number,
  so listing candidates earns nothing; commas, currency signs, units, a percent
  sign, LaTeX fractions and a final period are read over (50% is 50, as in the
  references of GSM8K); powers, times, lists and mixed numbers are no number.

  Args:
    completions: rows to grade.
    examples: rows with the reference answer.
    extract: where a completion states its answer. ``marker``: the line after
      the last ``marker``; ``boxed``: the last ``\\boxed{}``; ``tags``: the last
      ``<answer></answer>``; ``last``: the last number of the text.
    marker: introduces the answer, in references too.
    field: of the example; a number, or a text that holds one number (after
      the marker, where there is one).

  Raises:
    ValueError: a reference is missing or is no number.

  References:
    Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems,
    arXiv:2110.14168.
  """
  rewards = []
  for row, (completion, example) in enumerate(
    zip(completions, examples, strict=True)
  ):
    expected = _reference(example, field, marker, row)
    found = _final_number(completion.text, extract, marker)
    rewards.append(float(found == expected))
  return rewards


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
    answer = answer.strip().removesuffix('.')
    match = _NUMBER.fullmatch(answer)
    ends = match is not None and _value(match) is not None
    rewards.append(
      float(bool(found) and ends and completion.text.count(marker) == 1)
    )
  return rewards


def _final_number(text: str, extract: Extract, marker: str) -> Fraction | None:
  """The number that a completion gives as its answer."""
  if extract == 'last':
    values = _numbers(text)
    return values[-1] if values else None
  if extract == 'marker':
    answer = _marked(text, marker)
  elif extract == 'boxed':
    answer = _boxed(text)
  else:
    answers = _ANSWER_TAG.findall(text)
    answer = answers[-1] if answers else None
  return None if answer is None else _sole_number(answer)


def _reference(
  example: dict[str, Any], field: str, marker: str, row: int
) -> Fraction:
  if field not in example:
    raise ValueError(
      f'row {row}: the example has no field {field!r}, only'
      f' {sorted(example)}; name the one with the reference answer'
    )
  text = str(example[field])
  marked = _marked(text, marker)
  value = _sole_number(text if marked is None else marked)
  if value is None:
    raise ValueError(
      f'row {row}: the reference {field}={text[-80:]!r} is not one number;'
      f' expected a number, or a text that ends in {marker!r} and a number'
    )
  return value


def _marked(text: str, marker: str) -> str | None:
  """The rest of the line after the last marker."""
  _, found, answer = text.rpartition(marker)
  lines = answer.strip().splitlines()
  return lines[0] if found and lines else None


def _boxed(text: str) -> str | None:
  """What the braces of the last ``\\boxed{}`` enclose."""
  start = max((m.end() for m in _BOXED.finditer(text)), default=None)
  if start is None:
    return None
  depth = 1
  for end in range(start, len(text)):
    depth += {'{': 1, '}': -1}.get(text[end], 0)
    if not depth:
      return text[start:end]
  return None


def _sole_number(answer: str) -> Fraction | None:
  """The value of a text that holds exactly one number, else None."""
  values = _numbers(re.sub(r'^-\s+', '-', answer.strip()))
  return values[0] if len(values) == 1 else None


def _numbers(text: str) -> list[Fraction | None]:
  """All numbers in order; None for what looks like one and is not."""
  text = text.replace('\N{MINUS SIGN}', '-').replace('{,}', ',')
  text = text.replace('\\!', '').replace('\\,', '')
  text = _FRAC.sub(r'\1/\2', text)
  return [_value(match) for match in _NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> Fraction | None:
  run = match['run']
  if match['power'] or len(run) > MAX_NUMBER_LENGTH:
    return None
  parts = _QUOTIENT.fullmatch(run)
  if parts is None:
    return None
  top, bottom = (Fraction((p or '1').replace(',', '')) for p in parts.groups())
  if not bottom:
    return None
  return top / bottom * (-1 if match['sign'] or match['inner'] else 1)
