"""Graders against answers as models write them."""

from fractions import Fraction

from cases import answers
import pytest

from postrain import rewards
from postrain.rewards.answers import READERS, make_reader
from postrain.types import Completion

STATED = [
  (extract, *row)
  for extract, rows in answers.STATEMENTS.items()
  for row in rows
]


def shown(value):
  return ascii(value[:40]) if isinstance(value, str) else None


def graded(name, text, reference, **choices):
  completion = Completion(text, [], False)
  fn = getattr(rewards, name)
  [reward] = fn([completion], [{'answer': reference}], **choices)
  return reward


def test_the_battery_is_large():
  rows = (answers.NUMBERS, STATED, answers.LETTERS, answers.TEXTS)
  assert sum(map(len, rows)) >= 400


@pytest.mark.parametrize(
  ('text', 'reference', 'answer'), answers.NUMBERS, ids=shown
)
def test_numbers(text, reference, answer):
  expected = None if answer is None else Fraction(answer)
  assert READERS['accuracy'](text) == expected
  right = expected is not None and expected == Fraction(reference)
  tagged = f'<answer>{text}</answer>'
  assert graded('accuracy', tagged, reference, extract='tags') == right
  # The answer of one is the reference of another.
  if expected is not None:
    assert graded('accuracy', f'#### {answer}', text) == 1


@pytest.mark.parametrize(
  ('extract', 'text', 'reference', 'answer'), STATED, ids=shown
)
def test_statements(extract, text, reference, answer):
  expected = None if answer is None else Fraction(answer)
  assert make_reader('accuracy', extract=extract)(text) == expected
  right = expected is not None and expected == Fraction(reference)
  assert graded('accuracy', text, reference, extract=extract) == right


@pytest.mark.parametrize(
  ('name', 'text', 'reference', 'answer'),
  [
    *(('choice', *row) for row in answers.LETTERS),
    *(('exact_match', *row) for row in answers.TEXTS),
  ],
  ids=shown,
)
def test_letters_and_texts(name, text, reference, answer):
  read = READERS[name]
  found = read(text)
  assert (None if found is None else str(found)) == answer
  right = found is not None and found == read(reference)
  assert graded(
    name, f'<answer>{text}</answer>', reference, extract='tags'
  ) == (right)


def test_references_are_read_like_completions():
  assert graded('choice', 'The answer is (B).', '(b)') == 1
  assert graded('exact_match', 'The answer is yes.', 'Yes') == 1
  assert (
    graded('exact_match', '#### 3:30', 'So #### 3:30', extract='marker') == 1
  )
  with pytest.raises(ValueError, match="'B or C' is not a letter"):
    graded('choice', 'B', 'B or C')
  with pytest.raises(ValueError, match="' ' is not a text"):
    graded('exact_match', 'B', ' ')
  with pytest.raises(ValueError, match=r"extract='last'.*'choice'"):
    make_reader('choice', extract='last')
