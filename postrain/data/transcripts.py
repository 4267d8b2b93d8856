"""Conversations as data sets write them: lists of messages, transcripts."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

Messages = list[dict[str, Any]]

SPEAKERS = {'Human': 'user', 'Assistant': 'assistant'}
TURN = re.compile(r'\n\n(Human|Assistant):')
# What each role may follow; None is the beginning.
AFTER = {
  'system': (None,),
  'user': (None, 'system', 'assistant'),
  'assistant': ('user', 'tool'),
  'tool': ('assistant', 'tool'),
}


def is_transcript(text: Any) -> bool:
  """Whether a text begins as a transcript does."""
  return isinstance(text, str) and text.startswith('\n\nHuman:')


def read_transcript(text: str) -> Messages:
  """Read a transcript as messages: a turn is ``\\n\\nHuman:`` and its text.

  Spaces and line breaks around a turn's text go. That text may hold anything
  but the beginning of a turn, so that an answer with a second ``\\n\\nHuman:``
  in it reads as turns.

  Args:
    text: ``\\n\\nHuman: ...\\n\\nAssistant: ...`` and so on.

  Raises:
    ValueError: it begins otherwise, a turn is empty, or one follows another
      that it cannot follow.

  References:
    Bai et al., 2022, Training a Helpful and Harmless Assistant with
    Reinforcement Learning from Human Feedback, arXiv:2204.05862.
  """
  lead, *turns = TURN.split(text)
  if lead or not turns:
    raise ValueError(
      f'the transcript begins with {text[:30]!r}: expected two line breaks and'
      " 'Human:'"
    )
  messages = [
    {'role': SPEAKERS[speaker], 'content': said.strip()}
    for speaker, said in zip(turns[::2], turns[1::2], strict=True)
  ]
  check_turns(messages)
  return messages


def check_turns(messages: Sequence[Any]) -> None:
  """Refuse messages that say nothing or whose roles are out of order.

  A system's message stands first; user and assistant take turns; what a tool
  said follows the assistant, which alone may call one and say nothing else.

  Raises:
    ValueError: names the message.
  """
  before = None
  for i, message in enumerate(messages):
    role = message.get('role') if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in AFTER:
      raise ValueError(
        f'message {i} is {message!r:.80}: expected an object with content and a'
        f' role of {", ".join(AFTER)}'
      )
    if before not in AFTER[role]:
      place = 'first' if before is None else f'after {before!r}'
      raise ValueError(
        f'message {i} has the role {role!r} {place}: roles are out of order;'
        ' join or remove turns'
      )
    said = message.get('content')
    calls = role == 'assistant' and message.get('tool_calls')
    if not calls and not (isinstance(said, str) and said.strip()):
      raise ValueError(
        f'message {i} ({role}) has content={said!r:.40}: expected a text that'
        ' is not empty'
      )
    before = role
