"""Where a completion states its answer."""

import re
from typing import Literal

Extract = Literal['marker', 'boxed', 'tags', 'phrase', 'any', 'last']

_BOXED = re.compile(r'\\f?box(?:ed)?\s*\{')
_ANSWER_TAG = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)
_PHRASE = re.compile(
  r'\banswers?(?: to (?:the|this|your) (?:question|problem|exercise|puzzle))?'
  r'[\s*_"\']{0,4}(?:\b(?:is|are|would be|equals)\b|[:=])\s*[:=]?',
  re.IGNORECASE,
)
_SENTENCE_END = re.compile(r'[.;!?](?:["\')*]{0,3})(?:\s|$)|\n')


def statement(text: str, extract: Extract, marker: str) -> str | None:
  """The part of a completion that holds its answer; None if there is none.

  ``any`` is the one of the four explicit statements that begins last. It never
  falls back on the last number of the text: a solution that was cut off has
  one, too.

  Args:
    text: of the completion.
    extract: ``marker``: the line after the last ``marker``; ``boxed``: the last
      ``\\boxed{}``; ``tags``: the last ``<answer></answer>``; ``phrase``: the
      rest of the sentence after the last "the answer is"; ``any`` of these;
      ``last``: the whole text, whose last number a reader of numbers takes.
    marker: introduces the answer.
  """
  if extract == 'last':
    return text
  places = _PLACES if extract == 'any' else {extract: _PLACES[extract]}
  found = [place(text, marker) for place in places.values()]
  return max(found, key=lambda each: each[0])[1]


def _marked(text: str, marker: str) -> tuple[int, str | None]:
  before, found, rest = text.rpartition(marker)
  lines = rest.strip().splitlines()
  return len(before) if found else -1, lines[0] if found and lines else None


def _boxed(text: str, marker: str) -> tuple[int, str | None]:
  """What the braces enclose; None if they are not closed."""
  del marker
  start, first = max(
    ((m.start(), m.end()) for m in _BOXED.finditer(text)), default=(-1, 0)
  )
  depth = 1
  for end in range(first, len(text) if start >= 0 else 0):
    depth += {'{': 1, '}': -1}.get(text[end], 0)
    if not depth:
      return start, text[first:end]
  return start, None


def _tagged(text: str, marker: str) -> tuple[int, str | None]:
  del marker
  found = [(m.start(), m[1]) for m in _ANSWER_TAG.finditer(text)]
  return found[-1] if found else (-1, None)


def _phrased(text: str, marker: str) -> tuple[int, str | None]:
  del marker
  start, first = max(
    ((m.start(), m.end()) for m in _PHRASE.finditer(text)), default=(-1, 0)
  )
  if start < 0:
    return -1, None
  return start, _SENTENCE_END.split(text[first:].strip(' \t\n*:'), 1)[0]


_PLACES = {
  'marker': _marked,
  'boxed': _boxed,
  'tags': _tagged,
  'phrase': _phrased,
}
