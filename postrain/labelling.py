"""A stage that labels steps: from a policy and questions to a data set.

A program of `postrain.pipeline`: it writes a file of each batch of questions,
so that it goes on where it was stopped, and then one of all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import itertools
import json
import pathlib
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from postrain import data, policies, rewards
from postrain.binding import bind
from postrain.data.buckets import padded
from postrain.keys import run_key
from postrain.losses import monte_carlo_labels
from postrain.policies import Policy
from postrain.reward_models import step_ends
from postrain.rewards.scores import score_completions
from postrain.sampling import extend, sample
from postrain.step_labels import cut_after_steps
from postrain.types import Completion, RewardFn, Samples
from postrain.workdir import replacing

FILE = 'steps.jsonl'


def label_steps(
  *,
  directory: str,
  model: str,
  questions: str,
  reward: Mapping[str, Any],
  separators: Sequence[str],
  max_new_tokens: int,
  max_steps: int,
  prompt: str = 'prompt',
  num_questions: int | None = None,
  num_samples: int = 4,
  num_rollouts: int = 8,
  hard: bool = False,
  temperature: float = 1.0,
  batch_size: int = 8,
  seed: int = 0,
) -> None:
  """Write `steps.jsonl`: completions in steps, each with a Monte-Carlo label.

  A row has ``prompt``, ``completions`` (the texts of the steps), ``labels`` (of
  each, see `postrain.losses.monte_carlo_labels`) and ``reward`` (of the whole).
  It does not depend on the size of a batch, but for the last bits of log-probs.

  Args:
    directory: to write into.
    model: directory of the policy that answers, and goes on behind each step.
    questions: JSON lines.
    reward: block of `postrain.rewards`, with values in [0, 1].
    separators: texts that end a step, as the tokenizer writes them alone.
    max_new_tokens: of a completion.
    max_steps: of a completion; what it says behind them is left out.
    prompt: field of the questions.
    num_questions: the first ones only; None for all.
    num_samples: completions of a question.
    num_rollouts: behind each step.
    hard: whether a step is right (1, else 0) that any rollout ends right.
    temperature: of all samples.
    batch_size: questions at once.
    seed: of the samples.

  Raises:
    ValueError: a number or a separator that cannot be meant, a question that
      leaves no room for an answer, or a reward outside [0, 1].
  """
  _check_sizes(
    max_steps=max_steps, num_samples=num_samples, num_rollouts=num_rollouts,
    batch_size=batch_size,
  )  # fmt: skip
  policy, grade = policies.from_directory(model), bind(rewards, reward)
  rows = data.read_jsonl(
    questions, fields=(prompt,), num_examples=num_questions
  )
  tokens, seen = _prompts(policy, [row[prompt] for row in rows], max_new_tokens)
  draw = _make_draw(
    policy, _separator_ids(policy, separators), max_new_tokens=max_new_tokens,
    max_steps=max_steps, num_samples=num_samples, num_rollouts=num_rollouts,
    temperature=temperature,
  )  # fmt: skip
  keys = run_key(seed, 'sample', 0), run_key(seed, 'sample', 1)
  parts = []
  for start in range(0, len(rows), batch_size):
    parts.append(pathlib.Path(directory, f'part-{start}.jsonl'))
    if parts[-1].exists():
      continue
    numbers = np.arange(start, start + batch_size, dtype=np.int32) % len(rows)
    drawn = draw(policy.params, tokens[numbers], seen[numbers], numbers, *keys)
    asked = [rows[i] for i in numbers for _ in range(num_samples)]
    given = policy, grade, asked, jax.device_get(drawn)
    found = _labelled(*given, max_steps=max_steps, hard=hard)
    lines = [
      json.dumps({'prompt': row[prompt], **each})
      for row, each in zip(asked, found, strict=True)
    ]
    _write(parts[-1], lines[: (len(rows) - start) * num_samples])
  _join(parts, pathlib.Path(directory, FILE))


def _check_sizes(**sizes: int) -> None:
  for name, value in sizes.items():
    if value < 1:
      raise ValueError(f'{name}={value}: it must be at least 1')


def _prompts(
  policy: Policy, texts: Sequence[str], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
  """Questions as tokens of one length, padded on the left."""
  ids, room = [policy.encode(t) for t in texts], policy.room(max_new_tokens)
  length = max(map(len, ids))
  if length > room:
    raise ValueError(
      f'a question has {length} tokens, max_new_tokens={max_new_tokens} leaves'
      f' room for {room}: lower it, or take shorter questions'
    )
  return padded(ids, length=length, pad_id=policy.pad_id, side='left')


def _separator_ids(
  policy: Policy, separators: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
  """Separators as ids, and each single id whose text ends with one.

  A tokenizer may join a separator with what stands before it.
  """
  if not separators or not all(separators):
    raise ValueError(
      f'separators={separators!r}: give at least one text that ends a step'
    )
  encode = functools.partial(policy.tokenizer.encode, add_special_tokens=False)
  special = {*policy.tokenizer.all_special_ids}
  ends = [
    (number,)
    for number in range(len(policy.tokenizer))
    if number not in special
    and policy.tokenizer.decode([number]).endswith(tuple(separators))
  ]
  return tuple(sorted({*ends, *(tuple(encode(x)) for x in separators)}))


def _make_draw(
  policy: Policy, separators: tuple[tuple[int, ...], ...], *,
  max_new_tokens: int, max_steps: int, num_samples: int, num_rollouts: int,
  temperature: float,
) -> Callable[..., tuple[Samples, Array, Samples]]:  # fmt: skip
  """Completions, the ends of their steps, and rollouts behind each."""
  filters: Any = dict(stop_ids=policy.stop_ids, temperature=temperature)

  def draw(
    params: Any, prompts: Array, seen: Array, ids: Array, first: Any, then: Any
  ) -> tuple[Samples, Array, Samples]:
    samples = sample(
      policy.model, params, prompts, seen, first, num_samples=num_samples,
      max_new_tokens=max_new_tokens, pad_id=policy.pad_id, prompt_ids=ids,
      **filters,
    )  # fmt: skip
    ends = step_ends(samples.tokens, samples.mask, separators=separators)
    begun = cut_after_steps(
      samples, ends, max_steps=max_steps, num_rollouts=num_rollouts,
      pad_id=policy.pad_id,
    )  # fmt: skip
    rollouts = extend(
      policy.model, params, prompts, seen, begun, then,
      max_steps=max_new_tokens, prompt_ids=ids, **filters,
    )  # fmt: skip
    return samples, ends, rollouts

  return jax.jit(draw)


def _labelled(
  policy: Policy,
  grade: RewardFn,
  asked: Sequence[dict[str, Any]],
  drawn: tuple[Samples, np.ndarray, Samples],
  *,
  max_steps: int,
  hard: bool,
) -> Iterator[dict[str, Any]]:
  """Steps, labels and reward of each completion."""
  samples, ends, rollouts = drawn
  whole = _rewards(policy, grade, asked, samples)
  num_rollouts = len(rollouts.tokens) // (len(asked) * max_steps)
  repeats = max_steps * num_rollouts
  right = _rewards(
    policy, grade, [row for row in asked for _ in range(repeats)], rollouts
  ).reshape(-1, max_steps, num_rollouts)
  labels = np.asarray(monte_carlo_labels(jnp.asarray(right), hard=hard))
  for row, end, of_row, reward in zip(
    samples.tokens, ends, labels, whole, strict=True
  ):
    places = [0, *(np.flatnonzero(end)[:max_steps] + 1).tolist()]
    steps = [
      policy.decode(row[a:b].tolist()) for a, b in itertools.pairwise(places)
    ]
    yield {
      'completions': steps,
      'labels': of_row[: len(steps)].tolist(),
      'reward': float(reward),
    }


def _rewards(
  policy: Policy, grade: RewardFn, asked: Sequence[Any], samples: Samples
) -> np.ndarray:
  """What the reward says of completions.

  Raises:
    ValueError: something that is no chance.
  """
  ids = [
    row[real].tolist()
    for row, real in zip(samples.tokens, samples.mask, strict=True)
  ]
  completions = [
    Completion(policy.decode(row), row, bool(cut))
    for row, cut in zip(ids, samples.truncated, strict=True)
  ]
  (found,) = score_completions({'reward': grade}, completions, [*asked]).rewards
  if found.min() < 0 or found.max() > 1:
    raise ValueError(
      f'the reward says {found.min()} to {found.max()}: labels are chances to'
      ' be right, take one between 0 and 1'
    )
  return found


def _join(parts: Sequence[pathlib.Path], path: pathlib.Path) -> None:
  _write(path, [x for part in parts for x in part.read_text().splitlines()])
  for part in parts:
    part.unlink()


def _write(path: pathlib.Path, lines: Sequence[str]) -> None:
  with replacing(path) as file:
    file.writelines(f'{line}\n'.encode() for line in lines)
