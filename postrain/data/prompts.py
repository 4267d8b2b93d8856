"""Examples to prompt arrays."""

from collections.abc import Sequence
from typing import Any, Literal

from postrain import tokenizers
from postrain.data.buckets import bucket, bucket_sizes, padded
from postrain.types import Prompts

Style = Literal['plain', 'chat']


def encode_prompts(
  tokenizer: Any,
  examples: Sequence[dict[str, Any]],
  *,
  max_length: int,
  field: str = 'prompt',
  style: Style = 'plain',
  template: str | None = None,
  too_long: Literal['error', 'drop', 'truncate'] = 'error',
  num_buckets: int = 6,
  tools: str = 'tools',
  enable_thinking: bool | None = None,
) -> Prompts:
  """Encode prompts into a left-padded array of one of few lengths.

  Args:
    tokenizer: with a padding token.
    examples: rows of a data set.
    max_length: of a prompt, in tokens.
    field: of the example, with a text; in ``chat`` style a list of messages
      is taken as it is.
    style: ``plain`` text, or ``chat``: a user's message in the tokenizer's
      chat template.
    template: text around the prompt with ``{field}`` (that is ``{prompt}``, or
      whatever ``field`` says) in its place; other braces mean themselves.
    too_long: what becomes of a prompt over the limit. ``drop`` leaves its
      example out (do that once, for the whole data set: an iteration needs a
      fixed number), ``truncate`` keeps its last tokens.
    num_buckets: lengths that the array may have at most, see `bucket_sizes`.
    tools: field of the example with JSON schemas of functions, for ``chat``;
      it may be missing.
    enable_thinking: for chat templates that know it; None for their default.

  Returns:
    Prompts; ``examples`` are those that were kept.

  Raises:
    ValueError: names the row of a prompt that is missing, empty or too long;
      a template without its field; nothing left.
  """
  pad_id = padding_id(tokenizer)
  rows, kept = [], []
  for row, example in enumerate(examples):
    ids = prompt_ids(
      tokenizer,
      example,
      row,
      field=field,
      style=style,
      template=template,
      tools=tools,
      enable_thinking=enable_thinking,
    )
    if len(ids) > max_length and too_long == 'error':
      raise ValueError(
        f'row {row}: the prompt has {len(ids)} tokens, max_length={max_length}:'
        " raise it, or set too_long to 'drop' or 'truncate'"
      )
    if len(ids) > max_length and too_long == 'drop':
      continue
    rows.append(ids[-max_length:])
    kept.append(example)
  if not rows:
    raise ValueError(
      f'no prompt is left of {len(examples)} at max_length={max_length}: raise'
      ' it, or give examples'
    )
  sizes = bucket_sizes(max_length, num_buckets=num_buckets)
  length = bucket(max(map(len, rows)), sizes)
  tokens, mask = padded(rows, length=length, pad_id=pad_id, side='left')
  return Prompts(tokens, mask, kept)


def prompt_ids(
  tokenizer: Any,
  example: dict[str, Any],
  row: int,
  *,
  field: str,
  style: Style,
  template: str | None,
  tools: str = 'tools',
  enable_thinking: bool | None = None,
) -> list[int]:
  """The tokens of one prompt, up to where the policy speaks."""
  text = prompt_text(example, row, field=field, template=template)
  if style == 'plain':
    if not isinstance(text, str):
      raise ValueError(f"row {row}: {field!r} holds messages: set style='chat'")
    ids = tokenizers.encode_text(tokenizer, text, start=True)
  else:
    messages = [{'role': 'user', 'content': text}]
    ids = tokenizers.encode_chat(
      tokenizer,
      messages if isinstance(text, str) else text,
      tools=example.get(tools),
      enable_thinking=enable_thinking,
    )
  if not ids:
    raise ValueError(f'row {row}: the prompt {text!r} has no tokens')
  return ids


def prompt_text(
  example: dict[str, Any], row: int, *, field: str, template: str | None
) -> Any:
  """The text of one prompt in its template, or its list of messages."""
  value = example.get(field)
  if not value or (isinstance(value, str) and not value.strip()):
    raise ValueError(
      f'row {row}: the example has {field}={value!r}: expected a prompt; its'
      f' fields are {", ".join(example)}'
    )
  if template is None:
    return value
  place = '{' + field + '}'
  if place not in template or not isinstance(value, str):
    raise ValueError(
      f'row {row}: template={template!r} needs {place} in it, and a text in the'
      f' example, not {type(value).__name__}'
    )
  return template.replace(place, value)


def padding_id(tokenizer: Any) -> int:
  """The id that fills unused slots."""
  if tokenizer.pad_token_id is None:
    raise ValueError(
      'pad_token=None: set tokenizer.pad_token to a token that text never uses'
    )
  return tokenizer.pad_token_id
