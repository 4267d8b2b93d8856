"""Rollouts of earlier parameters: carried over, or sampled a step ahead."""

from collections import Counter
from collections.abc import Callable, Iterator
import contextlib
import json
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from postrain import checkpoints, device_loop, reporting, workdir
from postrain.reporting import Report
from postrain.trainer import Trainer

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
  config.rl.num_iterations = 5
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


def groups(directory: pathlib.Path, size: int) -> list[tuple]:
  """Prompt, completions and rewards of each group that trained, in order."""
  found = rows(directory, 'samples')
  drawn = [(r['prompt'], r['completion'], r['reward']) for r in found]
  return [tuple(drawn[i : i + size]) for i in range(0, len(drawn), size)]


def test_what_has_not_ended_is_carried_over(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = carrying(tmp_path)
  trainer = Trainer(config, str(tmp_path / 'run'))
  prepared = versions_of(trainer)
  counts, write = {}, Report.write

  def noting(self: Report, step: int, *rest: Any) -> None:
    counts[step] = len(tiny.compilations)
    write(self, step, *rest)

  monkeypatch.setattr(Report, 'write', noting)
  trainer.run()
  steps, samples = rows(tmp_path / 'run'), rows(tmp_path / 'run', 'samples')
  assert any(row['groups/unfinished'] for row in steps)
  for step, (mask, version) in enumerate(prepared):
    row = steps[step]
    present = mask.any(-1).reshape(4, 2)
    np.testing.assert_array_equal(present[:, 0], present[:, 1])
    assert row['groups/finished'] == present[:, 0].sum()
    assert row['groups/finished'] + row['groups/unfinished'] == 4
    ages = step - version[mask]
    assert row['rollout/staleness'] == pytest.approx(ages.mean())
    assert row['rollout/staleness_max'] == ages.max()
    # Each iteration gave a token, until one group at least had ended.
    assert (np.diff(version, axis=1)[mask[:, 1:]] >= 0).all()
    mine = [each for each in samples if each['step'] == step]
    assert len(mine) == present.sum()
    rewards = np.array([each['reward'] for each in mine]).reshape(-1, 2)
    assert row['reward'] == pytest.approx(rewards.mean())
    # Statistics of the rollout are those of what trains.
    expected = rewards - rewards.mean(-1, keepdims=True)
    np.testing.assert_allclose(
      [each['advantage'] for each in mine],
      (expected / (rewards.std() + 1e-6)).reshape(-1),
      atol=1e-4,
    )
  assert max(row['rollout/staleness_max'] for row in steps) >= 2
  # What the sampler said of a token is what its own parameters said.
  late = [r for r in steps if r['rollout/staleness'] > 0]
  assert max(row['sampler/logprob_gap_max'] for row in late) > 1e-4
  assert steps[0]['sampler/logprob_gap_max'] < 1e-5
  assert len(set(counts.values()) - {counts[0]}) <= 1
  last = max(counts)
  assert tiny.compilations[counts[0] : counts[last]] == []


def test_pieces_of_any_size_are_the_same_completions(
  tmp_path: pathlib.Path,
) -> None:
  found = {}
  for tokens in (1, LIMIT):
    config = carrying(tmp_path, sampling__carry_over=tokens)
    config.rl.optimizer.learning_rate = 0.0
    directory = tmp_path / str(tokens)
    Trainer(config, str(directory)).run()
    found[tokens] = Counter(groups(directory, 2))
    unfinished = [row['groups/unfinished'] for row in rows(directory)]
    assert any(unfinished) == (tokens == 1)
  assert found[1] < found[LIMIT]  # each of them once, no other


def test_a_step_ahead_is_of_the_parameters_before_the_update(
  tmp_path: pathlib.Path,
) -> None:
  trainer = Trainer(ahead(tmp_path), str(tmp_path / 'run'))
  prepared = versions_of(trainer)
  trainer.run()
  for iteration, (mask, version) in enumerate(prepared):
    np.testing.assert_array_equal(version[mask], max(iteration - 1, 0))
  steps = rows(tmp_path / 'run')
  assert [row['rollout/staleness'] for row in steps] == [0, 1, 1, 1]
  gaps = [row['sampler/logprob_gap_max'] for row in steps]
  assert gaps[0] < 1e-5
  assert min(gaps[1:]) > 1e-3


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


@pytest.mark.parametrize(
  'make', [carrying, ahead, pytest.param(both, marks=pytest.mark.slow)]
)
def test_dying_anywhere_changes_no_bit(
  make: Callable[[pathlib.Path], ConfigDict], tmp_path: pathlib.Path
) -> None:
  config = make(tmp_path)

  def run(name: str) -> Any:
    return Trainer(config, str(tmp_path / name)).run()

  whole = run('whole')
  for point, step in (
    ('in_rollout', 1),
    ('between_files', 1),
    ('before_checkpoint', 2),
    ('in_checkpoint', 2),
    ('after_checkpoint', 3),
    ('after_export', config.rl.num_iterations),
  ):
    with dying(point, step):
      run('parts')
  parts = run('parts')
  for left, right in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
    np.testing.assert_array_equal(left, right)
  for name in FILES:
    contents = [(tmp_path / p / name).read_bytes() for p in ('whole', 'parts')]
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
