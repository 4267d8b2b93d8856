"""Prompts with completions to learn from, as arrays."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from postrain import tokenizers
from postrain.data.buckets import bucket, bucket_sizes, padded
from postrain.data.prompts import Style, padding_id, prompt_ids, prompt_text


class Demonstrations(NamedTuple):
  """Right-padded sequences; ``mask`` is True on the completion alone."""

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
    too_long: what becomes of a row over the limit. There is no truncation: a
      completion without its end teaches the model not to stop.
    num_buckets: lengths that the arrays may have at most.

  Raises:
    ValueError: names the row that is empty or too long; nothing left; no stop
      token.
  """
  pad_id = padding_id(tokenizer)
  stop_id = tokenizer.eos_token_id if stop_id is None else stop_id
  if stop_id is None or stop_id == pad_id:
    raise ValueError(
      f'stop_id={stop_id} with pad id {pad_id}: a completion needs an end that'
      ' is not padding; set tokenizer.eos_token or give another stop_id'
    )
  rows, starts = [], []
  for row, example in enumerate(examples):
    before = prompt_ids(
      tokenizer, example, row, field=prompt, style=style, template=template
    )
    after = completion_ids(tokenizer, example, row, field=completion)
    if style == 'plain':
      text = prompt_text(example, row, field=prompt, template=template)
      after = _continuation(tokenizer, text, before, example[completion], after)
    ids = [*before, *after, stop_id]
    if len(ids) > max_length and too_long == 'error':
      raise ValueError(
        f'row {row}: prompt and completion have {len(ids)} tokens,'
        f" max_length={max_length}: raise it, or set too_long='drop'"
      )
    if len(ids) <= max_length:
      rows.append(ids)
      starts.append(len(before))
  if not rows:
    raise ValueError(
      f'no demonstration is left of {len(examples)} at max_length='
      f'{max_length}: raise it, or give examples'
    )
  sizes = bucket_sizes(max_length, num_buckets=num_buckets)
  length = bucket(max(map(len, rows)), sizes)
  tokens, valid = padded(rows, length=length, pad_id=pad_id, side='right')
  mask = valid & (np.arange(length)[None] >= np.array(starts)[:, None])
  return Demonstrations(tokens, valid, mask)


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
