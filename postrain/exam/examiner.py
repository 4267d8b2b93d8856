"""Sample answers to problems, grade them, and go on where a kill left off."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from postrain import rewards, workdir
from postrain.binding import bind
from postrain.data.buckets import bucket, bucket_sizes, padded
from postrain.exam.marks import marks
from postrain.exam.problems import Problem
from postrain.keys import run_key
from postrain.policies import Policy, check_sampling
from postrain.rewards.answers import READERS, make_reader, reference_answer
from postrain.rewards.statements import Extract
from postrain.sampling import sample
from postrain.types import Completion, Samples

ROWS, RESULTS, CONFIG = 'answers.jsonl', 'results.json', 'config.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How problems are put, and how answers are drawn and graded.

  Attributes:
    style: ``plain`` text, or ``chat`` through the tokenizer's template.
    template: text around the question, with ``{question}`` in its place.
    system: system message of a chat.
    num_samples: drawn beside the greedy answer; 0 for none.
    ks: of pass@k.
    batch_size: problems that are sampled at once.
    grader: one of ``READERS``, another reward by name, or 'module:function';
      a completion is correct where the reward is at least 1.
    extract: where an answer is stated, see `postrain.rewards.statements`.
    marker: introduces an answer.
  """

  style: Literal['plain', 'chat'] = 'plain'
  template: str | None = None
  system: str | None = None
  max_new_tokens: int = 512
  num_samples: int = 0
  ks: tuple[int, ...] = ()
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  seed: int = 0
  batch_size: int = 16
  grader: str = 'accuracy'
  extract: Extract = 'any'
  marker: str = '####'


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
  _check(settings, len(problems))
  grade = _grader(settings, problems)
  prompts = _prompts(policy, problems, settings)
  root = pathlib.Path(directory)
  _claim(root, policy, settings, prompts, grade)
  rows = {row['index']: row for row in _stored_rows(root / ROWS)}
  if rows:
    report(f'{root}: continuing after {len(rows)} of {len(problems)} problems')
  draw = _make_draw(policy, settings)
  with open(root / ROWS, 'ab') as file:
    for ids, length in _batches(prompts, policy, settings):
      missing = [i for i in ids if i not in rows]
      if not missing:
        continue
      new = draw(prompts, ids, length, grade)
      rows |= {i: new[i] for i in missing}
      lines = [json.dumps(new[i], ensure_ascii=False) + '\n' for i in missing]
      file.write(''.join(lines).encode('utf-8', 'surrogatepass'))
      file.flush()
      os.fsync(file.fileno())
      workdir.die_at('after_batch', len(rows))
      report(f'{len(rows)}/{len(problems)} problems')
  results = marks(
    [rows[i] for i in range(len(problems))],
    ks=settings.ks,
    votes=settings.grader in READERS,
    seed=settings.seed,
  )
  workdir.write_json(str(root / RESULTS), results)
  return results


def _check(settings: Settings, num_problems: int) -> None:
  names = ('seed', 'temperature', 'top_k', 'top_p', 'min_p')
  check_sampling(**{name: getattr(settings, name) for name in names})
  for name, least in (('num_samples', 0), ('batch_size', 1)):
    if (value := getattr(settings, name)) < least:
      raise ValueError(f'{name}={value}: it must be at least {least}')
  for k in settings.ks:
    if not 1 <= k <= settings.num_samples:
      raise ValueError(
        f'k={k}: pass@k needs k in [1, num_samples={settings.num_samples}]:'
        ' draw more samples or lower k'
      )
  if num_problems < 2:
    raise ValueError(
      f'{num_problems} problems have no spread: examine on at least 2'
    )
  if settings.template is not None and '{question}' not in settings.template:
    raise ValueError(
      f'template={settings.template!r} needs {{question}} in it, where the'
      ' question goes'
    )
  if settings.system is not None and settings.style == 'plain':
    raise ValueError("system needs style='chat'; a plain prompt has no roles")
  if not settings.marker.strip():
    raise ValueError(f'marker={settings.marker!r}: give a text, like ####')


# Prompts and grades.


class _Grader:
  """Answers of completions, and whether they are right."""

  def __init__(self, settings: Settings, problems: Sequence[Problem]):
    name, self.read = settings.grader, None
    if name in READERS:
      self.read = make_reader(
        name, extract=settings.extract, marker=settings.marker
      )
      self.references = [
        str(reference_answer(name, {'answer': p.answer}, row, field='answer',
                             marker=settings.marker))
        for row, p in enumerate(problems, start=1)
      ]  # fmt: skip
    else:
      self.references = [p.answer for p in problems]
      self._reward = bind(rewards, {'name': name})
      self._examples = [p._asdict() for p in problems]

  def __call__(self, completion: Completion, index: int) -> dict[str, Any]:
    if self.read is None:
      [reward] = self._reward([completion], [self._examples[index]])
      return {'answer': None, 'correct': bool(reward >= 1)}
    answer = self.read(completion.text)
    answer = None if answer is None else str(answer)
    return {'answer': answer, 'correct': answer == self.references[index]}


def _grader(settings: Settings, problems: Sequence[Problem]) -> _Grader:
  if settings.grader in ('code', 'humaneval', 'mbpp', 'unit_tests'):
    raise ValueError(
      f'grader={settings.grader!r} would run code that a model wrote, and there'
      f' is no sandbox: take one of {", ".join(READERS)}'
    )
  return _Grader(settings, problems)


