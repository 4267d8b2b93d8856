"""Thoughts before answers: the tags around them, and the flags for them."""

from collections.abc import Mapping, Sequence
import re
from typing import Any, Literal, NamedTuple

__all__ = ['Thought', 'fused', 'split', 'wants_thinking']

OPEN, CLOSE = '<think>', '</think>'
FLAG = re.compile(r'(?<!\S)/(no_)?think(?!\S)')

Mode = Literal['think', 'no_think']


class Thought(NamedTuple):
  """What was thought, None where nothing opened or closed it, and the rest."""

  thinking: str | None
  answer: str


def split(text: str) -> Thought:
  """Split a completion into what it thinks and what it answers.

  The thinking is what stands between the first opening tag and the last
  closing one, so that an answer inside of thoughts is never taken for the
  answer; what precedes the opening tag belongs to neither. Where only the end
  is there, the prompt has opened it. Where it is not closed after it was last
  opened, the completion was cut off, and its answer is empty.

  >>> split('<think>2 + 2</think>4')
  Thought(thinking='2 + 2', answer='4')
  >>> split('2 + 2</think>4').thinking
  '2 + 2'
  >>> split('<think>2 + 2').answer
  ''
  >>> split('4')
  Thought(thinking=None, answer='4')
  """
  if OPEN not in text and CLOSE not in text:
    return Thought(None, text)
  head, closed, answer = text.rpartition(CLOSE)
  if not closed or OPEN in answer:
    head, answer = text, ''
  before, opened, inside = head.partition(OPEN)
  return Thought(inside if opened else before, answer)


def wants_thinking(messages: Sequence[Mapping[str, Any]]) -> bool:
  """Whether the last flag of the user or the system asks for thoughts.

  A flag is ``/think`` or ``/no_think`` as a word of its own. Without one the
  model thinks.
  """
  flags = [
    flag
    for message in messages
    if message['role'] in ('user', 'system')
    for flag in FLAG.finditer(message.get('content') or '')
  ]
  return not flags or flags[-1][1] is None


def fused(
  question: str | Sequence[Mapping[str, Any]],
  thoughts: str,
  answer: str,
  *,
  mode: Mode | None = None,
) -> list[dict[str, Any]]:
  """Make a conversation of thinking-mode fusion: one model, two modes.

  ``/think`` is answered by ``<think>thoughts</think>answer``, ``/no_think`` by
  ``<think></think>answer``: the empty block is kept, so that a template may
  write it to enforce the mode.

  Args:
    question: of the user, or a conversation that ends with it.
    thoughts: the chain of thought; left out where the mode is not to think.
    answer: without tags.
    mode: its flag is added to the question; None leaves the flags that are
      there, of which the last one counts, and thinking where there are none.

  Raises:
    ValueError: an unknown mode; a conversation that does not end with a user;
      no answer, or no thoughts where they are asked for; a tag inside of them.

  References:
    Yang et al. 2025, Qwen3 Technical Report, arXiv:2505.09388.
  """
  if isinstance(question, str):
    question = [{'role': 'user', 'content': question}]
  messages = [dict(message) for message in question]
  if not messages or messages[-1]['role'] != 'user':
    raise ValueError(
      f'question={question!r:.80}: expected a text, or messages that end with'
      ' one of the user'
    )
  if mode not in ('think', 'no_think', None):
    raise ValueError(f"mode={mode!r}: expected 'think', 'no_think' or None")
  if mode:
    messages[-1]['content'] += f' /{mode}'
  thinking = wants_thinking(messages)
  for name, text in {'thoughts': thoughts, 'answer': answer}.items():
    if OPEN in text or CLOSE in text:
      raise ValueError(f'{name}={text!r:.80}: remove {OPEN} and {CLOSE}')
    if not text.strip() and (thinking or name == 'answer'):
      raise ValueError(
        f"{name}={text!r}: expected a text; mode='no_think' needs no thoughts"
      )
  block = f'{OPEN}{thoughts if thinking else ""}{CLOSE}'
  return [*messages, {'role': 'assistant', 'content': block + answer}]
