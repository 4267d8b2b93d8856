"""Prompts with completions to learn from, as arrays."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from postrain import tokenizers
from postrain.chat import Conversation, encode_conversation
from postrain.data.buckets import bucket, bucket_sizes, padded
from postrain.data.prompts import Style, padding_id, prompt_ids, prompt_text


class Demonstrations(NamedTuple):
  """Right-padded sequences; ``mask`` is True on what is trained."""

  tokens: Int[np.ndarray, 'B T']
  valid: Bool[np.ndarray, 'B T']
  mask: Bool[np.ndarray, 'B T']


def encode_demonstrations(
  tokenizer: Any,
  examples: Sequence[dict[str, Any]],
  *,
  max_length: int,
  prompt: str = 'prompt',
  completion: str = 'completion',
  style: Style = 'plain',
  template: str | None = None,
  stop_id: int | None = None,
  enable_thinking: bool | None = None,
  too_long: Literal['error', 'drop'] = 'error',
  num_buckets: int = 6,
) -> Demonstrations:
  """Encode prompts and completions into arrays for supervised training.

  The prompt has the tokens that `encode_prompts` gives it, so that the model
  meets in training what it meets in sampling, and every completion ends in the
  stop token, which is trained.

  Args:
    tokenizer: with a padding token.
    examples: rows of a data set.
    max_length: of prompt, completion and stop token together, in tokens.
    prompt: field with the prompt.
    completion: field with the completion.
    style: see `encode_prompts`.
    template: see `encode_prompts`.
    stop_id: ends a completion; None for the end-of-sequence token.
    enable_thinking: see `encode_prompts`.
    too_long: what becomes of a row over the limit. There is no truncation: a
      completion without its end teaches the model not to stop.
    num_buckets: lengths that the arrays may have at most.

  Raises:
    ValueError: names the row that is empty or too long; nothing left; no stop
      token.
  """
  stop_id = checked_stop(tokenizer, stop_id)
  units = [
    [
      completed(
        tokenizer, example, row, prompt=prompt, completion=completion,
        style=style, template=template, stop_id=stop_id,
        enable_thinking=enable_thinking,
      )
    ]
    for row, example in enumerate(examples)
  ]  # fmt: skip
  return unit_arrays(
    units, padding_id(tokenizer), max_length, too_long, num_buckets
  )[0]


def encode_conversations(
  tokenizer: Any,
  examples: Sequence[dict[str, Any]],
  *,
  max_length: int,
  field: str = 'messages',
  tools: str = 'tools',
  enable_thinking: bool | None = None,
  too_long: Literal['error', 'drop'] = 'error',
  num_buckets: int = 6,
) -> Demonstrations:
  """Encode conversations into arrays: all turns of the assistant are trained.

  The mask is that of `postrain.chat.encode_conversation`. It and ``valid``
  come from lengths, never from ids, so that a padding token that is also the
  end of sequence does no harm here.

  Args:
    tokenizer: with a padding token and a chat template.
    examples: rows of a data set.
    max_length: of a conversation, in tokens.
    field: of the example, with the messages.
    tools: of the example, with JSON schemas of functions; it may be missing.
    enable_thinking: see `postrain.chat.encode_chat`.
    too_long: see `encode_demonstrations`.
    num_buckets: lengths that the arrays may have at most.

  Raises:
    ValueError: names the row that cannot be encoded, has nothing to learn or is
      too long; nothing left.
  """
  pad_id = padding_id(tokenizer)
  units = []
  for row, example in enumerate(examples):
    messages = example.get(field)
    if not isinstance(messages, list):
      raise ValueError(
        f'row {row}: the example has {field}={messages!r:.80}: expected a list'
        f' of messages; its fields are {", ".join(example)}'
      )
    try:
      conversation = encode_conversation(
        tokenizer,
        messages,
        tools=example.get(tools),
        enable_thinking=enable_thinking,
      )
    except ValueError as error:
      raise ValueError(f'row {row}: {error}') from error
    units.append([conversation])
  return unit_arrays(units, pad_id, max_length, too_long, num_buckets)[0]


def checked_stop(tokenizer: Any, stop_id: int | None) -> int:
  """The id that ends a completion: the one given, or the end of sequence."""
  pad_id = padding_id(tokenizer)
  stop_id = tokenizer.eos_token_id if stop_id is None else stop_id
  if stop_id is None or stop_id == pad_id:
    raise ValueError(
      f'stop_id={stop_id} with pad id {pad_id}: a completion needs an end that'
      ' is not padding; set tokenizer.eos_token or give another stop_id'
    )
  return stop_id


def completed(
  tokenizer: Any,
  example: dict[str, Any],
  row: int,
  *,
  prompt: str,
  completion: str,
  style: Style,
  template: str | None,
  stop_id: int,
  enable_thinking: bool | None,
) -> Conversation:
  """One prompt as in sampling, then its completion and the stop token."""
  before = prompt_ids(
    tokenizer, example, row, field=prompt, style=style, template=template,
    enable_thinking=enable_thinking,
  )  # fmt: skip
  after = completion_ids(tokenizer, example, row, field=completion)
  if style == 'plain':
    text = prompt_text(example, row, field=prompt, template=template)
    after = _continuation(tokenizer, text, before, example[completion], after)
  mask = [False] * len(before) + [True] * (len(after) + 1)
  return Conversation([*before, *after, stop_id], mask)


def unit_arrays(
  units: Sequence[Sequence[Conversation]],
  pad_id: int,
  max_length: int,
  too_long: str,
  num_buckets: int,
) -> tuple[Demonstrations, list[int]]:
  """The rows of units within the limit, right-padded; which units these are.

  A unit with a row over the limit goes as a whole. A row without tokens stays
  empty: it fills a unit up.
  """
  lengths = [max(len(ids) for ids, _ in unit) for unit in units]
  for row, length in enumerate(lengths):
    if length > max_length and too_long == 'error':
      raise ValueError(
        f'row {row}: prompt and completion have {length} tokens,'
        f" max_length={max_length}: raise it, or set too_long='drop'"
      )
  kept = [i for i, length in enumerate(lengths) if length <= max_length]
  if not kept:
    raise ValueError(
      f'no example is left of {len(units)} at max_length='
      f'{max_length}: raise it, or give examples'
    )
  sizes = bucket_sizes(max_length, num_buckets=num_buckets)
  length = bucket(max(lengths[i] for i in kept), sizes)
  rows = [row for i in kept for row in units[i]]
  tokens, valid = padded(
    [row.ids for row in rows], length=length, pad_id=pad_id, side='right'
  )
  mask = np.zeros_like(valid)
  for i, row in enumerate(rows):
    mask[i, : len(row.mask)] = row.mask
  return Demonstrations(tokens, valid, mask), kept


def completion_ids(
  tokenizer: Any, example: dict[str, Any], row: int, *, field: str
) -> list[int]:
  """The tokens of one completion by itself, without a stop token."""
  text = example.get(field)
  if not isinstance(text, str) or not text.strip():
    raise ValueError(
      f'row {row}: the example has {field}={text!r}: expected a completion;'
      f' its fields are {", ".join(example)}'
    )
  return tokenizers.encode_text(tokenizer, text)


def _continuation(
  tokenizer: Any, text: str, before: list[int], added: str, apart: list[int]
) -> list[int]:
  """The completion as it would be encoded after its prompt, if that is kept.

  SentencePiece models put a space before any text: encoded apart, "4" after
  "2 + 2 =" would start a word that the model never sees there. Where the two
  would merge into one token the prompt comes first.
  """
  joint = tokenizers.encode_text(tokenizer, text + added, start=True)
  if joint[: len(before)] == before:
    return joint[len(before) :]
  return apart