def _prompts(
  policy: Policy, problems: Sequence[Problem], settings: Settings
) -> list[list[int]]:
  room = policy.room(settings.max_new_tokens)
  prompts = []
  for row, problem in enumerate(problems, start=1):
    text: Any = problem.question
    if settings.template is not None:
      text = settings.template.replace('{question}', text)
    if settings.style == 'chat':
      system = {'role': 'system', 'content': settings.system}
      text = [{'role': 'user', 'content': text}]
      text = text if settings.system is None else [system, *text]
    ids = policy.encode(text)
    if len(ids) > room:
      raise ValueError(
        f'row {row}: the prompt has {len(ids)} tokens, of which {room} leave'
        f' room for max_new_tokens={settings.max_new_tokens}: lower it, or'
        ' remove the row'
      )
    prompts.append(ids)
  return prompts


# Batches of few shapes.


def _batches(
  prompts: list[list[int]], policy: Policy, settings: Settings
) -> Iterator[tuple[list[int], int]]:
  """Numbers of problems whose prompts share a length, and that length."""
  longest = max(map(len, prompts))
  by_length: dict[int, list[int]] = {}
  for index, ids in enumerate(prompts):
    length = bucket(len(ids), bucket_sizes(longest))
    by_length.setdefault(length, []).append(index)
  for length in sorted(by_length):
    ids = by_length[length]
    for start in range(0, len(ids), settings.batch_size):
      yield ids[start : start + settings.batch_size], length


def _make_draw(policy: Policy, settings: Settings) -> Callable[..., dict]:
  """Make ``draw(prompts, ids, length, grade) -> {index: row}``."""
  params = jax.device_put(policy.params)
  common = functools.partial(
    sample,
    policy.model,
    max_new_tokens=settings.max_new_tokens,
    stop_ids=policy.stop_ids,
    pad_id=policy.pad_id,
  )
  samplers = [jax.jit(functools.partial(common, num_samples=1, temperature=0))]
  if settings.num_samples:
    several = functools.partial(
      common,
      num_samples=settings.num_samples,
      temperature=settings.temperature,
      top_k=settings.top_k,
      top_p=settings.top_p,
      min_p=settings.min_p,
    )
    samplers.append(jax.jit(several))
  key = run_key(settings.seed, 'evaluation')

  def draw(
    prompts: list[list[int]], ids: list[int], length: int, grade: _Grader
  ) -> dict[int, dict[str, Any]]:
    # A last batch is filled up with its first problem, to keep the shape.
    full = [*ids, *[ids[0]] * (settings.batch_size - len(ids))]
    tokens, mask = padded(
      [prompts[i] for i in full], length=length, pad_id=policy.pad_id,
      side='left',
    )  # fmt: skip
    drawn = [
      jax.device_get(f(params, tokens, mask, key, prompt_ids=jnp.asarray(full)))
      for f in samplers
    ]
    rows = {}
    for place, index in enumerate(ids):
      greedy, *sampled = [
        [
          _answer(policy, samples, place * n + g, index, grade)
          for g in range(n)
        ]
        for samples in drawn
        if (n := len(samples.tokens) // len(full))
      ]
      rows[index] = {
        'index': index,
        'prompt': policy.tokenizer.decode(prompts[index]),
        'reference': grade.references[index],
        'greedy': greedy[0],
        'samples': sampled[0] if sampled else [],
      }
    return rows

  return draw


def _answer(
  policy: Policy, samples: Samples, row: int, index: int, grade: _Grader
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


# The directory.


def _claim(
  root: pathlib.Path,
  policy: Policy,
  settings: Settings,
  prompts: list[list[int]],
  grade: _Grader,
) -> None:
  """Make the directory, or check that it is of the same examination."""
  asked = json.dumps([prompts, grade.references]).encode()
  identity = json.loads(json.dumps({
    'settings': dataclasses.asdict(settings),
    'problems': hashlib.sha256(asked).hexdigest()[:32],
    'weights': policy.fingerprint(),
  }))  # fmt: skip
  path = root / CONFIG
  if path.exists():
    try:
      there = json.loads(path.read_text(encoding='utf-8'))['identity']
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f'{path} is of no examination: take another output directory'
      ) from error
    if differing := workdir.differences(there, identity):
      raise ValueError(
        f'{root} holds an examination of another configuration:'
        f' {"; ".join(differing)}. Take another output directory, or the same'
        ' configuration'
      )
    return
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f'{root} cannot be made ({error.strerror}): take another output directory'
    ) from error
  if any(root.iterdir()):
    raise ValueError(
      f'{root} is not empty and holds no examination: take another output'
      ' directory'
    )
  workdir.write_json(str(path), {
    'identity': identity,
    'policy': policy.source,
    'commit': workdir.commit(),
    'versions': {p: importlib.metadata.version(p) for p in workdir.PACKAGES},
  })  # fmt: skip


def _stored_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of an earlier call; a line that a kill tore is cut off."""
  if not path.exists():
    return []
  content = path.read_bytes()
  whole = content[: content.rfind(b'\n') + 1]
  if len(whole) < len(content):
    os.truncate(path, len(whole))
  try:
    return [json.loads(line) for line in whole.splitlines()]
  except ValueError as error:
    raise ValueError(
      f'{path} has a line that is no JSON ({error}): it was changed by'
      ' something else; take another output directory'
    ) from error
