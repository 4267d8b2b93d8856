"""Conversations to tokens: a template's text, and what of it is learnt.

A chat template is a program that came with a download. It runs in a sandbox,
its errors and its excesses are errors of the conversation, and nothing that
a message, a tool or a role says is read as a special token.
"""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
import os
import re
from typing import Any, NamedTuple

__all__ = ['Conversation', 'encode_chat', 'encode_conversation']

MAX_RENDERED = 2**24  # characters; the longest contexts have a fifth
THINKING_TAGS = ('<think>', '</think>')
GENERATION = re.compile(r'\{%-?\s*generation\s*-?%\}')

# Mappings each; what a file holds instead is an error that says so.
Messages = Sequence[Any]
Tools = Sequence[Any] | None


class Conversation(NamedTuple):
  """Tokens; ``mask`` is True where the assistant has to produce them."""

  ids: list[int]
  mask: list[bool]


def encode_chat(
  tokenizer: Any,
  messages: Messages,
  *,
  tools: Tools = None,
  enable_thinking: bool | None = None,
) -> list[int]:
  """Encode a conversation up to where the assistant speaks.

  The ids are those of ``apply_chat_template``, unless a message spells a
  special token: there the popular implementations let it forge a turn, and
  here it is encoded as mere text. Added tokens that are not special (the
  ``<tool_call>`` of Qwen) are no turns and stay tokens, as do the tags of
  thinking in what the assistant said.

  Args:
    tokenizer: with a chat template.
    messages: each with ``role``, and ``content`` or ``tool_calls``.
    tools: JSON schemas of functions, for the template.
    enable_thinking: for templates that know it; None for their default.

  Raises:
    ValueError: no chat template, or one that refuses the conversation or
      ignores a part of it; no message, or one that is no text.
  """
  chat = _chat(tokenizer, messages, tools, enable_thinking)
  text, cuts = _uncut(_render(chat, chat.messages, prompt=True), chat.cut)
  return [token for token, _, _ in _encode(tokenizer, text, cuts)]


def encode_conversation(
  tokenizer: Any,
  messages: Messages,
  *,
  tools: Tools = None,
  enable_thinking: bool | None = None,
) -> Conversation:
  """Encode a whole conversation, and mark what the assistant has to produce.

  That is each of its turns from where the prompt of a sampler would end to the
  token that ends the turn: thoughts as far as the template keeps them, answer,
  tool calls; never what a user, the system or a tool said. Templates with
  ``{% generation %}`` say it themselves. For others each turn is found by
  rendering the conversation with a stand-in for its message; where that leaves
  a doubt, it is an error.

  The ids are those of ``apply_chat_template`` but for two cases: a message
  that spells a special token (see `encode_chat`), and a token that would reach
  over the beginning of a turn, which no sampler could continue.

  Args:
    tokenizer: with a chat template.
    messages: see `encode_chat`; trained are those of the role ``assistant``.
    tools: see `encode_chat`.
    enable_thinking: see `encode_chat`.

  Raises:
    ValueError: see `encode_chat`; no turn of the assistant; a turn that the
      template does not render, or does not end with a special token.
  """
  chat = _chat(tokenizer, messages, tools, enable_thinking)
  if GENERATION.search(chat.template):
    marked, spans = _generated(chat)
  else:
    marked, spans = _found(chat)
  if not spans:
    raise ValueError(
      f'messages={messages!r:.80}: nothing to learn, no message of the role'
      " 'assistant' is rendered"
    )
  text, cuts = _uncut(marked, chat.cut)
  spans = [
    tuple(edge - marked.count(chat.cut, 0, edge) for edge in span)
    for span in spans
  ]
  tokens = _encode(tokenizer, text, cuts)
  # A byte-level token hides a space before it from its place in the text.
  astride = {
    begin
    for begin, _ in spans
    if text[begin - 1 : begin] == ' '
    or any(start < begin < end for _, start, end in tokens)
  }
  if astride:
    tokens = _encode(tokenizer, text, {*cuts, *astride})
  return Conversation(
    [token for token, _, _ in tokens],
    [any(b <= start < e for b, e in spans) for _, start, _ in tokens],
  )


