"""Rollouts of earlier parameters: carried over, or sampled a step ahead."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import json
import pathlib
from typing import Any, NamedTuple
from unittest import mock

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from postrain import (
  checkpoints,
  device_loop,
  policies,
  reporting,
  sharding,
  workdir,
)
from postrain.actors import Actor
from postrain.algorithm import Algorithm
from postrain.collection import Collector
from postrain.environments import Environment
from postrain.programs import Programs
from postrain.recipe import make_recipe
from postrain.reporting import Report
from postrain.states import States
from postrain.trainer import Trainer
from postrain.types import Prompts, Samples, TrainState

quick_compiler = tiny.quick_compiler

FILES = ('metrics.jsonl', 'samples.jsonl')
LIMIT = 6  # tokens of a completion


def carrying(folder: pathlib.Path, **changes: Any) -> ConfigDict:
  """Texts of which a half ends at each token; a token an iteration."""
  config = tiny.text(folder)
  config.model.max_length = 8 + LIMIT
  config.environment.max_length = 8 + LIMIT
  config.sampling.num_samples = 2
  config.sampling.max_new_tokens = LIMIT
  config.sampling.carry_over = 1
  config.rl.num_prompts = 4
  config.rl.num_iterations = 4
  config.rl.optimizer.learning_rate = 0.01
  config.advantage = dict(name='batch_normalized')
  config.correction = dict(name='truncated')
  config.checkpoint.every = 1
  config.checkpoint.export = False
  return changed(config, changes)


def ahead(folder: pathlib.Path, **changes: Any) -> ConfigDict:
  """The toy policy, one step off-policy."""
  del folder
  config = tiny.sort()
  config.correction = dict(name='truncated')
  config.rl.staleness = 1
  config.rl.num_iterations = 4
  config.checkpoint.every = 1
  return changed(config, changes)


def both(folder: pathlib.Path) -> ConfigDict:
  return carrying(folder, rl__staleness=1)


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
  with config.unlocked():
    for path, value in changes.items():
      block, field = path.split('__')
      config[block][field] = value
  return config


def rows(directory: pathlib.Path, name: str = 'metrics') -> list[dict]:
  lines = (directory / f'{name}.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def versions_of(trainer: Trainer) -> list[tuple[np.ndarray, np.ndarray]]:
  """The mask and the versions of each rollout that the trainer prepares."""
  found, prepare = [], trainer._prepare

  def prepared(*arguments: Any) -> Any:
    found.append(jax.device_get((arguments[4].mask, arguments[4].version)))
    return prepare(*arguments)

  trainer._prepare = prepared
  return found


class Run(NamedTuple):
  """What a whole run left behind."""

  config: ConfigDict
  directory: pathlib.Path
  state: TrainState
  prepared: list[tuple[np.ndarray, np.ndarray]]
  compiled: list[str]  # after the first step


@functools.cache
def whole(make: Callable, folder: pathlib.Path) -> Run:
  """Run a config to its end, once for all tests."""
  folder.mkdir()
  config = make(folder)
  trainer = Trainer(config, str(folder / 'whole'))
  prepared = versions_of(trainer)
  counts, write = {}, Report.write

  def noting(self: Report, step: int, *rest: Any) -> None:
    counts[step] = len(tiny.compilations)
    write(self, step, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Report, 'write', noting)
    state = trainer.run()
  compiled = tiny.compilations[counts[0] : counts[max(counts)]]
  return Run(config, folder / 'whole', state, prepared, compiled)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tmp_path_factory.mktemp('carrying')


def test_what_has_not_ended_is_carried_over(folder: pathlib.Path) -> None:
  run = whole(carrying, folder / 'carrying')
  steps, samples = rows(run.directory), rows(run.directory, 'samples')
  for step, (mask, version) in enumerate(run.prepared):
    row = steps[step]
    present = mask.any(-1).reshape(4, 2)
    np.testing.assert_array_equal(present[:, 0], present[:, 1])
    assert row['groups/finished'] == present[:, 0].sum() >= 1
    assert row['groups/finished'] + row['groups/unfinished'] == 4
    ages = step - version[mask]
    assert row['rollout/staleness'] == pytest.approx(ages.mean())
    assert row['rollout/staleness_max'] == ages.max()
    mine = [each for each in samples if each['step'] == step]
    assert len(mine) == present.sum()
    rewards = np.array([each['reward'] for each in mine]).reshape(-1, 2)
    assert row['reward'] == pytest.approx(rewards.mean())
    # Statistics of the rollout are those of what trains.
    offsets = rewards - rewards.mean(-1, keepdims=True)
    np.testing.assert_allclose(
      [each['advantage'] for each in mine],
      (offsets / (rewards.std() + 1e-6)).reshape(-1),
      atol=1e-4,
    )
  # What the sampler said of a token is what its own parameters said.
  late = [r for r in steps if r['rollout/staleness'] > 0]
  assert max(row['sampler/logprob_gap_max'] for row in late) > 1e-4
  assert steps[0]['sampler/logprob_gap_max'] < 1e-5
  assert run.compiled == []
  # A checkpoint with completions under way is a policy like any other.
  policy = policies.from_run(run.directory, step=3)
  assert policy.source.endswith('step 3')


def test_a_step_ahead_is_of_the_parameters_before_the_update(
  folder: pathlib.Path,
) -> None:
  run = whole(ahead, folder / 'ahead')
  for iteration, (mask, version) in enumerate(run.prepared):
    np.testing.assert_array_equal(version[mask], max(iteration - 1, 0))
  steps = rows(run.directory)
  assert [row['rollout/staleness'] for row in steps] == [0, 1, 1, 1]
  gaps = [row['sampler/logprob_gap_max'] for row in steps]
  assert gaps[0] < 1e-5
  assert min(gaps[1:]) > 1e-3
  assert run.compiled == []


def test_a_step_ahead_without_learning_is_no_step_ahead(
  tmp_path: pathlib.Path,
) -> None:
  told = []
  for staleness in (0, 1):
    config = ahead(tmp_path, rl__staleness=staleness)
    config.rl.optimizer.learning_rate = 0.0
    Trainer(config, str(tmp_path / str(staleness))).run()
    told.append(rows(tmp_path / str(staleness)))
  for plain, late in zip(*told, strict=True):
    assert late.items() >= plain.items()  # the very bits


# The bookkeeping alone: prompts, a sampler and rewards of plain arithmetic.

PLACES, SIZE, STOP, PAD = 3, 2, 1, 0


def length(number: int, sample: int) -> int:
  """Tokens of a completion."""
  return 1 + (5 * number + 3 * sample + number // 4) % LIMIT


def completion(number: int, sample: int) -> list[int]:
  """Full ones end without a stop token, every other one."""
  size = length(number, sample)
  ends = size < LIMIT or number % 2
  tokens = [10 + 7 * number + t for t in range(size)]
  return [*tokens[:-1], STOP] if ends else tokens


def numbers(iteration: int, size: int) -> Prompts:
  """Prompts that hold their number, in as many slots as the iteration."""
  found = np.arange(size, dtype=np.int32) + size * iteration
  tokens = np.repeat(found[:, None], 1 + iteration % 4, axis=1)
  examples = [{'number': int(number)} for number in found]
  return Prompts(tokens, np.ones(tokens.shape, bool), examples)


def counting(
  steps: int, params: Any, tokens: Any, mask: Any, key: Any, ids: np.ndarray,
  samples: Samples, version: np.ndarray,
) -> Samples:  # fmt: skip
  """Stands for the sampler: the next tokens of what a prompt is answered."""
  del params, key
  samples = jax.tree.map(np.array, samples)
  for row in range(PLACES * SIZE):
    number, sample = ids[row // SIZE], row % SIZE
    assert (tokens[row // SIZE][mask[row // SIZE]] == number).all()
    whole, done = completion(number, sample), samples.mask[row].sum()
    new = slice(done, min(done + steps, len(whole)))
    samples.tokens[row, new] = whole[new]
    samples.mask[row, new] = True
    samples.version[row, new] = version
    samples.truncated[row] = samples.mask[row].all() and whole[-1] != STOP
  return jax.tree.map(jax.numpy.asarray, samples)


def collector(steps: int, staleness: int, judge: Callable) -> Collector:
  config = ahead(pathlib.Path(), rl__staleness=staleness)
  config.sampling.update(
    carry_over=steps, num_samples=SIZE, max_new_tokens=LIMIT
  )
  config.rl.update(num_prompts=PLACES, num_iterations=30)
  recipe = make_recipe(config)
  unused = mock.Mock()
  environment = Environment(
    vocab_size=999, pad_id=PAD, stop_ids=(STOP,), prompt_length=4,
    demonstration_length=0, prompts=numbers, held_out=unused,
    demonstrations=None, prompt_lengths=unused, demonstration_lengths=unused,
    rewards=judge, weights={'number': 1.0}, text=unused,
  )  # fmt: skip
  programs, mesh = mock.Mock(spec=Programs), sharding.make_mesh()
  parts = mock.Mock(spec=Actor), mock.Mock(spec=Algorithm)
  programs.states = States(recipe, *parts, mesh)
  programs.extend = functools.partial(counting, steps)
  programs.informative = unused
  return Collector(recipe, environment, mesh, programs)


@pytest.mark.parametrize('staleness', [0, 1])
@pytest.mark.parametrize('steps', [1, 2, LIMIT])
def test_each_group_trains_once_and_whole(steps: int, staleness: int) -> None:
  asked: list[int] = []

  def judge(prompts: Prompts, samples: Samples) -> dict[str, np.ndarray]:
    found = [each['number'] for each in prompts.examples]
    assert len(samples.tokens) == SIZE * len(found)
    asked.extend(found)
    return {'number': np.repeat(np.float32(found), SIZE)}

  collect = collector(steps, staleness, judge)
  report = mock.MagicMock(spec=Report, timer=mock.MagicMock())
  trained, begun, oldest = [], {}, 0
  for iteration in range(30):
    (prompts, samples, rewards), _ = collect.rollout({}, iteration, report)
    for row in np.flatnonzero(samples.mask.any(-1)):
      number = prompts.examples[row // SIZE]['number']
      mask, version = samples.mask[row], samples.version[row]
      assert samples.tokens[row][mask].tolist() == completion(
        number, row % SIZE
      )
      assert rewards['number'][row] == number
      ages = iteration - version[mask]
      assert (np.diff(ages) <= 0).all()
      assert ages.min() >= 0
      oldest = max(oldest, ages.max())
      begun[number] = min(begun.get(number, iteration), version[0])
      trained += [number] * int(row % SIZE == 0)
    left = ~samples.mask.any(-1)
    assert (samples.tokens[left] == PAD).all()
    assert not rewards['number'][left].any()
    assert not samples.truncated[left].any()
  assert asked == trained  # rewards of what has ended alone
  assert sorted({*trained}) == sorted(trained)
  assert collect.carried is None
  missing = {*range(max(trained))} - {*trained}
  assert len(missing) < PLACES  # what was under way at the end
  # Prompts begin in their order.
  starts = [begun[number] for number in sorted(begun)]
  assert starts == sorted(starts)
  assert (oldest == staleness) == (steps == LIMIT)


class Stop(BaseException):
  """Stands for whatever ends a process."""


@contextlib.contextmanager
def dying(point: str, step: int) -> Iterator[None]:
  """Have `workdir.die_at` end what is under way at a point."""

  def die_at(at: str, number: int) -> None:
    if (at, number) == (point, step):
      raise Stop

  with pytest.MonkeyPatch.context() as patch:
    for module in (workdir, reporting, checkpoints):
      patch.setattr(module, 'die_at', die_at)
    with pytest.raises(Stop):
      yield


POINTS = (
  ('in_rollout', 1),
  ('between_files', 1),
  ('before_checkpoint', 2),
  ('in_checkpoint', 2),
  ('after_checkpoint', 3),
  ('after_export', 4),
)


@pytest.mark.parametrize(
  ('make', 'points'),
  [
    (carrying, POINTS[2:4]),
    (ahead, POINTS),
    pytest.param(both, POINTS, marks=pytest.mark.slow),
  ],
)
def test_dying_anywhere_changes_no_bit(
  make: Callable, points: Sequence, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  run = whole(make, folder / make.__name__)
  for point, step in points:
    with dying(point, step):
      Trainer(run.config, str(tmp_path)).run()
  state = Trainer(run.config, str(tmp_path)).run()
  pairs = zip(*map(jax.tree.leaves, (run.state, state)), strict=True)
  for left, right in pairs:
    np.testing.assert_array_equal(left, right)
  for name in FILES:
    contents = [
      (path / name).read_bytes() for path in (run.directory, tmp_path)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize('make', [carrying, ahead])
def test_the_device_loop_refuses(
  make: Callable, tmp_path: pathlib.Path
) -> None:
  config = tiny.sort()
  other = make(tmp_path)
  config.rl.staleness = other.rl.staleness
  config.sampling.carry_over = other.sampling.carry_over
  with pytest.raises(ValueError, match='or use the trainer'):
    device_loop.run(config, seeds=jax.numpy.arange(1))
