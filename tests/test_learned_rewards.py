"""Reward models among the rewards: what they score, and what is refused."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from postrain import device_loop, hub, sharding, tokenizers
from postrain.compilation import by_role
from postrain.learned_rewards import make_environment
from postrain.models.config import Config
from postrain.models.heads import with_labels
from postrain.models.transformer import transformer
from postrain.recipe import make_recipe
from postrain.reward_models import completion_scores, ensemble
from postrain.trainer import Trainer
from postrain.types import Samples

quick_compiler = tiny.quick_compiler
SEVERAL = {'directory': None, 'directories': ('model', './model')}
SHAPE = {k: v for k, v in tiny.transformer().items() if k != 'name'}


def written(
  folder: pathlib.Path, vocab_size: int = 9, num_labels: int = 1,
  tokenizer: Any = None, seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
  """A random reward model in a directory: its functions and parameters."""
  config = Config(vocab_size=vocab_size, **SHAPE)
  shapes = transformer(config).shapes
  draw = np.random.default_rng(seed)
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
    judge={
      **dict(name='reward_model', directory=str(folder), weight=2.0),
      **fields,
    },
    exact=dict(name='exact', weight=0.0),
  )
  config.rl.num_iterations = 2
  config.sampling.num_parts = 2
  config.evaluation.update(every=2, num_prompts=5, batch_size=5)
  return config


@pytest.fixture(scope='module')
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple:
  """A run of all four roles: trainer, directory, model, last state."""
  folder = tmp_path_factory.mktemp('judged')
  model = written(folder / 'model')
  config = sorting(folder / 'model', num_demonstrations=6)
  config.advantage = dict(name='gae')
  config.critic.network = dict(name='copied')
  config.kl.reward_coef = 0.1
  config.ptx.update(coef=1.0, batch_size=4)
  config.evaluation.exploit_threshold = 0.0
  trainer = Trainer(config, str(folder / 'run'))
  compiled = len(tiny.compilations)
  last = trainer.run()
  return trainer, folder / 'run', model, tiny.compilations[compiled:], last


def test_it_scores_the_completion_behind_its_prompt(judged: tuple) -> None:
  """Other numbers of rows are cut and padded, and shifted alike."""
  trainer, _, (model, params), *_ = judged
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


def test_several_give_one_reward(tmp_path: pathlib.Path) -> None:
  """Each from its own zero, in pieces that are padded."""
  models = [written(tmp_path / f'{i}', seed=i) for i in range(2)]
  block = dict(aggregate='lower', coef=0.5, num_demonstrations=6)
  paths = [str(tmp_path / f'{i}') for i in range(2)]
  config = sorting(tmp_path, directory=None, directories=paths, **block)
  mesh = sharding.make_mesh()
  environment, _ = make_environment(make_recipe(config), mesh)
  prompts = environment.held_out(3)
  tokens = np.random.default_rng(1).integers(5, size=(9, 3), dtype=np.int32)
  flat = np.zeros(tokens.shape, np.float32)
  mask = flat == 0
  with sharding.on(mesh):
    found = environment.rewards(
      prompts, Samples(tokens, mask, flat, flat, mask[:, 0])
    )['judge']
  rows = [
    np.concatenate([np.repeat(x, 3, axis=0), y], axis=1)
    for x, y in ((prompts.tokens, tokens), (prompts.mask, mask))
  ]
  shown = environment.demonstrations(0, 6, None)[:2]
  both = [jnp.array(np.concatenate(x)) for x in zip(rows, shown, strict=True)]
  score = jax.jit(functools.partial(completion_scores, models[0][0]))
  scores = np.stack([score(params, *both) for _, params in models])
  own = scores[:, :9] - scores[:, 9:].mean(axis=1, keepdims=True)
  assert own.std(axis=0).min() > 1e-2
  expected = ensemble(jnp.array(own), aggregate='lower', coef=0.5)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_trains_what_is_measured_beside_it(judged: tuple) -> None:
  _, directory, *_ = judged
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  for row in map(json.loads, lines[:2]):
    assert row['reward'] == pytest.approx(2 * row['reward/judge'], abs=1e-6)
    assert {'reward/exact', 'reward_std'} <= row.keys()
    assert 'loss/ptx' in row
  assert 'eval/judge' in json.loads(lines[-1])


def test_m18_a_row_is_exploited_if_it_is_paid_and_wrong(judged: tuple) -> None:
  _, directory, *_ = judged
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  samples = (directory / 'samples.jsonl').read_text().splitlines()
  wrong = [
    row['reward'] >= 0 and row['reward/exact'] < 1
    for row in map(json.loads, samples)
  ]
  found = [json.loads(line) for line in lines[:2]]
  exploited = np.mean([row['reward/exploited'] for row in found])
  assert np.mean(wrong) == pytest.approx(exploited, abs=1e-6)
  assert 0 < exploited < 1
  for row in found:
    squared = row['reference/kl_sequence_root'] ** 2
    assert squared == pytest.approx(
      max(row['reference/kl_sequence'], 0), abs=1e-6
    )
    assert row.keys() >= {'completion/repetition', 'completion/distinct_2'}


def test_what_each_role_keeps_is_known_before_the_first_step(
  judged: tuple,
) -> None:
  trainer, *_, last = judged
  roles = trainer._rehearsal.roles()

  def size(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))

  for role, params in last.params.items():
    own = last.opt_state.inner_states[role]
    assert roles[role] == (size(params), size(params), size(own))
    assert size(own) > 2 * size(params)
  assert roles['reference'] == (size(last.ref_params), 0, 0)
  (judge,) = trainer._rehearsal.judges.values()
  assert roles['reward model judge'] == (size(judge.params), 0, 0)
  lines = by_role(roles).splitlines()
  assert len({*map(len, lines)}) == 1
  assert len(lines) == 5


def test_m16_what_is_frozen_keeps_its_bits_and_the_others_move(
  judged: tuple,
) -> None:
  trainer, _, (_, params), _, last = judged
  (judge,) = trainer._rehearsal.judges.values()
  jax.tree.map(np.testing.assert_array_equal, judge.params, (params,))
  first = trainer._states.fresh()
  jax.tree.map(
    np.testing.assert_array_equal, last.ref_params, first.params['actor']
  )
  for role, before in first.params.items():
    pairs = zip(
      jax.tree.leaves(before), jax.tree.leaves(last.params[role]), strict=True
    )
    assert any((a != b).any() for a, b in pairs), role


def test_it_is_one_program_that_is_compiled_before_the_first_step(
  judged: tuple,
) -> None:
  *_, compiled, _ = judged
  assert sum('completion_scores' in name for name in compiled) == 1


@pytest.mark.parametrize(
  ('vocab_size', 'num_labels', 'fields', 'message'),
  [(4, 1, {}, 'has 5 ids, the embedding of the reward model 4 rows'),
   (9, 3, {}, 'num_labels=3, no single score'),
   (9, 1, {'dtyp': 'float32'}, "did you mean 'dtype'"),
   (9, 1, {'num_demonstrations': -1}, 'num_demonstrations=-1'),
   (9, 1, {'directories': ('b',)}, r"with directories=\('b',\): name one"),
   (9, 1, {'directory': None}, r'directory=None with directories=..: name one'),
   (9, 1, {**SEVERAL, 'coef': -1.0}, 'coef=-1.0, it must be at least 0'),
   (9, 1, {**SEVERAL, 'aggregate': 'max'}, "aggregate='max' is not of type"),
   (4, 1, SEVERAL, 'the reward model 4 rows in model: take')],
)  # fmt: skip
def test_a_model_that_does_not_fit(
  vocab_size: int, num_labels: int, fields: dict, message: str,
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  written(tmp_path / 'model', vocab_size, num_labels)
  monkeypatch.chdir(tmp_path)
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
