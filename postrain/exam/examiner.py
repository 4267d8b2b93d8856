"""Sample answers to problems, grade them, and go on where a kill left off."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp

from postrain.data.buckets import bucket, bucket_sizes, padded
from postrain.exam import settings as choices
from postrain.exam.grader import Grader
from postrain.exam.journal import Journal
from postrain.exam.marks import marks
from postrain.exam.problems import Problem
from postrain.exam.settings import Settings
from postrain.keys import run_key
from postrain.policies import Policy
from postrain.sampling import sample
from postrain.types import Completion, Samples
from postrain.workdir import die_at


def examine(
  policy: Policy,
  problems: Sequence[Problem],
  settings: Settings,
  directory: str | os.PathLike[str],
  *,
  report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Answer, grade and mark; the same call again continues.

  Batches are the same in every call and keys are folded from the number of the
  problem, so the files of a run that was killed and continued have the bits of
  one that was not.

  Args:
    policy: whom to examine.
    problems: at least two.
    settings: see `Settings`.
    directory: gets ``answers.jsonl`` (a row for each problem, written as
      batches finish), ``results.json`` and ``config.json``.
    report: called with a line after each batch.

  Returns:
    What stands in ``results.json``, see `marks`.

  Raises:
    ValueError: a setting, problem or directory is wrong; before anything is
      compiled.
  """
  choices.check(settings, len(problems))
  grade = Grader(settings, problems)
  prompts = _encoded(policy, problems, settings)
  asked = json.dumps([prompts, grade.references]).encode()
  identity = {
    'settings': dataclasses.asdict(settings),
    'problems': hashlib.sha256(asked).hexdigest()[:32],
    'weights': policy.fingerprint(),
  }
  journal = Journal(directory, identity, policy.source)
  if journal.rows:
    report(f'continuing after {len(journal.rows)} of {len(problems)} problems')
  answer = _make_answer(policy, settings, prompts, grade)
  for ids, length in _batches(prompts, settings.batch_size):
    if missing := [i for i in ids if i not in journal.rows]:
      rows = answer(ids, length)
      journal.append([rows[i] for i in missing])
      die_at('after_batch', len(journal.rows))
      report(f'{len(journal.rows)}/{len(problems)} problems')
  results = marks(
    [journal.rows[i] for i in range(len(problems))],
    ks=settings.ks,
    votes=grade.votes,
    seed=settings.seed,
  )
  journal.finish(results)
  return results


def _encoded(
  policy: Policy, problems: Sequence[Problem], settings: Settings
) -> list[list[int]]:
  room = policy.room(settings.max_new_tokens)
  prompts = []
  for row, problem in enumerate(problems, start=1):
    text: Any = problem.question
    if settings.template is not None:
      text = settings.template.replace('{question}', text)
    if settings.style == 'chat':
      text = [{'role': 'user', 'content': text}]
      if settings.system is not None:
        text = [{'role': 'system', 'content': settings.system}, *text]
    ids = policy.encode(text)
    if len(ids) > room:
      raise ValueError(
        f'row {row}: the prompt has {len(ids)} tokens, of which {room} leave'
        f' room for max_new_tokens={settings.max_new_tokens}: lower it, or'
        ' remove the row'
      )
    prompts.append(ids)
  return prompts


def _batches(
  prompts: list[list[int]], batch_size: int
) -> Iterator[tuple[list[int], int]]:
  """Numbers of problems whose prompts share a length, and that length."""
  sizes = bucket_sizes(max(map(len, prompts)))
  by_length: dict[int, list[int]] = {size: [] for size in sizes}
  for index, ids in enumerate(prompts):
    by_length[bucket(len(ids), sizes)].append(index)
  for length, indices in by_length.items():
    for start in range(0, len(indices), batch_size):
      yield indices[start : start + batch_size], length


def _make_answer(
  policy: Policy,
  settings: Settings,
  prompts: list[list[int]],
  grade: Grader,
) -> Callable[[list[int], int], dict[int, dict[str, Any]]]:
  """Make ``answer(ids, length) -> {index: row}``."""
  params = jax.device_put(policy.params)
  samplers = _samplers(policy, settings)
  key = run_key(settings.seed, 'evaluation')

  def answer(ids: list[int], length: int) -> dict[int, dict[str, Any]]:
    # A last batch is filled up with its first problem, to keep the shape.
    full = [*ids, *[ids[0]] * (settings.batch_size - len(ids))]
    tokens, mask = padded(
      [prompts[i] for i in full], length=length, pad_id=policy.pad_id,
      side='left',
    )  # fmt: skip
    graded = {'greedy': [], 'samples': [[] for _ in full]}
    for name, draw in samplers.items():
      samples = jax.device_get(
        draw(params, tokens, mask, key, prompt_ids=jnp.asarray(full))
      )
      n = len(samples.tokens) // len(full)
      graded[name] = [
        [
          _graded(policy, samples, place * n + g, index, grade)
          for g in range(n)
        ]
        for place, index in enumerate(ids)
      ]
    return {
      index: {
        'index': index,
        'prompt': policy.tokenizer.decode(prompts[index]),
        'reference': grade.references[index],
        'greedy': graded['greedy'][place][0],
        'samples': graded['samples'][place],
      }
      for place, index in enumerate(ids)
    }

  return answer


def _samplers(policy: Policy, settings: Settings) -> dict[str, Callable]:
  common = functools.partial(
    sample,
    policy.model,
    max_new_tokens=settings.max_new_tokens,
    stop_ids=policy.stop_ids,
    pad_id=policy.pad_id,
  )
  greedy = functools.partial(common, num_samples=1, temperature=0)
  several = functools.partial(
    common,
    num_samples=settings.num_samples,
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    min_p=settings.min_p,
  )
  made = {'greedy': jax.jit(greedy)}
  return made | ({'samples': jax.jit(several)} if settings.num_samples else {})


def _graded(
  policy: Policy, samples: Samples, row: int, index: int, grade: Grader
) -> dict[str, Any]:
  ids = samples.tokens[row][samples.mask[row]].tolist()
  truncated = bool(samples.truncated[row])
  completion = Completion(policy.decode(ids), ids, truncated)
  return {
    'completion': completion.text,
    **grade(completion, index),
    'finish': 'length' if truncated else 'stop',
    'num_tokens': len(ids),
  }
