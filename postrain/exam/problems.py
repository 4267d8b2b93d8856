"""Problems from files: known layouts are recognised by their fields."""

from collections.abc import Callable, Sequence
import json
import os
import pathlib
from typing import Any, NamedTuple

from postrain.data import read_jsonl

# Of tasks whose answer is a program that would have to run.
CODE_FIELDS = {
  'canonical_solution', 'challenge_test_list', 'entry_point', 'test',
  'test_cases', 'test_imports', 'test_list', 'test_setup_code', 'tests',
  'unit_tests',
}  # fmt: skip


class Problem(NamedTuple):
  """A question, and its answer as the data set writes it."""

  question: str
  answer: str


class Layout(NamedTuple):
  """What a data set calls its fields, and how its answers are graded."""

  fields: tuple[str, ...]
  question: Callable[[dict[str, Any]], str]
  answer: Callable[[dict[str, Any]], str]
  grader: str


def _field(name: str) -> Callable[[dict[str, Any]], str]:
  def read(example: dict[str, Any]) -> str:
    value = example[name]
    if isinstance(value, dict | list):
      raise ValueError(f'field {name!r} holds no text')
    return str(value)

  return read


def _letter(index: int) -> str:
  return chr(ord('A') + index)


def _with_options(
  example: dict[str, Any], labels: Sequence[str], texts: Sequence[str]
) -> str:
  options = zip(labels, texts, strict=True)
  lines = [f'({label}) {text}' for label, text in options]
  return '\n'.join([example['question'], *lines])


# The first whose fields all rows have.
LAYOUTS = {
  'svamp': Layout(
    ('Body', 'Question', 'Answer'),
    lambda e: f'{e["Body"].rstrip(" .")}. {e["Question"]}',
    _field('Answer'),
    'accuracy',
  ),
  'arc': Layout(
    ('question', 'choices', 'answerKey'),
    lambda e: _with_options(e, e['choices']['label'], e['choices']['text']),
    _field('answerKey'),
    'choice',
  ),
  'mmlu': Layout(
    ('question', 'choices', 'answer'),
    lambda e: _with_options(
      e, [_letter(i) for i in range(len(e['choices']))], e['choices']
    ),
    lambda e: _letter(int(e['answer'])),
    'choice',
  ),
  'aqua': Layout(
    ('question', 'options', 'correct'),
    lambda e: '\n'.join([e['question'], *e['options']]),
    _field('correct'),
    'choice',
  ),
  'gsm8k': Layout(
    ('question', 'answer'), _field('question'), _field('answer'), 'accuracy'
  ),
  'math': Layout(
    ('problem', 'answer'), _field('problem'), _field('answer'), 'exact_match'
  ),
  'bbh': Layout(
    ('input', 'target'), _field('input'), _field('target'), 'exact_match'
  ),
}


def read_problems(
  path: str | os.PathLike[str],
  *,
  layout: str | None = None,
  question_field: str | None = None,
  answer_field: str | None = None,
  num_examples: int | None = None,
) -> tuple[list[Problem], str, str]:
  """Read the problems of a file.

  Args:
    path: JSON lines, or a .json file with a list of rows (also one under
      ``examples``).
    layout: name of one in ``LAYOUTS``; None to recognise it.
    question_field: with ``answer_field`` instead of a layout.
    answer_field: of a number, or a text with it after ####.
    num_examples: the first ones only; None for all.

  Returns:
    Problems, the layout in words, and the grader that suits it.

  Raises:
    ValueError: no file, no row, no known layout, a row that does not fit it;
      a task whose answers would have to be executed.
  """
  if num_examples is not None and num_examples < 1:
    raise ValueError(f'num_examples={num_examples}: it must be at least 1')
  examples = _examples(pathlib.Path(path))[:num_examples]
  code = sorted(CODE_FIELDS & {field for each in examples for field in each})
  if code:
    raise ValueError(
      f'{path} has the fields {", ".join(code)}: its answers are programs that'
      ' would have to run, and there is no sandbox for code that a model wrote;'
      ' take a task whose answers can be read'
    )
  name, chosen = _layout(path, examples, layout, question_field, answer_field)
  problems = []
  for row, example in enumerate(examples, start=1):
    try:
      problem = Problem(chosen.question(example), chosen.answer(example))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
      raise ValueError(
        f'{path}, row {row} does not fit {name}'
        f' ({type(error).__name__}: {error}): its fields are'
        f' {", ".join(example)}; correct the row or name other fields'
      ) from error
    if not problem.question.strip() or not problem.answer.strip():
      raise ValueError(
        f'{path}, row {row} has an empty question or answer ({name}): fill it'
        ' or remove the row'
      )
    problems.append(problem)
  return problems, name, chosen.grader


def _examples(path: pathlib.Path) -> list[dict[str, Any]]:
  if path.suffix == '.gz':
    raise ValueError(f'{path} is compressed: unpack it with gunzip')
  if path.suffix != '.json':
    return read_jsonl(path, fields=())
  try:
    block = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is no JSON in UTF-8: {error}') from error
  rows = block.get('examples') if isinstance(block, dict) else block
  if not isinstance(rows, list) or not rows:
    raise ValueError(f'{path} has no examples: expected a list of objects')
  if not all(isinstance(row, dict) for row in rows):
    raise ValueError(f'{path} has rows that are no objects: expected fields')
  return rows


def _layout(
  path: Any,
  examples: list[dict[str, Any]],
  layout: str | None,
  question: str | None,
  answer: str | None,
) -> tuple[str, Layout]:
  if question is not None and answer is not None and layout is None:
    fields = (question, answer)
    made = Layout(fields, _field(question), _field(answer), 'accuracy')
    return f'the fields {question!r} and {answer!r}', made
  if question is not None or answer is not None:
    raise ValueError(
      f'layout={layout}, question_field={question}, answer_field={answer}: give'
      ' both fields, or a layout'
    )
  if layout is not None and layout not in LAYOUTS:
    raise ValueError(f'layout={layout!r}: known are {", ".join(LAYOUTS)}')
  names = LAYOUTS if layout is None else (layout,)
  shared = set.intersection(*(set(each) for each in examples))
  for name in names:
    found = LAYOUTS[name]
    if shared.issuperset(found.fields):
      return f'the layout {name} ({", ".join(found.fields)})', found
  raise ValueError(
    f'{path}: no layout ({", ".join(names)}) fits the fields that all rows have'
    f' ({", ".join(sorted(shared)) or "none"}): name question_field and'
    ' answer_field'
  )
