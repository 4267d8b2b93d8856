"""Conversations in which nothing spells a special token, and their text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import re
from typing import Any, NamedTuple

MAX_RENDERED = 2**24  # characters, more than any context holds
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


def prepared(
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
  _refuse_ignored(template, kept, {**options, 'tools': tools or None})
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


def _refuse_ignored(
  template: str, messages: list[dict[str, Any]], options: Mapping[str, Any]
) -> None:
  """Refuse what the template would leave out without a word."""
  given = {key for message in messages for key, said in message.items() if said}
  given |= {name for name, value in options.items() if value is not None}
  for name in ('tools', 'enable_thinking', 'tool_calls', 'reasoning_content'):
    if name in given and not re.search(rf'\b{name}\b', template):
      raise ValueError(
        f'{name} is given, and the chat template ignores it: leave it out, or'
        ' set tokenizer.chat_template to one that knows it'
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


def render(chat: Chat, messages: Messages, *, prompt: bool = False) -> str:
  """The text of messages, up to where the assistant speaks if ``prompt``."""
  return bounded(
    lambda: chat.tokenizer.apply_chat_template(
      list(messages),
      tools=chat.tools,
      add_generation_prompt=prompt,
      tokenize=False,
      **chat.options,
    )
  )


def bounded(rendered: Callable[[], Any]) -> Any:
  """Call what renders a template: its errors are those of a conversation."""
  try:
    made = rendered()
  except Exception as error:  # a template may raise anything
    raise ValueError(
      f'the chat template refuses the conversation: {error}'
    ) from error
  text = made if isinstance(made, str) else made[0][0]
  if len(text) > MAX_RENDERED:
    raise ValueError(
      f'the chat template makes {len(text)} characters of the conversation,'
      f' more than {MAX_RENDERED}: set tokenizer.chat_template to another'
    )
  return made
