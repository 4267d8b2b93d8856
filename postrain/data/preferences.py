"""What people preferred, read from rows of many layouts into one form."""

from collections.abc import Mapping
import math
import os
from typing import Any, Literal, NamedTuple

from postrain.data.jsonl import rows_of
from postrain.data.transcripts import (
  Messages,
  check_turns,
  is_transcript,
  read_transcript,
)

# What an answer may have that is no text; encoded as text alone it would go.
BESIDE = ('tool_calls', 'reasoning_content', 'thinking')


class Preference(NamedTuple):
  """Completions of one prompt, and what is known of them.

  Attributes:
    prompt: a text, or messages up to where the assistant speaks.
    completions: what the assistant says; of a pair the chosen first.
    ranks: of each completion, smaller is better; None for a single one.
    desirable: whether a single completion is good; None for several.
    margin: how much better the chosen of a pair is, ≥ 0; None if unknown.
    preference: the chance that the chosen of a pair is preferred; None where it
      is certain.
    tools: JSON schemas of functions, for chat templates.
  """

  prompt: str | Messages
  completions: tuple[str, ...]
  ranks: tuple[int, ...] | None = None
  desirable: bool | None = None
  margin: float | None = None
  preference: float | None = None
  tools: Any = None


class Tie(ValueError):
  """A row that prefers nothing."""


def preference(example: Mapping[str, Any]) -> Preference:
  """Bring a row of a data set into one form.

  Its fields say what it is:

  - a pair: ``chosen`` and ``rejected``, and perhaps ``margin``, or
    ``preference``, the chance that the chosen is preferred;
  - a ranking: ``completions`` with ``ranks``, smaller is better, or with
    ``scores``, larger is better; some may be equal, not all;
  - a judgement: ``completion`` and ``label``, true or false.

  Each with a ``prompt``, a text or messages. Answers are texts, or messages:
  the assistant's one message, or the whole conversation, or the whole
  transcript (`read_transcript`), which then need no prompt: all before the last
  turn of the assistant is the prompt, and it must be the same for all answers.

  Two whole texts do not say where their prompt ends: where they begin to
  differ may be inside of a word. They are refused without a prompt.

  Args:
    example: other fields are passed over, but for ``tools``.

  Raises:
    ValueError: names the field and the remedy where the row is broken or
      ambiguous. `Tie` where it prefers nothing: a pair of equal answers, a
      ranking of equal ranks.
  """
  readers = {
    ('chosen', 'rejected'): _pair,
    ('completions',): _ranking,
    ('completion', 'label'): _judgement,
  }
  found = [
    read
    for fields, read in readers.items()
    if all(example.get(field) is not None for field in fields)
  ]
  if len(found) != 1:
    raise ValueError(
      f'the fields are {", ".join(example) or "none"}: expected either chosen'
      ' and rejected, or completions with ranks or scores, or completion with'
      ' label; rename the fields, or remove those of another kind'
    )
  return found[0](example)


def read_preferences(
  path: str | os.PathLike[str],
  *,
  ties: Literal['error', 'drop'] = 'error',
  broken: Literal['error', 'drop'] = 'error',
  num_examples: int | None = None,
) -> list[Preference]:
  """Read a file of JSON lines, each a row of any layout of `preference`.

  Args:
    path: see `read_jsonl`.
    ties: what becomes of rows that prefer nothing.
    broken: what becomes of other rows that `preference` refuses; a line that
      is no JSON object is an error in any case.
    num_examples: read the first rows only; None for all.

  Raises:
    ValueError: names file, row and field; nothing left, with the first reason.
  """
  kept: list[Preference] = []
  reasons: list[str] = []
  for place, example in rows_of(path, fields=(), num_examples=num_examples):
    try:
      kept.append(preference(example))
    except ValueError as error:
      if (ties if isinstance(error, Tie) else broken) == 'error':
        raise ValueError(f'{place}: {error}') from error
      reasons.append(f'{place}: {error}')
  if not kept:
    raise ValueError(f'no row is left of {len(reasons)}; {reasons[0]}')
  return kept


def _pair(example: Mapping[str, Any]) -> Preference:
  given = {field: example[field] for field in ('chosen', 'rejected')}
  prompt, answers = _answers(example, given)
  if answers[0] == answers[1]:
    raise Tie(
      f'chosen and rejected are the same text, {answers[0]!r:.60}: remove the'
      " row, or read with ties='drop'"
    )
  margin = _number(example, 'margin', math.inf)
  chance = _number(example, 'preference', 1.0)
  if margin is not None and chance is not None:
    raise ValueError(
      f'margin is {margin} and preference {chance}: a margin is of a pair whose'
      ' order is certain; remove one of the fields'
    )
  return Preference(
    prompt,
    answers,
    ranks=(0, 1),
    margin=margin,
    preference=chance,
    tools=example.get('tools'),
  )


def _number(
  example: Mapping[str, Any], field: str, most: float
) -> float | None:
  """A number of a row, None if it has none."""
  value = example.get(field)
  if value is None:
    return None
  if not _is_number(value) or not 0 <= value <= most:
    raise ValueError(
      f'field {field} is {value!r:.40}: expected a number from 0 to {most:g},'
      ' or no field'
    )
  return float(value)


