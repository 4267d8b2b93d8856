"""Configs that compile in seconds, for tests of whole runs."""

from collections.abc import Iterator
import json
import pathlib
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import base, preferences

LABELS = ('head', 'num_labels')
ROOT = pathlib.Path(__file__).parents[1]

compilations: list[str] = []


def _listen(event: str, seconds: float, **details: object) -> None:
  del seconds
  if event.endswith('backend_compile_duration'):
    compilations.append(str(details.get('fun_name')))


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.fixture(scope='module', autouse=True)
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """Compile each program once, and without care for its speed.

  A module uses it by giving it a name of its own.
  """
  changes = {
    'jax_compilation_cache_dir': str(tmp_path_factory.getbasetemp() / 'xla'),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
    'jax_disable_most_optimizations': True,
  }
  before = {name: jax.config.values[name] for name in changes}
  for values in (changes, before):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    if values is changes:
      yield


def sort() -> ConfigDict:
  """Three groups of four, whole in three steps of the toy policy."""
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='sort', vocab_size=5, length=3)
  )
  config.model = dict(name='sort_policy', embed_dim=4)
  config.rl.share_prompts = False
  config.rewards = dict(
    ordering=dict(name='inclusion_ordering', weight=1.0),
    exact=dict(name='exact', weight=0.5),
  )
  config.sampling.num_samples = 4
  config.sampling.max_new_tokens = 3
  config.rl.num_iterations = 3
  config.rl.num_prompts = 4
  config.rl.optimizer = dict(name='adam', learning_rate=0.02)
  config.evaluation.grader = 'exact'
  config.checkpoint.every = 100
  return config


def arithmetic() -> ConfigDict:
  """A transformer of one layer: supervised steps, then iterations."""
  config = base.get_config()
  config.environment = dict(
    name='task', task=dict(name='arithmetic', num_digits=1)
  )
  config.model = transformer()
  config.rewards = dict(
    digits=dict(name='digits', weight=1.0),
    exact=dict(name='exact', weight=0.5),
  )
  config.sampling.num_samples = 4
  config.sampling.max_new_tokens = 3
  config.sft.num_steps = 2
  config.sft.batch_size = 8
  config.rl.num_iterations = 2
  config.rl.num_prompts = 4
  config.evaluation = dict(
    every=2, grader='exact', threshold=1.0, exploit_threshold=None,
    num_prompts=6, batch_size=4, num_samples=2, ks=(1, 2),
  )  # fmt: skip
  return config


def preference(name: str = 'dpo') -> ConfigDict:
  """Two steps of a method on preferences, by a transformer of one layer."""
  config = preferences.get_config(name)
  scores = {k: config.model[k] for k in LABELS if k in config.model}
  config.model = {**transformer(), **scores}
  config.environment.task.update(num_words=3, completion_length=3)
  config.environment.num_completions = 3
  config.sampling.max_new_tokens = 3
  config.preference.update(num_steps=2, batch_size=4, num_examples=8)
  config.preference.optimizer = dict(name='sgd', learning_rate=1e-3)
  config.evaluation.update(every=2, num_prompts=6, batch_size=4)
  return config


def scores() -> ConfigDict:
  """A reward model of pairs."""
  return preference('bradley_terry')


def text(folder: pathlib.Path) -> ConfigDict:
  """JSON lines, a tokenizer of bytes, rewards of the host."""
  rows = [
    {'question': f'{a}+{b}=', 'answer': f'{a + b}'}
    for a in range(4)
    for b in range(3)
  ]
  config = base.get_config()
  config.environment = dict(
    name='text',
    train=str(json_lines(folder / 'train.jsonl', rows)),
    held_out=str(json_lines(folder / 'test.jsonl', rows[:3])),
    tokenizer=dict(name='byte_level'),
    prompt='question',
    completion='answer',
    max_prompt_length=8,
    max_length=12,
    # Many, so that a fresh model meets one within the limit.
    stop_ids=(1, *range(5, 261, 2)),
  )
  config.model = transformer()
  config.rewards = dict(
    length=dict(name='num_tokens', weight=0.1),
    finished=dict(name='finished', weight=1.0),
  )
  config.sampling.num_samples = 4
  config.sampling.max_new_tokens = 4
  config.sft.batch_size = 4
  config.rl.num_iterations = 1
  config.rl.num_prompts = 2
  config.evaluation.grader = 'finished'
  return config


def transformer() -> dict:
  return dict(
    name='transformer', num_layers=1, model_dim=16, mlp_dim=32, num_heads=2,
    num_kv_heads=1, head_dim=8, max_length=16,
  )  # fmt: skip


def json_lines(path: pathlib.Path, rows: list) -> pathlib.Path:
  path.write_text(
    ''.join(r if isinstance(r, str) else json.dumps(r) + '\n' for r in rows)
  )
  return path


def number(completions: list, examples: list) -> list[float]:
  """The number that a completion writes."""
  return [float(each.text) for each in completions]


# Rewards that fail, named 'tiny:<name>' in a config.


def raising(completions: list, examples: list) -> list[float]:
  raise KeyError('answer')


def undefined(completions: list, examples: list) -> list[float]:
  return [float('nan')] * len(completions)


def short(completions: list, examples: list) -> list[float]:
  return [1.0]


def silent(completions: list, examples: list) -> list[float | None]:
  return [None] * len(completions)
