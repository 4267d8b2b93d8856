"""Rewards in processes of their own: the same bits, and no silence."""

from collections.abc import Iterator
import importlib.util
import os
import pathlib
import sys
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain import environments, sharding
from postrain.binding import bind
from postrain.collection import Collector
from postrain.grading import Judge
from postrain.programs import Programs
from postrain.recipe import make_recipe
from postrain.reporting import Report
from postrain.types import Completion, Samples

BLOCKS = {
  'right': {'name': 'accuracy', 'extract': 'last'},
  'position': {'name': 'judged:position'},
  'fickle': {'name': 'judged:fickle'},
  'process': {'name': 'judged:process'},
}


def rows(num: int, wishes: dict[int, str]) -> tuple[list, list]:
  """Three completions of each prompt."""
  completions = [
    Completion(f'It is {i % 5}' + '.' * (i % 7), [i, 7], i % 2 == 0)
    for i in range(3 * num)
  ]
  examples: list[dict[str, Any]] = [
    {'question': f'What is {i}?', 'answer': str(i % 5)} for i in range(num)
  ]
  for number, wish in wishes.items():
    examples[number]['wish'] = wish
  return completions, examples


@pytest.fixture(scope='module')
def judge() -> Iterator[Judge]:
  judge = Judge(BLOCKS, prompt='question', num_workers=2, timeout=60.0)
  with judge.working():
    yield judge


def test_workers_give_the_bits_of_this_process(judge: Judge) -> None:
  here = Judge(BLOCKS, prompt='question')
  for num in (1, 2, 9):
    completions, examples = rows(num, {})
    theirs = judge(completions, examples)
    groups = [
      here(completions[3 * i : 3 * i + 3], [example])
      for i, example in enumerate(examples)
    ]
    assert [*theirs] == [*BLOCKS]
    for label in ('right', 'position', 'fickle'):
      ours = np.concatenate([group[label] for group in groups])
      assert theirs[label].dtype == ours.dtype
      np.testing.assert_array_equal(theirs[label], ours)
  graders = {int(number) for number in theirs['process']}
  assert os.getpid() not in graders
  assert len(graders) <= 2


def test_all_parts_are_sampled_for_before_one_is_graded(
  judge: Judge, tmp_path: pathlib.Path
) -> None:
  config = tiny.text(tmp_path)
  config.sampling.num_parts = 2
  recipe = make_recipe(config)
  environment = bind(environments, recipe.environment)(0, recipe.rewards)
  events = []

  def sample(params: Any, prompts: Any, *rest: Any) -> Samples:
    events.append('sample')
    tokens = jnp.ones((4 * len(prompts), 2), jnp.int32)
    zeros = jnp.zeros(tokens.shape)
    truncated = jnp.zeros(len(tokens), bool)
    return Samples(tokens, tokens > 0, zeros, zeros, truncated)

  def graded(prompts: Any, samples: Samples) -> dict[str, np.ndarray]:
    events.append('grade')
    completions = [Completion('', [], False)] * len(samples.tokens)
    return judge(completions, [{**e, 'answer': '1'} for e in prompts.examples])

  object.__setattr__(environment, 'rewards', graded)
  programs, report = mock.Mock(spec=Programs), mock.MagicMock(spec=Report)
  programs.sample, report.timer = sample, mock.MagicMock()
  mesh = sharding.make_mesh()
  collector = Collector(recipe, environment, mesh, programs)
  _, _, rewards = collector._attempt({}, 0, report)
  assert events == ['sample', 'sample', 'grade', 'grade']
  np.testing.assert_array_equal(rewards['position'], [0, 1, 2, 3] * 2)
  assert os.getpid() not in rewards['process']


def test_what_a_reward_returns_or_raises_reads_as_in_this_process(
  judge: Judge,
) -> None:
  here = Judge(BLOCKS, prompt='question')
  for wish in ('none', 'raise'):
    told = []
    for each in (judge, here):
      with pytest.raises(ValueError, match=r"^reward 'fickle' r") as error:
        each(*rows(5, {2: wish}))
      told.append(str(error.value))
    assert told[0] == told[1]


def test_a_worker_that_dies_or_hangs() -> None:
  judge = Judge(BLOCKS, prompt='question', num_workers=1, timeout=1.0)
  on = "^reward 'fickle' of the 3 completions of 'What is 2.'"
  processes = []
  with judge.working():
    for wish, message in (
      ('exit', r': the process ended \(exit code 3\)'),
      ('sleep', ' took more than environment.timeout=1.0 seconds: raise it'),
    ):
      judge._start()  # what went before is gone
      processes += [worker._process for worker in judge._workers]
      with pytest.raises(ValueError, match=on + message):
        judge(*rows(5, {2: wish}))
  assert [process.returncode for process in processes] == [3, -9]
  # Without workers this process grades.
  graded = judge(*rows(1, {}))
  np.testing.assert_array_equal(
    graded['process'], np.full(3, os.getpid(), np.float32)
  )


def test_a_worker_that_cannot_import_a_reward(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  judge = Judge(BLOCKS, prompt='question', num_workers=1)
  found = importlib.util.find_spec('judged')
  assert found is not None
  assert found.origin is not None
  here = os.path.dirname(os.path.abspath(found.origin))
  others = [p for p in sys.path if os.path.abspath(p) != here]
  monkeypatch.setattr('sys.path', others)
  monkeypatch.chdir('/')
  with (
    pytest.raises(ValueError, match="'judged:position' cannot be imported"),
    judge.working(),
  ):
    judge(*rows(1, {}))
