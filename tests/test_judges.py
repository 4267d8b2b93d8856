"""Reward models among the rewards: what they score, and what is refused."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from postrain import device_loop, hub, tokenizers
from postrain.models.config import Config
from postrain.models.heads import with_labels
from postrain.models.transformer import transformer
from postrain.reward_models import completion_scores
from postrain.trainer import Trainer
from postrain.types import Samples

quick_compiler = tiny.quick_compiler
SHAPE = {k: v for k, v in tiny.transformer().items() if k != 'name'}


def written(
  folder: pathlib.Path, vocab_size: int = 9, num_labels: int = 1,
  tokenizer: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
  """A random reward model in a directory: its functions and parameters."""
  config = Config(vocab_size=vocab_size, **SHAPE)
  shapes = transformer(config).shapes
  draw = np.random.default_rng(0)
  trunk = jax.tree.map(
    lambda x: np.float32(draw.standard_normal(x.shape)), shapes
  )
  config, params = with_labels(config, trunk, num_labels=num_labels)
  params['score'] = np.float32(draw.standard_normal(params['score'].shape))
  hub.save(
    folder, config, params, source={'pad_token_id': 0}, tokenizer=tokenizer
  )
  return transformer(config), params


def sorting(folder: pathlib.Path, **fields: Any) -> ConfigDict:
  """The reward model trains, the exact answer is measured beside it."""
  config = tiny.sort()
  config.rewards = dict(
    judge=dict(
      name='reward_model', directory=str(folder), weight=2.0, **fields
    ),
    exact=dict(name='exact', weight=0.0),
  )
  config.rl.num_iterations = 2
  config.sampling.num_parts = 2
  config.evaluation.update(every=2, num_prompts=5, batch_size=5)
  return config


@pytest.fixture(scope='module')
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple:
  """A run with a reward model: trainer, directory, the model."""
  folder = tmp_path_factory.mktemp('judged')
  model = written(folder / 'model')
  config = sorting(folder / 'model', num_demonstrations=6)
  trainer = Trainer(config, str(folder / 'run'))
  compiled = len(tiny.compilations)
  trainer.run()
  return trainer, folder / 'run', model, tiny.compilations[compiled:]


def test_it_scores_the_completion_behind_its_prompt(judged: tuple) -> None:
  """Other numbers of rows are cut and padded, and shifted alike."""
  trainer, _, (model, params), _ = judged
  environment = trainer.environment
  prompts = environment.held_out(3)
  draw = np.random.default_rng(1)
  tokens = draw.integers(5, size=(9, 3), dtype=np.int32)
  mask = np.arange(3)[None] < draw.integers(1, 4, size=(9, 1))
  flat = np.zeros(tokens.shape, np.float32)
  found = environment.rewards(
    prompts, Samples(tokens, mask, flat, flat, flat[:, 0] > 0)
  )
  assert list(found) == ['exact', 'judge']
  score = jax.jit(lambda *rows: completion_scores(model, params, *rows))
  rows = [
    np.concatenate([np.repeat(x, 3, axis=0), y], axis=1)
    for x, y in ((prompts.tokens, tokens), (prompts.mask, mask))
  ]
  raw = score(*map(jnp.asarray, rows))
  tokens, valid, _ = environment.demonstrations(0, 6, None)
  mean = score(jnp.asarray(tokens), jnp.asarray(valid)).mean()
  assert abs(mean) > 1e-2
  np.testing.assert_allclose(found['judge'], raw - mean, atol=1e-5)


def test_it_trains_what_is_measured_beside_it(judged: tuple) -> None:
  trainer, directory, (_, params), _ = judged
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  for row in map(json.loads, lines[:2]):
    assert row['reward'] == pytest.approx(2 * row['reward/judge'], abs=1e-6)
    assert {'reward/exact', 'reward_std'} <= row.keys()
  assert 'eval/judge' in json.loads(lines[-1])
  (judge,) = trainer._rehearsal.judges.values()
  jax.tree.map(np.testing.assert_array_equal, judge.params, params)


def test_it_is_one_program_that_is_compiled_before_the_first_step(
  judged: tuple,
) -> None:
  *_, compiled = judged
  assert sum('completion_scores' in name for name in compiled) == 1


@pytest.mark.parametrize(
  ('vocab_size', 'num_labels', 'fields', 'message'),
  [(4, 1, {}, 'has 5 ids, the embedding of the reward model 4 rows'),
   (9, 3, {}, 'num_labels=3, no single score'),
   (9, 1, {'dtyp': 'float32'}, "did you mean 'dtype'"),
   (9, 1, {'num_demonstrations': -1}, 'num_demonstrations=-1')],
)  # fmt: skip
def test_a_model_that_does_not_fit(
  vocab_size: int, num_labels: int, fields: dict, message: str,
  tmp_path: pathlib.Path,
) -> None:  # fmt: skip
  written(tmp_path / 'model', vocab_size, num_labels)
  with pytest.raises(ValueError, match=f'rewards.judge.*{message}'):
    Trainer(sorting(tmp_path / 'model', **fields), str(tmp_path / 'run'))


def test_a_model_of_another_tokenizer(tmp_path: pathlib.Path) -> None:
  config = tiny.text(tmp_path)
  own, other = (
    tokenizers.byte_level(special_tokens=more) for more in ((), ('<|x|>',))
  )
  for name, tokenizer in (('own', own), ('other', other)):
    written(tmp_path / name, 262, 1, tokenizer)
    config.rewards = dict(
      judge=dict(
        name='reward_model', directory=str(tmp_path / name), weight=1.0
      ),
      finished=dict(name='finished', weight=0.0),
    )
    if tokenizer is own:
      Trainer(config, str(tmp_path / 'run'))
  with pytest.raises(ValueError, match='is another than that of the env'):
    Trainer(config, str(tmp_path / 'other_run'))


def test_the_device_loop_has_none(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='no reward model; use the trainer'):
    device_loop.run(sorting(tmp_path), seeds=jnp.arange(1))