class _Chat(NamedTuple):
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


def _chat(
  tokenizer: Any, messages: Messages, tools: Tools, enable_thinking: bool | None
) -> _Chat:
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
  return _Chat(
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


def _render(chat: _Chat, messages: Messages, *, prompt: bool = False) -> str:
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


def _generated(chat: _Chat) -> tuple[str, list[tuple[int, int]]]:
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


def _found(chat: _Chat) -> tuple[str, list[tuple[int, int]]]:
  """The text, and each turn of the assistant found in it."""
  text = _render(chat, chat.messages)
  spans: list[tuple[int, int]] = []
  for i, message in enumerate(chat.messages):
    if message['role'] == 'assistant':
      spans.append(_turn(chat, text, i, spans[-1][0] if spans else 0))
      if len(spans) > 1 and spans[-1][0] < spans[-2][1]:
        raise ValueError(_lost(i, 'writes it into the turn before'))
  return text, spans


def _turn(chat: _Chat, text: str, i: int, earliest: int) -> tuple[int, int]:
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
    probe = _render(chat, [*before, stand_in, *after])
  except ValueError:  # results of tools that nothing called any more
    probe, whole = _render(chat, [*before, stand_in]), False
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


def _reply(chat: _Chat, text: str, i: int) -> int:
  """Where what follows a message of the assistant is written, at least."""
  following = chat.messages[i + 1 : i + 2]
  if not following or following[0]['role'] == 'assistant':
    return len(text)
  other = [*chat.messages]
  other[i + 1] = {**following[0], 'content': chat.stand_in}
  return _same(text, _render(chat, other))


def _same(text: str, other: str) -> int:
  return len(os.path.commonprefix([text, other]))  # noqa: RUF071


def _landmark(chat: _Chat, before: list) -> str:
  """The last special token of the prompt, and what follows it."""
  prompt = _render(chat, before, prompt=True) if before else ''
  last = max((prompt.rfind(token) for token in chat.special), default=-1)
  return prompt[max(last, 0) :]


def _lost(i: int, why: str) -> str:
  return (
    f'message {i} of the assistant: the chat template {why}; mark in'
    ' tokenizer.chat_template what is learnt, with {% generation %} and'
    ' {% endgeneration %}'
  )


def _uncut(text: str, cut: str) -> tuple[str, list[int]]:
  """The text without its cuts, and where they were."""
  pieces = text.split(cut)
  cuts = list(itertools.accumulate(map(len, pieces)))[:-1]
  return ''.join(pieces), cuts


def _encode(
  tokenizer: Any, text: str, cuts: Iterable[int]
) -> list[tuple[int, int, int]]:
  """Each token with where it starts and ends; none reaches over a cut."""
  first, *edges = sorted({0, *cuts, len(text)})
  tokens = _tokens(tokenizer, text[: edges[0]], first) if edges else []
  lead = _tokens(tokenizer, '\n', 0)
  for begin, end in itertools.pairwise(edges):
    # Behind a line break SentencePiece puts no space before the piece.
    piece = _tokens(tokenizer, '\n' + text[begin:end], begin - 1)
    if [t for t, *_ in piece[: len(lead)]] == [t for t, *_ in lead]:
      tokens += piece[len(lead) :]
    else:
      tokens += _tokens(tokenizer, text[begin:end], begin)
  return tokens


def _tokens(
  tokenizer: Any, text: str, offset: int
) -> list[tuple[int, int, int]]:
  encoded = tokenizer(
    text, add_special_tokens=False, return_offsets_mapping=True
  )
  ids, places = encoded['input_ids'], encoded['offset_mapping']
  return [
    (token, start + offset, end + offset)
    for token, (start, end) in zip(ids, places, strict=True)
  ]
