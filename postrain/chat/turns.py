"""Where the turns of the assistant are in the text of a conversation."""

import os
import re

from postrain.chat.rendering import Chat, bounded, render

GENERATION = re.compile(r'\{%-?\s*generation\s*-?%\}')


def turns(chat: Chat) -> tuple[str, list[tuple[int, int]]]:
  """The text, and each turn of the assistant: marked, or else found in it."""
  marked = GENERATION.search(chat.template)
  return _generated(chat) if marked else _found(chat)


def _generated(chat: Chat) -> tuple[str, list[tuple[int, int]]]:
  """The text, and what the template itself says the assistant generates."""
  from transformers.utils.chat_template_utils import render_jinja_template

  texts, spans = bounded(
    lambda: render_jinja_template(
      [chat.messages],
      tools=chat.tools,
      chat_template=chat.template,
      return_assistant_tokens_mask=True,
      **{**chat.tokenizer.special_tokens_map, **chat.options},
    )
  )
  text, spans = texts[0], [(b, e) for b, e in spans[0] if b < e]
  last = text[slice(*spans[-1])] if spans else ''
  if spans and not last.rstrip().endswith(chat.special):
    raise ValueError(
      'the last {% generation %} of the chat template'
      f' ends in {last[-20:]!r}, no special token: the model would not learn to'
      ' stop; put the end of the turn into the block'
    )
  return text, spans


def _found(chat: Chat) -> tuple[str, list[tuple[int, int]]]:
  """The text, and each turn of the assistant found in it."""
  text = render(chat, chat.messages)
  spans: list[tuple[int, int]] = []
  for i, message in enumerate(chat.messages):
    if message['role'] == 'assistant':
      spans.append(_turn(chat, text, i, spans[-1][0] if spans else 0))
      if len(spans) > 1 and spans[-1][0] < spans[-2][1]:
        raise ValueError(_lost(i, 'writes it into the turn before'))
  return text, spans


def _turn(chat: Chat, text: str, i: int, earliest: int) -> tuple[int, int]:
  """Where the text of a message begins and ends, its end of turn included.

  With a stand-in for the message, the two texts are the same up to what the
  message says, and after the token that ends the turn. The turn begins earlier
  if the model has more to say than the message (``<think>``): at the end of
  the prompt, whose last special token and what follows it is a landmark that
  no message can spell.
  """
  before, after = chat.messages[:i], chat.messages[i + 1 :]
  stand_in = {'role': 'assistant', 'content': chat.stand_in}
  whole = True
  try:
    probe = render(chat, [*before, stand_in, *after])
  except ValueError:  # results of tools that nothing called any more
    probe, whole = render(chat, [*before, stand_in]), False
  if probe.count(chat.stand_in) != 1:
    raise ValueError(_lost(i, 'does not write its content once'))
  head, rest = probe.split(chat.stand_in)
  ending = re.match(rf'\s*({chat.ending})', rest)
  if not ending:
    raise ValueError(
      _lost(i, f'ends it with {rest[:20]!r}, no special token: no end to learn')
    )
  same = _same(text, head)
  landmark = _landmark(chat, before)
  place = text.rfind(landmark, earliest, same + len(landmark))
  begin = same if place < 0 else place + len(landmark)
  rest = rest[ending.end() :]
  end = text.find(ending[1], begin) + len(ending[1])
  if whole and text.endswith(rest):
    end = len(text) - len(rest)
  if (
    (place < 0 and any(token in head[same:] for token in chat.special))
    or (whole and not text.endswith(rest))
    or not text[begin:end].endswith(chat.special)
    or end > _reply(chat, text, i)
  ):
    raise ValueError(_lost(i, 'writes other turns differently without it'))
  return begin, end


def _reply(chat: Chat, text: str, i: int) -> int:
  """Where what follows a message of the assistant is written, at least."""
  following = chat.messages[i + 1 : i + 2]
  if not following or following[0]['role'] == 'assistant':
    return len(text)
  other = [*chat.messages]
  other[i + 1] = {**following[0], 'content': chat.stand_in}
  return _same(text, render(chat, other))


def _same(text: str, other: str) -> int:
  return len(os.path.commonprefix([text, other]))  # noqa: RUF071


def _landmark(chat: Chat, before: list) -> str:
  """The last special token of the prompt, and what follows it."""
  prompt = render(chat, before, prompt=True) if before else ''
  last = max((prompt.rfind(token) for token in chat.special), default=-1)
  return prompt[max(last, 0) :]


def _lost(i: int, why: str) -> str:
  return (
    f'message {i} of the assistant: the chat template {why}; mark in'
    ' tokenizer.chat_template what is learnt, with {% generation %} and'
    ' {% endgeneration %}'
  )
