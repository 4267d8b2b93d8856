"""Environments of texts: JSON lines, a tokenizer, rewards of the host."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any, Literal

import numpy as np

from postrain import data, hosts, tokenizers
from postrain.binding import bind
from postrain.environments.compared import comparisons
from postrain.environments.record import Environment, reward_weights
from postrain.grading import Judge
from postrain.types import Completion, Prompts, Samples


def text(
  seed: int,
  rewards: Mapping[str, Any],
  *,
  train: str | tuple,
  held_out: str | tuple,
  tokenizer: dict,
  prompt: str,
  completion: str | None = None,
  conversations: str | None = None,
  preferences: dict | None = None,
  style: Literal['plain', 'chat'] = 'plain',
  template: str | None = None,
  enable_thinking: bool | None = None,
  max_prompt_length: int,
  max_length: int,
  too_long: Literal['error', 'drop'] = 'error',
  stop_ids: tuple | None = None,
  num_workers: int = 0,
  timeout: float | None = None,
) -> Environment:
  """Prompts from JSON lines, completions judged as text.

  Args:
    seed: of the run; fixes the order of examples.
    rewards: label -> block for `postrain.rewards`, with a weight beside it.
    train: path of a JSON lines file, or prompts themselves.
    held_out: likewise, for evaluation.
    tokenizer: dict(directory=...) of a checkpoint, or one made on the spot of
      the training texts: dict(name='byte_level' or 'train_bpe', ...).
    prompt: field with the prompt: a text, or in ``chat`` style messages.
    completion: field with the demonstration; None if there are none.
    conversations: field with messages, all of whose turns of the assistant are
      learnt, in place of ``completion``. Where ``prompt`` is the same field, a
      prompt is what comes before the assistant's last turn.
    preferences: dict(train, held_out, ties) for the stage on preferences: paths
      of rows of `postrain.data.preference`, those held out of pairs or None,
      and what becomes of rows that prefer nothing, 'error' or 'drop'. A
      template is then around ``{prompt}``.
    style: ``plain``, or ``chat`` through the tokenizer's template.
    template: text around the prompt, with ``{field}`` in its place.
    enable_thinking: for chat templates that know it; None for their default.
    max_prompt_length: tokens of a prompt.
    max_length: tokens of a demonstration with its prompt.
    too_long: what becomes of examples over these limits.
    stop_ids: end a completion; None for the tokenizer's end of sequence.
    num_workers: processes that work out the rewards during a run; 0 for none
      beside that of the run.
    timeout: seconds that a reward may take over the completions of a prompt,
      which only workers can be held to; None for no limit.
  """
  fields = [f for f in (prompt, completion, conversations) if f is not None]
  examples = _examples(train, fields, prompt)
  others = _examples(held_out, [prompt], prompt)
  made, stops = _tokenizer(tokenizer, _texts(examples, fields), stop_ids)
  reading: Any = dict(style=style, template=template, too_long=too_long)
  reading |= dict(enable_thinking=enable_thinking)
  encode = functools.partial(
    data.encode_prompts, made, field=prompt, max_length=max_prompt_length,
    **reading,
  )  # fmt: skip
  learning = dict(reading, max_length=max_length, stop_id=stops[0])
  learnt = _demonstrations(
    made, examples, prompt, completion, conversations, **learning
  )
  if conversations == prompt:
    examples, others = _openings(examples, prompt), _openings(others, prompt)
  # Once over all rows: errors come before the run, and drops leave the rest.
  known, others = encode(examples), encode(others)
  compared = comparisons(seed, made, preferences, max_prompt_length, learning)
  return Environment(
    stop_ids=stops,
    prompt_length=max_prompt_length,
    demonstration_length=max_length,
    **_prompts(seed, max_prompt_length, known, others),
    **_learnt(seed, max_length, learnt),
    preferences=compared,
    **_rewards(rewards, stops, made, prompt, num_workers, timeout),
    **_spoken(made),
  )


def _spoken(tokenizer: Any) -> dict[str, Any]:
  """What an environment has of a tokenizer."""
  return dict(
    vocab_size=_vocab_size(tokenizer),
    pad_id=tokenizer.pad_token_id,
    text=functools.partial(_decode, tokenizer),
    tokenizer=tokenizer,
  )


def _prompts(
  seed: int, max_length: int, known: Prompts, others: Prompts
) -> dict[str, Any]:
  """What an environment has of prompts, those of training and held out."""
  draw = functools.partial(data.indices, seed, size=len(known.examples))
  take = functools.partial(_taken, max_length)
  return dict(
    prompts=lambda iteration, num: take(
      known, draw(iteration, num_prompts=num)
    ),
    prompt_lengths=lambda iterations, num: {
      _slots(known.mask[draw(i, num_prompts=num)], max_length)
      for i in iterations
    },
    held_out=lambda num: take(others, np.arange(num) % len(others.examples)),
  )


def _learnt(
  seed: int, max_length: int, encoded: data.Demonstrations | None
) -> dict[str, Any]:
  """What an environment has of demonstrations."""
  first = (seed, max_length, encoded)
  return dict(
    demonstrations=encoded and functools.partial(_drawn, *first),
    demonstration_lengths=functools.partial(_drawn_lengths, *first),
  )


def _texts(examples: list, fields: Sequence[str]) -> list[str]:
  """All texts, those of messages too."""
  out = []
  for value in (example[field] for example in examples for field in fields):
    messages = [{'content': value}] if isinstance(value, str) else value
    out += [str(message.get('content') or '') for message in messages]
  return out


def _openings(
  examples: list[dict[str, Any]], field: str
) -> list[dict[str, Any]]:
  """Examples with what comes before the assistant's last turn."""
  out = []
  for row, example in enumerate(examples):
    roles = [m.get('role') for m in example[field]]
    ends = [i for i, role in enumerate(roles) if role == 'assistant']
    if not ends or not ends[-1]:
      raise ValueError(
        f'row {row}: messages of the roles {roles}: a prompt is what comes'
        ' before the last turn of the assistant, give one and a turn before it'
      )
    out.append({**example, field: example[field][: ends[-1]]})
  return out


