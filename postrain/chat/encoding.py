"""Rendered conversations as tokens, and the mask of what is learnt."""

from collections.abc import Iterable
import itertools
from typing import Any, NamedTuple

from postrain.chat.rendering import Messages, Tools, prepared, render
from postrain.chat.turns import turns


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
  chat = prepared(tokenizer, messages, tools, enable_thinking)
  text, cuts = _uncut(render(chat, chat.messages, prompt=True), chat.cut)
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
  chat = prepared(tokenizer, messages, tools, enable_thinking)
  marked, spans = turns(chat)
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
