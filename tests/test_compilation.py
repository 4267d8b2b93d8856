"""What is compiled before the first step is all that a run compiles."""

from collections.abc import Iterator
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from postrain import compilation, sharding
from postrain.reporting import Report
from postrain.trainer import Trainer

quick_compiler = tiny.quick_compiler

CACHE = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
  'jax_persistent_cache_min_entry_size_bytes',
  'jax_enable_compilation_cache',
)


@pytest.fixture
def cache_settings() -> Iterator[None]:
  before = {name: jax.config.values[name] for name in CACHE}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.usefixtures('cache_settings')
def test_the_cache_lies_where_it_is_asked_for(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  jax.config.update('jax_compilation_cache_dir', None)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  own = str(tmp_path / 'postrain' / 'xla')
  assert compilation.use_cache() == own
  assert [jax.config.values[name] for name in CACHE] == [own, 0.0, -1, True]
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'jax'))
  assert compilation.use_cache() == str(tmp_path / 'jax')
  jax.config.update('jax_enable_compilation_cache', False)
  assert compilation.use_cache() is None


@pytest.mark.usefixtures('cache_settings')
def test_a_cache_that_cannot_be_written_is_done_without(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
  (tmp_path / 'file').touch()
  assert compilation.use_cache(str(tmp_path / 'file' / 'xla')) is None
  assert 'JAX_COMPILATION_CACHE_DIR' in capsys.readouterr().err
  assert not jax.config.values['jax_enable_compilation_cache']


@pytest.mark.parametrize(
  ('size', 'text'),
  [(0, '0 B'), (999, '999 B'), (1876, '1.88 kB'), (24_400_000, '24.4 MB')],
)
def test_bytes_for_people(size: int, text: str) -> None:
  assert compilation.readable(size) == text


def test_a_run_that_does_not_fit_ends_before_its_first_step(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
  config = tiny.sort()
  config.machine.memory_limit = 2000
  message = (
    r'update\[3\] needs \d+ bytes .* limit is 2000: try a larger'
    r' rl.num_micro_batches, model.remat=\w+, mesh.fsdp$'
  )
  with pytest.raises(ValueError, match=message):
    Trainer(config, str(tmp_path / 'run')).run()
  assert not (tmp_path / 'run').exists()
  assert 'has 2 kB' in capsys.readouterr().out


def written(folder: pathlib.Path, num_iterations: int) -> ConfigDict:
  """Two stages over prompts of 4 to 24 tokens, greedy baselines, exams."""
  config = tiny.text(folder)
  rows = [
    {'question': f'{a}+{b}=' + '?' * (3 * (a % 5)), 'answer': f'{a + b}'}
    for a in range(8)
    for b in range(3)
  ]
  tiny.json_lines(folder / 'train.jsonl', rows)
  config.environment.max_prompt_length = 24
  config.environment.max_length = 32
  config.model.max_length = 32
  config.sft.num_steps, config.sft.batch_size = 2, 2
  config.rl.num_iterations, config.rl.num_prompts = num_iterations, 2
  config.advantage = dict(name='remax')
  config.kl.loss_coef = 0.1
  config.ptx.update(coef=0.1, batch_size=2)
  config.evaluation = dict(
    every=3, grader='finished', threshold=1.0, exploit_threshold=None,
    num_prompts=3, batch_size=2, num_samples=2, ks=(1, 2),
  )  # fmt: skip
  return config


@pytest.mark.parametrize(
  'num_iterations', [5, pytest.param(200, marks=pytest.mark.slow)]
)
def test_nothing_is_compiled_after_the_first_step(
  num_iterations: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  trainer = Trainer(written(tmp_path, num_iterations), str(tmp_path / 'run'))
  counts, slots, write = {}, set(), Report.write

  def noting(self: Report, step: int, *rest: Any) -> None:
    counts[step] = len(tiny.compilations)
    write(self, step, *rest)

  prepare = trainer._prepare

  def prepared(*arguments: Any) -> Any:
    slots.add(arguments[2].shape[1])
    return prepare(*arguments)

  monkeypatch.setattr(Report, 'write', noting)
  trainer._prepare = prepared
  trainer.run()
  assert len(slots) > 1
  (last,) = {count for step, count in counts.items() if step >= 1}
  assert tiny.compilations[counts[0] : last] == []


def test_only_what_a_run_needs_is_compiled(tmp_path: pathlib.Path) -> None:
  config = written(tmp_path, 5)
  trainer = Trainer(config, str(tmp_path / 'whole'))

  def names(start: int) -> set[str]:
    with sharding.on(trainer.mesh):
      return {
        p.name.partition('[')[0] for p in trainer._rehearsal.needed(start)
      }

  iteration = {'sample', 'greedy', 'prepare', 'update', 'minibatches', 'merge'}
  iteration |= {'informative'}  # and no move of a frozen reference
  exams = {'evaluate greedy', 'evaluate samples'}
  assert names(0) == iteration | exams | {'imitate', 'begin'}
  assert names(2) == iteration | exams | {'begin'}
  assert names(3) == iteration | exams
  lengths = trainer.environment.prompt_lengths(range(5), 2)
  assert lengths == {
    trainer.environment.prompts(i, 2).tokens.shape[1] for i in range(5)
  }


class Fetches:
  """Notes each time that the host waits for an array of the device."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self.events: list[str] = []
    array = type(jnp.zeros(1))
    value = array._value

    def valued(this: jax.Array) -> np.ndarray:
      self.events.append('fetch')
      return value.fget(this)

    monkeypatch.setattr(array, '_value', property(valued))
    # NumPy reads memory of the CPU without asking the array.
    for name in ('asarray', 'array', 'stack', 'concatenate'):
      monkeypatch.setattr(np, name, self._noted(getattr(np, name)))

  def _noted(self, fn: Any) -> Any:
    def noted(first: Any, *rest: Any, **options: Any) -> Any:
      several = first if isinstance(first, list | tuple) else [first]
      if any(isinstance(each, jax.Array) for each in several):
        self.events.append('fetch')
      return fn(first, *rest, **options)

    return noted


def test_fetches_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
  array = jax.jit(lambda x: x + 1)(np.ones(2))
  fetches = Fetches(monkeypatch)
  array.copy_to_host_async()
  assert fetches.events == []
  for fetch in (np.asarray, jax.device_get, bool, lambda x: np.stack([x])):
    before = len(fetches.events)
    fetch(array[:1] + 1)
    assert len(fetches.events) > before


def test_a_step_waits_for_tokens_and_rewards_alone(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = tiny.sort()
  config.kl.loss_coef = 0.1
  config.rl.num_minibatches = 2
  trainer = Trainer(config, str(tmp_path))
  fetches = Fetches(monkeypatch)
  programs = trainer._programs
  for name in ('sample', 'merge'):
    run = getattr(programs, name)

    def noted(*arguments: Any, run: Any = run, name: str = name) -> Any:
      fetches.events.append(name)
      return run(*arguments)

    noted.trace = run.trace
    monkeypatch.setattr(programs, name, noted)
  judge = trainer.environment.rewards

  def judged(*arguments: Any) -> Any:
    rewards = judge(*arguments)
    fetches.events.append('rewarded')
    return rewards

  object.__setattr__(trainer.environment, 'rewards', judged)
  trainer.run()
  steps = ' '.join(fetches.events).split('rewarded')
  # From the rewards of one step to the samples of the next: two updates.
  for step in steps[1:-1]:
    assert step.startswith(' merge sample fetch'), step