def _demonstrations(
  tokenizer: Any, examples: list, prompt: str, completion: str | None,
  conversations: str | None, *, stop_id: int, max_length: int, style: Any,
  template: str | None, **choices: Any,
) -> data.Demonstrations | None:  # fmt: skip
  """Encode what there is to learn."""
  if conversations is None:
    if completion is None:
      return None
    return data.encode_demonstrations(
      tokenizer, examples, max_length=max_length, prompt=prompt, style=style,
      completion=completion, template=template, stop_id=stop_id, **choices,
    )  # fmt: skip
  if completion is not None or style != 'chat' or template is not None:
    raise ValueError(
      f'conversations={conversations!r} with completion={completion!r},'
      f' style={style!r} and template={template!r}: leave completion and'
      " template out and set style='chat'"
    )
  return data.encode_conversations(
    tokenizer, examples, max_length=max_length, field=conversations, **choices
  )


def _taken(max_length: int, encoded: Prompts, rows: np.ndarray) -> Prompts:
  """Rows of the left-padded prompts, in the bucket of the longest of them."""
  slots = _slots(encoded.mask[rows], max_length)
  return Prompts(
    encoded.tokens[rows, -slots:],
    encoded.mask[rows, -slots:],
    [encoded.examples[row] for row in rows],
  )


def _drawn(
  seed: int, max_length: int, encoded: data.Demonstrations, step: int,
  batch_size: int, num_examples: int | None,
) -> data.Demonstrations:  # fmt: skip
  """Draw those of a step, no longer than they need to be."""
  rows = _numbers(seed, encoded, step, batch_size, num_examples)
  length = _slots(encoded.valid[rows], max_length)
  return data.Demonstrations(*(x[rows, :length] for x in encoded))


def _drawn_lengths(
  seed: int, max_length: int, encoded: Any, steps: range,
  batch_size: int, num_examples: int | None,
) -> set[int]:  # fmt: skip
  """The lengths of what `_drawn` draws in any of the steps."""
  rows = (
    _numbers(seed, encoded, step, batch_size, num_examples) for step in steps
  )
  return {_slots(encoded.valid[each], max_length) for each in rows}


def _numbers(
  seed: int, encoded: data.Demonstrations, step: int, batch_size: int,
  num_examples: int | None,
) -> np.ndarray:  # fmt: skip
  """Which demonstrations a step draws."""
  size = len(encoded.tokens[:num_examples])
  return data.indices(seed, step, num_prompts=batch_size, size=size)


def _slots(real: np.ndarray, max_length: int) -> int:
  """The bucket of the longest row."""
  longest = int(real.sum(-1).max())
  return data.bucket(longest, data.bucket_sizes(max_length))


def _vocab_size(tokenizer: Any) -> int:
  return max(tokenizer.get_vocab().values()) + 1


def _rewards(
  rewards: Mapping[str, Any], stops: Sequence[int], tokenizer: Any,
  prompt: str, num_workers: int, timeout: float | None,
) -> dict[str, Any]:  # fmt: skip
  """What an environment has of rewards."""
  weights = reward_weights(rewards)
  blocks = {
    label: {k: v for k, v in block.items() if k != 'weight'}
    for label, block in rewards.items()
  }
  judge = Judge(blocks, prompt=prompt, num_workers=num_workers, timeout=timeout)
  return dict(
    weights=weights,
    rewards=hosts.shared(
      lambda drawn, samples: judge(
        _completions(samples, stops, tokenizer), drawn.examples
      )
    ),
    grading=judge.working,
  )


def _examples(
  source: str | Sequence[str], fields: Sequence[str], prompt: str
) -> list[dict[str, Any]]:
  if isinstance(source, str):
    return data.read_jsonl(source, fields=fields)
  if len({*fields}) > 1 or not all(isinstance(p, str) for p in source):
    raise ValueError(
      'prompts that stand in the config are texts without demonstrations: give'
      ' the path of a JSON lines file'
    )
  return [{prompt: written} for written in source]


def _tokenizer(
  block: Mapping[str, Any], texts: list[str], stop_ids: tuple | None
) -> tuple[Any, tuple[int, ...]]:
  """Load a tokenizer, or make one of the training texts; what ends a text."""
  making = {'byte_level': (), 'train_bpe': (texts,)}
  if set(block) == {'directory'}:
    made = tokenizers.load(block['directory'])
  elif block.get('name') in making:
    made = bind(tokenizers, block)(*making[block['name']])
  else:
    raise ValueError(
      f'environment.tokenizer={dict(block)!r}: give directory, or name'
      f' ({" or ".join(making)}) with its hyperparameters'
    )
  tokenizers.check(made, _vocab_size(made), stop_ids=stop_ids)
  return made, (made.eos_token_id,) if stop_ids is None else tuple(stop_ids)


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
