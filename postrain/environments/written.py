"""Environments of texts: JSON lines, a tokenizer, rewards of the host."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, Literal

import numpy as np

from postrain import data, tokenizers
from postrain import rewards as reward_functions
from postrain.binding import bind
from postrain.environments.record import Environment, reward_weights
from postrain.rewards.scores import score_completions
from postrain.types import Completion, Prompts, RewardFn, Samples


def text(
  seed: int,
  rewards: Mapping[str, Any],
  *,
  train: str | tuple,
  held_out: str | tuple,
  tokenizer: dict,
  prompt: str,
  completion: str | None = None,
  style: Literal['plain', 'chat'] = 'plain',
  template: str | None = None,
  max_prompt_length: int,
  max_length: int,
  too_long: Literal['error', 'drop'] = 'error',
  stop_ids: tuple | None = None,
) -> Environment:
  """Prompts from JSON lines, completions judged as text.

  Args:
    seed: of the run; fixes the order of examples.
    rewards: label -> block for `postrain.rewards`, with a weight beside it.
    train: path of a JSON lines file, or prompts themselves.
    held_out: likewise, for evaluation.
    tokenizer: dict(directory=...) of a checkpoint, or one made on the spot of
      the training texts: dict(name='byte_level' or 'train_bpe', ...).
    prompt: field with the prompt.
    completion: field with the demonstration; None if there are none.
    style: ``plain``, or ``chat`` through the tokenizer's template.
    template: text around the prompt, with ``{field}`` in its place.
    max_prompt_length: tokens of a prompt.
    max_length: tokens of a demonstration with its prompt.
    too_long: what becomes of examples over these limits.
    stop_ids: end a completion; None for the tokenizer's end of sequence.
  """
  fields = [prompt] if completion is None else [prompt, completion]
  examples = _examples(train, fields, prompt)
  others = _examples(held_out, [prompt], prompt)
  made = _tokenizer(tokenizer, [e[f] for e in examples for f in fields])
  stops = _stop_ids(made, stop_ids)
  reading: dict[str, Any] = dict(
    style=style, template=template, too_long=too_long
  )
  encode = functools.partial(
    data.encode_prompts, made, field=prompt, max_length=max_prompt_length,
    **reading,
  )  # fmt: skip
  demonstrations = None if completion is None else _demonstrations(
    seed, made, examples, max_length=max_length, prompt=prompt,
    completion=completion, stop_id=stops[0], **reading,
  )  # fmt: skip
  # Once over all rows: errors come before the run, and drops leave the rest.
  examples, others = encode(examples).examples, encode(others).examples

  def prompts(iteration: int, num_prompts: int) -> Prompts:
    rows = data.indices(
      seed, iteration, num_prompts=num_prompts, size=len(examples)
    )
    return encode([examples[i] for i in rows])

  return Environment(
    vocab_size=_vocab_size(made),
    pad_id=made.pad_token_id,
    stop_ids=stops,
    prompt_length=max_prompt_length,
    demonstration_length=max_length,
    prompts=prompts,
    held_out=lambda num: encode([others[i % len(others)] for i in range(num)]),
    demonstrations=demonstrations,
    weights=reward_weights(rewards),
    rewards=functools.partial(_judge, _functions(rewards), stops, made),
    text=functools.partial(_decode, made),
    tokenizer=made,
  )


def _demonstrations(
  seed: int, tokenizer: Any, examples: list, *, max_length: int, **layout: Any
) -> Callable[[int, int, int | None], data.Demonstrations]:
  """Encode all, then draw those of a step, no longer than they need to be."""
  encoded = data.encode_demonstrations(
    tokenizer, examples, max_length=max_length, **layout
  )

  def drawn(
    step: int, batch_size: int, num_examples: int | None
  ) -> data.Demonstrations:
    size = len(encoded.tokens[:num_examples])
    rows = data.indices(seed, step, num_prompts=batch_size, size=size)
    longest = int(encoded.valid[rows].sum(-1).max())
    length = data.bucket(longest, data.bucket_sizes(max_length))
    return data.Demonstrations(*(x[rows, :length] for x in encoded))

  return drawn


def _vocab_size(tokenizer: Any) -> int:
  return max(tokenizer.get_vocab().values()) + 1


def _stop_ids(tokenizer: Any, stop_ids: tuple | None) -> tuple[int, ...]:
  tokenizers.check(tokenizer, _vocab_size(tokenizer), stop_ids=stop_ids)
  return (tokenizer.eos_token_id,) if stop_ids is None else tuple(stop_ids)


def _functions(rewards: Mapping[str, Any]) -> dict[str, RewardFn]:
  return {
    label: bind(
      reward_functions, {k: v for k, v in block.items() if k != 'weight'}
    )
    for label, block in rewards.items()
  }


def _examples(
  source: str | Sequence[str], fields: Sequence[str], prompt: str
) -> list[dict[str, Any]]:
  if isinstance(source, str):
    return data.read_jsonl(source, fields=fields)
  if len(fields) > 1 or not all(isinstance(p, str) for p in source):
    raise ValueError(
      'prompts that stand in the config are texts without demonstrations: give'
      ' the path of a JSON lines file'
    )
  return [{prompt: written} for written in source]


def _tokenizer(block: Mapping[str, Any], texts: list[str]) -> Any:
  """Load a tokenizer, or make one of the training texts."""
  if set(block) == {'directory'}:
    return tokenizers.load(block['directory'])
  made = {'byte_level': (), 'train_bpe': (texts,)}
  if block.get('name') not in made:
    raise ValueError(
      f'environment.tokenizer={dict(block)!r}: give directory, or name'
      f' ({" or ".join(made)}) with its hyperparameters'
    )
  return bind(tokenizers, block)(*made[block['name']])


def _judge(
  functions: Mapping[str, RewardFn], stops: Sequence[int], tokenizer: Any,
  drawn: Prompts, samples: Samples,
) -> dict[str, np.ndarray]:  # fmt: skip
  """Each reward of each completion."""
  num_samples = len(samples.tokens) // len(drawn.examples)
  scores = score_completions(
    functions,
    _completions(samples, stops, tokenizer),
    [e for e in drawn.examples for _ in range(num_samples)],
  )
  return dict(zip(functions, scores.rewards, strict=True))


def _decode(tokenizer: Any, ids: Any) -> str:
  return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _completions(
  samples: Samples, stops: Sequence[int], tokenizer: Any
) -> list[Completion]:
  """What rewards see: the text without the token that ended it."""
  completions = []
  for tokens, mask, truncated in zip(
    samples.tokens, samples.mask, samples.truncated, strict=True
  ):
    ids = tokens[mask].tolist()
    body = ids[:-1] if ids and ids[-1] in stops else ids
    completions.append(
      Completion(_decode(tokenizer, body), ids, bool(truncated))
    )
  return completions
