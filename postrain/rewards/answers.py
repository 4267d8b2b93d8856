"""From what a completion states to an answer that can be compared and counted.

A reader takes a text and returns something hashable, or None for no answer.
Two answers are the same where they are equal, so votes can be counted.
"""

from collections.abc import Callable, Hashable
import functools
import re
import string
from typing import Any
import unicodedata

from postrain.rewards.numbers import numbers, sole_number
from postrain.rewards.statements import Extract, statement

Reader = Callable[[str], Hashable | None]

_OPEN, _CLOSE = r'[\s(\[{*_$"\'`]*', r'[\s)\]}*_$"\'`]*'
_LETTER = re.compile(
  rf'(?:(?:option|choice|answer) )?{_OPEN}(?P<letter>[A-Z]){_CLOSE}'
  # The text of the option may follow, another letter may not.
  rf'(?:[.:)–-](?!\s*[A-Z]{_CLOSE}(?:[.:),/]|$|and\b|or\b)).*)?',
  re.IGNORECASE | re.DOTALL,
)
_TEXT = re.compile(r'\\(?:text|textbf|textit|mathrm|mathbf|mbox) ?\{([^{}]*)\}')
_LOOKS = re.compile(
  r'\\(?:left|right|displaystyle)(?![a-zA-Z]) ?|\\[!,;: ]|\\[()\[\]](?!\w)'
)


def choice_letter(text: str) -> str | None:
  """The letter of an option: B, (B), **B**, B. Paris; None for two letters.

  A small letter counts where it stands alone, for "a" is also a word.
  """
  text = _LOOKS.sub('', _TEXT.sub(r'\1', text[:1000])).strip()
  match = _LETTER.fullmatch(text.removesuffix('.'))
  if match is None:
    return None
  alone = not text[match.end('letter') :].strip(' )]}*_$"\'`.')
  letter = match['letter']
  return letter.upper() if letter.isupper() or alone else None


def canonical_text(text: str) -> Hashable | None:
  """A number where the text is nothing else, else the text made plain.

  Upper case, spaces that part no words, quotes, markdown, a final period, and
  LaTeX that only changes the look make no difference.
  """
  text = unicodedata.normalize('NFKC', text)
  plain = _LOOKS.sub('', _TEXT.sub(r'\1', text))
  plain = re.sub(r'\\[dtc]frac', r'\\frac', plain)
  plain = re.sub(r'\s+', ' ', plain.replace('\\$', '').replace('\\%', '%'))
  plain = re.sub(r'(?<!\w) | (?!\w)', '', plain.strip(' .*_`"\'$\n'))
  if not plain or len(plain) > 1000:
    return None
  wordless = not any(c in string.ascii_letters for c in plain)
  value = sole_number(text) if wordless or '\\frac' in plain else None
  return plain.casefold() if value is None else value


READERS: dict[str, Reader] = {
  'accuracy': sole_number,
  'choice': choice_letter,
  'exact_match': canonical_text,
}


def make_reader(name: str, *, extract: Extract, marker: str = '####') -> Reader:
  """Make the function from a completion's text to its answer.

  Args:
    name: of a reward in ``READERS``.
    extract: see `postrain.rewards.statements.statement`.
    marker: introduces the answer.

  Raises:
    ValueError: ``last``, of anything but numbers.
  """
  if extract != 'last':
    return functools.partial(_read, READERS[name], extract, marker)
  if name != 'accuracy':
    raise ValueError(
      f"extract='last' finds the last number, which {name!r} does not look for:"
      " take 'any', 'marker', 'boxed', 'tags' or 'phrase'"
    )
  return lambda text: (numbers(text) or [None])[-1]


def _read(
  reader: Reader, extract: Extract, marker: str, text: str
) -> Hashable | None:
  stated = statement(text, extract, marker)
  return None if stated is None else reader(stated)


def reference_answer(
  name: str, example: dict[str, Any], row: int, *, field: str, marker: str
) -> Hashable:
  """The answer of an example, read as that of a completion is.

  Raises:
    ValueError: the field is missing, or holds nothing that could be compared.
  """
  if field not in example:
    raise ValueError(
      f'row {row}: the example has no field {field!r}, only'
      f' {sorted(example)}; name the one with the reference answer'
    )
  text = str(example[field])
  marked = statement(text, 'marker', marker)
  answer = READERS[name](text if marked is None else marked)
  if answer is None:
    kind = {'accuracy': 'one number', 'choice': 'a letter'}.get(name, 'a text')
    raise ValueError(
      f'row {row}: the reference {field}={text[-80:]!r} is not {kind}; expected'
      f' it alone, or a text that ends in {marker!r} and it'
    )
  return answer