def _ranking(example: Mapping[str, Any]) -> Preference:
  given = example['completions']
  if not isinstance(given, list) or len(given) < 2:
    raise ValueError(
      f'field completions is {given!r:.60}: expected a list of two or more'
    )
  values = {f'completions[{i}]': answer for i, answer in enumerate(given)}
  prompt, answers = _answers(example, values)
  ranks = _ranks(example, len(answers))
  known: dict[str, int] = {}
  for answer, rank in zip(answers, ranks, strict=True):
    if known.setdefault(answer, rank) != rank:
      raise ValueError(
        f'field completions has {answer!r:.60} twice, with other ranks: remove'
        ' one'
      )
  if len(set(ranks)) == 1:
    raise Tie(
      'all completions have the same rank: remove the row, or read with'
      " ties='drop'"
    )
  return Preference(prompt, answers, ranks, tools=example.get('tools'))


def _ranks(example: Mapping[str, Any], number: int) -> tuple[int, ...]:
  """Ranks counted from 0 without gaps, equal where they were equal."""
  fields = [field for field in ('ranks', 'scores') if example.get(field)]
  if len(fields) != 1:
    raise ValueError(
      f'completions come with {" and ".join(fields) or "no order"}: give either'
      ' ranks, smaller is better, or scores, larger is better'
    )
  [field] = fields
  given = example[field]
  fits = isinstance(given, list) and len(given) == number
  if not fits or not all(map(_is_number, given)):
    raise ValueError(
      f'field {field} is {given!r:.60}: expected {number} numbers, one for each'
      ' completion'
    )
  order = sorted(set(given), reverse=field == 'scores')
  return tuple(map(order.index, given))


def _judgement(example: Mapping[str, Any]) -> Preference:
  label = example['label']
  if not isinstance(label, bool):
    raise ValueError(f'field label is {label!r:.40}: expected true or false')
  given = {'completion': example['completion']}
  prompt, answers = _answers(example, given)
  return Preference(
    prompt, answers, desirable=label, tools=example.get('tools')
  )


def _answers(
  example: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[str | Messages, tuple[str, ...]]:
  """The prompt that all share, and the answers."""
  prompts: list[tuple[str, str | Messages]] = []
  if example.get('prompt') is not None:
    prompts.append(('prompt', checked_prompt(example, 'prompt')))
  answers = []
  for field, value in given.items():
    try:
      before, answer = _split(value)
    except ValueError as error:
      raise ValueError(f'field {field}: {error}') from error
    if before is None and example.get('prompt') is None:
      raise ValueError(
        f'field {field} has no prompt before it: add the field prompt, a text'
        ' or messages, or give the whole conversation as messages'
      )
    if before is not None:
      if prompts and not _same(prompts[-1][1], before):
        raise ValueError(
          f'fields {prompts[-1][0]} and {field} have no common beginning: they'
          " must agree in all that stands before the assistant's last turn;"
          ' correct or remove the row'
        )
      # It may know more than a prompt that is a text: the system's message.
      prompts.append((field, before))
    answers.append(answer)
  return prompts[-1][1], tuple(answers)


def _split(value: Any) -> tuple[Messages | None, str]:
  """What stands before the answer, None if nothing does, and the answer."""
  if is_transcript(value):
    value = read_transcript(value)
  elif isinstance(value, str) and value.strip():
    return None, value
  elif not isinstance(value, list) or not value:
    raise ValueError(
      f'{value!r:.60} is no answer: expected a text or messages, not empty'
    )
  alone = isinstance(value[0], Mapping) and value[0].get('role') == 'assistant'
  # An answer alone follows a user, who is in the prompt.
  check_turns([{'role': 'user', 'content': '.'}, *value] if alone else value)
  *before, last = value
  if last['role'] != 'assistant' or any(map(last.get, BESIDE)):
    raise ValueError(
      f'it ends with {last!r:.60}: expected an answer of the assistant with'
      f' content alone, no {" or ".join(BESIDE)}'
    )
  if alone and before:
    raise ValueError(
      f'{len(value)} messages after the prompt: expected the one of the'
      ' assistant; put those before it into the prompt'
    )
  return (before or None), last['content']


def checked_prompt(example: Mapping[str, Any], field: str) -> str | Messages:
  """The prompt of a row: a text, or messages that the assistant answers."""
  prompt = example.get(field)
  if isinstance(prompt, str) and prompt.strip():
    return prompt
  if not isinstance(prompt, list) or not prompt:
    raise ValueError(
      f'field {field} is {prompt!r:.60}: expected a text or messages, not empty'
    )
  try:
    check_turns(prompt)
  except ValueError as error:
    raise ValueError(f'field {field}: {error}') from error
  if prompt[-1]['role'] not in ('user', 'tool'):
    raise ValueError(
      f'field {field} ends with a message of {prompt[-1]["role"]!r}: expected'
      ' one that the assistant answers'
    )
  return prompt


def _same(prompt: str | Messages, messages: Messages) -> bool:
  """Whether messages are the prompt; a text is that of the only user."""
  if isinstance(prompt, str):
    said = [m for m in messages if m['role'] != 'system']
    return [m['content'] for m in said] == [prompt]
  return prompt == messages


def _is_number(value: Any) -> bool:
  """Whether a value is a number, no boolean, that float32 can hold."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and abs(value) < 1e38
