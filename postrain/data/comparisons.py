"""Preferences as arrays: pairs, rankings, and single completions judged.

The rows are those of `encode_demonstrations`: right-padded, the prompt as it
is sampled from, the completion and its stop token under the mask.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from jaxtyping import Bool, Float, Int
import numpy as np

from postrain.chat import Conversation
from postrain.data.demonstrations import (
  Demonstrations,
  checked_stop,
  completed,
  unit_arrays,
)
from postrain.data.preferences import Preference
from postrain.data.prompts import Style, padding_id


class Pairs(NamedTuple):
  """Units of two rows, the chosen and the rejected: B = 2 x pairs."""

  tokens: Int[np.ndarray, 'B T']
  valid: Bool[np.ndarray, 'B T']
  mask: Bool[np.ndarray, 'B T']
  margins: Float[np.ndarray, ' B'] | None
  preference: Float[np.ndarray, ' B'] | None


class Rankings(NamedTuple):
  """Units of K rows; those that a prompt lacks are not valid anywhere."""

  tokens: Int[np.ndarray, 'B T']
  valid: Bool[np.ndarray, 'B T']
  mask: Bool[np.ndarray, 'B T']
  ranks: Int[np.ndarray, ' B']


class Labels(NamedTuple):
  """Single completions, and which are desirable."""

  tokens: Int[np.ndarray, 'B T']
  valid: Bool[np.ndarray, 'B T']
  mask: Bool[np.ndarray, 'B T']
  desirable: Bool[np.ndarray, ' B']


def encode_pairs(
  tokenizer: Any,
  examples: Sequence[Preference],
  *,
  max_length: int,
  style: Style = 'plain',
  template: str | None = None,
  stop_id: int | None = None,
  enable_thinking: bool | None = None,
  too_long: Literal['error', 'drop'] = 'error',
  num_buckets: int = 6,
) -> Pairs:
  """Encode pairs into units of two rows, for losses of chosen and rejected.

  Args:
    tokenizer: with a padding token.
    examples: of two completions; of a ranking the better comes first.
    max_length: of prompt, completion and stop token together, in tokens.
    style: see `encode_prompts`; ``chat`` where a prompt is messages.
    template: see `encode_prompts`, with ``{prompt}``.
    stop_id: ends a completion; None for the end-of-sequence token.
    enable_thinking: see `encode_prompts`.
    too_long: what becomes of a pair with a row over the limit; the whole pair
      goes. There is no truncation: it would compare what nobody compared.
    num_buckets: lengths that the arrays may have at most.

  Raises:
    ValueError: names the row that is no pair or is too long; only some pairs
      have a margin, or a preference; nothing left; no stop token.
  """
  ordered = []
  for row, example in enumerate(examples):
    ranks = example.ranks or ()
    if len(ranks) != 2 or ranks[0] == ranks[1]:
      raise ValueError(
        f'row {row}: {len(example.completions)} completions of the ranks'
        f' {ranks}: expected two, one better; take encode_rankings for more,'
        ' encode_labels for one'
      )
    better = example.completions[:: 1 if ranks[0] < ranks[1] else -1]
    ordered.append(example._replace(completions=better))
  arrays, kept = _encode(
    tokenizer, ordered, 2, max_length, style, template, stop_id,
    enable_thinking, too_long, num_buckets,
  )  # fmt: skip
  margins, preference = (
    _of_pairs(field, [getattr(examples[i], field) for i in kept])
    for field in ('margin', 'preference')
  )
  return Pairs(*arrays, margins, preference)


def encode_rankings(
  tokenizer: Any,
  examples: Sequence[Preference],
  *,
  num_completions: int,
  max_length: int,
  style: Style = 'plain',
  template: str | None = None,
  stop_id: int | None = None,
  enable_thinking: bool | None = None,
  too_long: Literal['error', 'drop'] = 'error',
  num_buckets: int = 6,
) -> Rankings:
  """Encode rankings into units of K rows, for losses of rewards and ranks.

  Args:
    tokenizer: with a padding token.
    examples: of two completions or more; pairs are rankings.
    num_completions: K, rows of a unit. Where a prompt has fewer completions,
      the last rows are empty, of rank K.
    max_length, style, template, stop_id, enable_thinking, num_buckets: see
      `encode_pairs`.
    too_long: what becomes of a ranking with a row over the limit; the whole
      ranking goes.

  Raises:
    ValueError: names the row that is no ranking, has over K completions or a
      preference, or is too long; nothing left; no stop token.
  """
  for row, example in enumerate(examples):
    if not 0 < len(example.ranks or ()) <= num_completions:
      raise ValueError(
        f'row {row}: {len(example.completions)} completions of the ranks'
        f' {example.ranks}, num_completions={num_completions}: raise it, or'
        ' take encode_labels where there are no ranks'
      )
    if example.preference is not None:
      raise ValueError(
        f'row {row}: preference={example.preference}, but the order of a'
        ' ranking is certain: take encode_pairs, or remove the field'
      )
  arrays, kept = _encode(
    tokenizer, examples, num_completions, max_length, style, template, stop_id,
    enable_thinking, too_long, num_buckets,
  )  # fmt: skip
  absent = (num_completions,) * num_completions
  ranks = [((examples[i].ranks or ()) + absent)[:num_completions] for i in kept]
  return Rankings(*arrays, np.array(ranks, np.int32).reshape(-1))


def encode_labels(
  tokenizer: Any,
  examples: Sequence[Preference],
  *,
  max_length: int,
  style: Style = 'plain',
  template: str | None = None,
  stop_id: int | None = None,
  enable_thinking: bool | None = None,
  too_long: Literal['error', 'drop'] = 'error',
  num_buckets: int = 6,
) -> Labels:
  """Encode single completions, known good or bad, for losses without pairs.

  KTO's reference point is of `postrain.batches.mismatched` rows: move them
  with `align_prompts` first.

  Args:
    tokenizer: with a padding token.
    examples: of one completion.
    max_length, style, template, stop_id, enable_thinking, too_long,
      num_buckets: see `encode_pairs`.

  Raises:
    ValueError: names the row without a label, or that is too long; nothing
      left; no stop token.
  """
  for row, example in enumerate(examples):
    if example.desirable is None:
      raise ValueError(
        f'row {row}: {len(example.completions)} completions without a label:'
        ' take encode_pairs or encode_rankings'
      )
  arrays, kept = _encode(
    tokenizer, examples, 1, max_length, style, template, stop_id,
    enable_thinking, too_long, num_buckets,
  )  # fmt: skip
  desirable = np.array([examples[i].desirable for i in kept], bool)
  return Labels(*arrays, desirable)


Rows = TypeVar('Rows', Demonstrations, Pairs, Rankings, Labels)


def align_prompts(arrays: Rows, *, prompt_length: int, pad_id: int = 0) -> Rows:
  """Move rows so that all completions begin at one slot.

  The layout of the sampler: prompts are left-padded, completions stand behind
  them, where `postrain.batches.mismatched` looks for them.

  Args:
    arrays: whose rows are right-padded.
    prompt_length: slots of the prompts.
    pad_id: of tokens in unused slots.

  Raises:
    ValueError: names the row whose prompt is longer.
  """
  tokens, valid, mask = arrays[:3]
  starts = mask.argmax(1)
  row = int(starts.argmax())
  if starts[row] > prompt_length:
    raise ValueError(
      f'row {row}: the prompt has {starts[row]} tokens, prompt_length='
      f'{prompt_length}: raise it'
    )
  width = prompt_length + int((valid.sum(1) - starts).max())
  source = np.arange(width)[None] - prompt_length + starts[:, None]
  inside = (source >= 0) & (source < tokens.shape[1])
  source = source.clip(0, tokens.shape[1] - 1)

  def moved(x: np.ndarray, fill: Any) -> np.ndarray:
    fill = x.dtype.type(fill)
    x = np.take_along_axis(np.where(valid, x, fill), source, 1)
    return np.where(inside, x, fill)

  return arrays._replace(
    tokens=moved(tokens, pad_id),
    valid=moved(valid, False),
    mask=moved(mask, False),
  )


def _encode(
  tokenizer: Any,
  examples: Sequence[Preference],
  unit_size: int,
  max_length: int,
  style: Style,
  template: str | None,
  stop_id: int | None,
  enable_thinking: bool | None,
  too_long: str,
  num_buckets: int,
) -> tuple[Demonstrations, list[int]]:
  """Rows in units, each filled up with empty rows; which units were kept."""
  stop_id = checked_stop(tokenizer, stop_id)
  units = []
  for row, example in enumerate(examples):
    unit = [
      completed(
        tokenizer,
        {**example._asdict(), 'completion': completion},
        row,
        prompt='prompt',
        completion='completion',
        style=style,
        template=template,
        stop_id=stop_id,
        enable_thinking=enable_thinking,
      )
      for completion in example.completions
    ]
    units.append(unit + [Conversation([], [])] * (unit_size - len(unit)))
  return unit_arrays(
    units, padding_id(tokenizer), max_length, too_long, num_buckets
  )


def _of_pairs(
  field: str, values: Sequence[float | None]
) -> Float[np.ndarray, ' B'] | None:
  """One for each row of a pair, None where no pair has one."""
  known = [value for value in values if value is not None]
  if not known:
    return None
  if len(known) < len(values):
    raise ValueError(
      f'{len(known)} of {len(values)} pairs have a {field}: give all of them'
      ' one, or none'
    )
  return np.repeat(np.array(known, np.float32), 2)
