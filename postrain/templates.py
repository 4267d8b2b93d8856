"""What a chat template writes: its text, and the assistant's turns in it.

A chat template is a program that came with a download. It runs in a sandbox,
and its errors and its excesses are errors of the conversation.
"""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
import os
import re
from typing import Any, NamedTuple

MAX_RENDERED = 2**24  # characters; the longest contexts have a fifth
THINKING_TAGS = ('<think>', '</think>')

# Mappings each; what a file holds instead is an error that says so.
Messages = Sequence[Any]
Tools = Sequence[Any] | None


class Chat(NamedTuple):
  """A conversation in which nothing spells a special token."""

  tokenizer: Any
  messages: list[dict[str, Any]]
  tools: list | None
  options: dict[str, Any]
  template: str
  special: tuple[str, ...]  # tokens that no message can spell
  ending: str  # a pattern
  cut: str  # a character that breaks the spelling of a special token
  stand_in: str  # another one, instead of a message


def checked(
  tokenizer: Any, messages: Messages, tools: Tools, enable_thinking: bool | None
) -> Chat:
  """Check a conversation, and break what spells a special token."""
  if not tokenizer.chat_template:
    raise ValueError(
      'the tokenizer has no chat template: set tokenizer.chat_template, or'
      " encode the prompts with style='plain'"
    )
  if not messages or not all(map(_says_something, messages)):
    raise ValueError(
      f'messages={messages!r:.80}: expected at least one, each with a role and'
      ' its content, a text, or tool_calls'
    )
  if not all(isinstance(tool, Mapping) for tool in tools or ()):
    raise ValueError(
      f'tools={tools!r:.80}: expected JSON schemas, a mapping for each function'
    )
  # Some templates write None where others miss the key.
  kept = [{k: v for k, v in m.items() if v is not None} for m in messages]
  template = tokenizer.get_chat_template(tools=tools)
  options = {}
  if enable_thinking is not None:
    options['enable_thinking'] = enable_thinking
  given = {*options, *(['tools'] if tools else []), *itertools.chain(*kept)}
  for name in ('tools', 'enable_thinking', 'tool_calls', 'reasoning_content'):
    if name in given and not re.search(rf'\b{name}\b', template):
      raise ValueError(
        f'{name} is given, and the chat template ignores it: leave it out, or'
        ' set tokenizer.chat_template to one that knows it'
      )
  written = json.dumps([kept, tools], ensure_ascii=False, default=str)
  private = map(chr, range(0xF0000, 0xFFFFE))
  unused = (c for c in private if c not in written + template)
  cut, stand_in = next(unused), next(unused)
  added = tokenizer.added_tokens_decoder.values()
  specials = tuple(token.content for token in added if token.special)
  turns = tuple(token for token in specials if token not in THINKING_TAGS)
  return Chat(
    tokenizer,
    [
      _broken(m, turns if m['role'] == 'assistant' else specials, cut)
      for m in kept
    ],
    _broken(list(tools), specials, cut) if tools else None,
    options,
    template,
    turns,
    _ending(turns, tokenizer.eos_token),
    cut,
    stand_in,
  )


def _says_something(message: Any) -> bool:
  if not isinstance(message, Mapping):
    return False
  content = message.get('content')
  if content is None and message.get('tool_calls'):
    content = ''
  return isinstance(message.get('role'), str) and isinstance(content, str)


def _any_of(tokens: Iterable[str]) -> str:
  longest_first = sorted(tokens, key=len, reverse=True)
  return '|'.join(map(re.escape, longest_first)) or '(?!)'


def _ending(specials: tuple[str, ...], eos: str | None) -> str:
  """One special token, or several up to the end of sequence."""
  one = _any_of(specials)
  return rf'(?:{one})*?{re.escape(eos)}|{one}' if eos else one


def _broken(value: Any, specials: tuple[str, ...], cut: str) -> Any:
  """Put a cut behind the first character of each special token spelled."""
  if isinstance(value, str):
    # A tokenizer may have a thousand, a text has few.
    spelled = [token for token in specials if token in value]
    return re.sub(f'(?s)(?={_any_of(spelled)})(.)', rf'\1{cut}', value)
  if isinstance(value, Mapping):
    return {
      _broken(key, specials, cut): _broken(item, specials, cut)
      for key, item in value.items()
    }
  if isinstance(value, list | tuple):
    return [_broken(item, specials, cut) for item in value]
  return value


def rendered(chat: Chat, messages: Messages, *, prompt: bool = False) -> str:
  return _bounded(
    chat.tokenizer.apply_chat_template,
    list(messages),
    tools=chat.tools,
    add_generation_prompt=prompt,
    tokenize=False,
    **chat.options,
  )


def _bounded(render: Any, *args: Any, **options: Any) -> Any:
  """Call what renders a template: its errors are those of a conversation."""
  try:
    rendered = render(*args, **options)
  except Exception as error:  # a template may raise anything
    raise ValueError(
      f'the chat template refuses the conversation: {error}'
    ) from error
  text = rendered if isinstance(rendered, str) else rendered[0][0]
  if len(text) > MAX_RENDERED:
    raise ValueError(
      f'the chat template makes {len(text)} characters of the conversation,'
      f' more than {MAX_RENDERED}: set tokenizer.chat_template to another'
    )
  return rendered


def generated_spans(chat: Chat) -> tuple[str, list[tuple[int, int]]]:
  """The text, and what the template itself says the assistant generates."""
  from transformers.utils.chat_template_utils import render_jinja_template

  texts, spans = _bounded(
    render_jinja_template,
    [chat.messages],
    tools=chat.tools,
    chat_template=chat.template,
    return_assistant_tokens_mask=True,
    **{**chat.tokenizer.special_tokens_map, **chat.options},
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


def found_spans(chat: Chat) -> tuple[str, list[tuple[int, int]]]:
  """The text, and each turn of the assistant found in it."""
  text = rendered(chat, chat.messages)
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
    probe = rendered(chat, [*before, stand_in, *after])
  except ValueError:  # results of tools that nothing called any more
    probe, whole = rendered(chat, [*before, stand_in]), False
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
  return _same(text, rendered(chat, other))


def _same(text: str, other: str) -> int:
  return len(os.path.commonprefix([text, other]))  # noqa: RUF071


def _landmark(chat: Chat, before: list) -> str:
  """The last special token of the prompt, and what follows it."""
  prompt = rendered(chat, before, prompt=True) if before else ''
  last = max((prompt.rfind(token) for token in chat.special), default=-1)
  return prompt[max(last, 0) :]


def _lost(i: int, why: str) -> str:
  return (
    f'message {i} of the assistant: the chat template {why}; mark in'
    ' tokenizer.chat_template what is learnt, with {% generation %} and'
    ' {% endgeneration %}'
  )
