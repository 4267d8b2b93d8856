"""The stage on preferences: its step by hand, its end, and every method."""

import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from configs import preferences
from postrain import (
  environments,
  hub,
  losses,
  objectives,
  optimizers,
  trainer,
)
from postrain.aggregation import token_mean
from postrain.batches import weigh_units
from postrain.environments import Units, rows_of
from postrain.models.config import Config
from postrain.models.heads import with_labels
from postrain.models.transformer import transformer
from postrain.preferring import make_preferring
from postrain.recipe import make_recipe
from postrain.scoring import score
from postrain.train_step import finish, make_train_step
from postrain.trainer import Trainer
from postrain.types import Batch, Model, TrainState

quick_compiler = tiny.quick_compiler
SLOW = pytest.mark.slow


def figures(directory: pathlib.Path) -> list[dict]:
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def close(left: Any, right: Any, atol: float = 1e-6) -> None:
  for one, two in zip(*map(jax.tree.leaves, (left, right)), strict=True):
    np.testing.assert_allclose(one, two, atol=atol)


START = {
  'dpo': math.log(2), 'robust': math.log(2), 'hinge': 1.0, 'ipo': 25.0,
  'kto': 0.5, 'bradley_terry': math.log(2), 'plackett_luce': math.log(6),
}  # fmt: skip


@functools.cache
def learner(scores: bool) -> tuple[Model, Any]:
  shape = {k: v for k, v in tiny.transformer().items() if k != 'name'}
  config = Config(vocab_size=5, **shape)
  params = jax.jit(transformer(config).init)(jax.random.key(0))
  if scores:
    config, params = with_labels(config, params)
  return transformer(config), {'actor': params}


@functools.cache
def units(kind: str) -> Units:
  environment = tiny.preference().environment.to_dict()
  del environment['name']
  rewards = {'gold': {'name': 'gold', 'weight': 1.0}}
  made = environments.task(0, rewards, **environment).preferences(kind)
  return Units(*jax.tree.map(jnp.asarray, tuple(made.units(0, 4, 8))))


def stepping(config: ConfigDict) -> tuple[Any, TrainState]:
  """A jitted step on the units of a config, and the state before it."""
  recipe = make_recipe(config)
  model, params = learner(recipe.preference.learns == 'reward_model')
  made = make_preferring(recipe, model, prompt_length=2)
  reference = params['actor'] if made.uses_reference else None
  data = units(recipe.preference.data)
  step = jax.jit(lambda state: made.prefer(state, reference, *data))
  return step, TrainState(0, params, made.optimizer.init(params))


@pytest.mark.parametrize('name', preferences.NAMES)
def test_every_method_learns_its_units(name: str) -> None:
  step, state = stepping(tiny.preference(name))
  losses = []
  for _ in range(2):
    state, told = step(state)
    losses.append(finish(told)['loss'])
  assert losses[0] == pytest.approx(START.get(name, losses[0]), rel=1e-5)
  assert losses[1] < losses[0]


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name == 'plackett_luce' else SLOW)
    for name in preferences.NAMES
  ],
)
def test_every_method_runs(name: str, tmp_path: pathlib.Path) -> None:
  state = Trainer(tiny.preference(name), str(tmp_path)).run()
  first, second, last = figures(tmp_path)
  assert all(map(math.isfinite, [*first.values(), *last.values()]))
  held_out = {'eval/pair_accuracy', 'eval/pair_margin', 'eval/pair_ece'}
  assert held_out <= first.keys() & last.keys()
  assert held_out.isdisjoint(second)
  scores = name in preferences.REWARD_MODELS
  assert ('eval/gold' in last) != scores
  head = 'sequence_labels' if scores else 'language_model'
  loaded = hub.load(tmp_path / 'export', head=head)
  close(loaded.params, state.params['actor'], atol=0)


def test_a_step_is_its_objective_and_an_update() -> None:
  config = tiny.preference()
  config.preference.sft_coef = 0.5
  step, state = stepping(config)
  model, params = learner(scores=False)
  objective = objectives.preference(
    model, loss=functools.partial(losses.dpo, beta=0.1), sft_coef=0.5
  )
  optimizer = optimizers.sgd(learning_rate=1e-3)

  def by_hand(state: TrainState) -> TrainState:
    tokens, valid, mask, _ = units('pairs')
    reference = score(model, params['actor'], tokens, valid, mask).logprobs
    batch = Batch(
      tokens, valid, mask, {}, {'ref_logprobs': reference}, unit_size=2
    )
    batch = weigh_units(batch, sft_aggregation=token_mean)
    return make_train_step(objective, optimizer)(state, {}, batch)[0]

  close(step(state)[0], jax.jit(by_hand)(state))


@pytest.mark.parametrize('name', ['dpo', 'kto', 'plackett_luce'])
def test_micro_batches_change_nothing(name: str) -> None:
  found = []
  for number in (1, 2):
    config = tiny.preference(name)
    config.preference.num_micro_batches = number
    step, state = stepping(config)
    state, told = step(state)
    found.append((state.params, told['loss']))
  close(*found)


def staged(num_iterations: int) -> ConfigDict:
  """A supervised step, two on preferences, then iterations."""
  config = tiny.preference()
  config.sft.update(num_steps=1, batch_size=4)
  config.rl.update(num_iterations=num_iterations, num_prompts=2)
  config.sampling.num_samples = 2
  config.kl.loss_coef = 0.1
  config.evaluation.every = 2 * (num_iterations > 0)
  config.preference.optimizer.learning_rate = 0.1
  config.checkpoint.every = 1
  config.checkpoint.export = False
  return config


class Killed(Exception):
  """Stands for the end of a process."""


@pytest.mark.parametrize(
  ('num_iterations', 'deaths'),
  [(0, (2,)), pytest.param(2, (1, 2, 3), marks=SLOW)],
)
def test_stages_follow_and_a_resumed_run_has_the_same_bits(
  num_iterations: int, deaths: tuple, tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  whole, config = tmp_path / 'whole', staged(num_iterations)
  expected = Trainer(config, str(whole)).run()
  rows = figures(whole)
  assert rows[1]['loss'] == pytest.approx(math.log(2), abs=1e-6)
  assert abs(rows[2]['loss'] - math.log(2)) > 1e-6
  if num_iterations:  # the reference of the iterations is the policy they meet
    assert rows[3]['reference/kl_sequence'] == pytest.approx(0, abs=1e-5)

  def die_at(at: str, number: int) -> None:
    if (at, number) == ('after_checkpoint', death):
      raise Killed

  for death in deaths:  # before, inside and after the stage
    killed = tmp_path / f'killed{death}'
    with monkeypatch.context() as patch:
      patch.setattr(trainer.workdir, 'die_at', die_at)
      with pytest.raises(Killed):
        Trainer(config, str(killed)).run()
    close(Trainer(config, str(killed)).run(), expected, atol=0)
    for name in ('metrics.jsonl', 'samples.jsonl')[: 1 + bool(num_iterations)]:
      files = [folder / name for folder in (killed, whole)]
      assert files[0].read_bytes() == files[1].read_bytes()


ROWS: dict[str, list[dict]] = {
  'pairs': [
    dict(
      prompt='1+1=' * (1 + n % 3),
      chosen='2' * (n + 1),
      rejected='no',
      preference=1 - 0.1 * n,
    )
    for n in range(6)
  ],
  'rankings': [
    dict(prompt='a', completions=list('bcd'[: 2 + n]), ranks=[0, 1, 2][: 2 + n])
    for n in range(2)
  ],
  'unpaired': [
    dict(prompt='ab' * n, completion='c' * (4 - n), label=n > 1)
    for n in (1, 2, 3)
  ],
}


def written(kind: str, folder: pathlib.Path) -> ConfigDict:
  """Preferences in files, and a method that reads them."""
  config = tiny.text(folder)
  for name, rows in (('seen', ROWS[kind]), ('unseen', ROWS['pairs'][:2])):
    tiny.json_lines(folder / f'{name}.jsonl', rows)
  config.environment.preferences = dict(
    train=str(folder / 'seen.jsonl'),
    held_out=str(folder / 'unseen.jsonl'),
    ties='error',
  )
  config.environment.max_prompt_length = 12
  config.environment.max_length = config.model['max_length'] = 24
  config.rl.num_iterations = 0
  config.preference = tiny.preference().preference
  config.preference.num_examples = None
  config.preference.data = kind
  config.evaluation.update(every=2, num_prompts=3, batch_size=2)
  if kind == 'unpaired':
    config.preference.loss = dict(name='kto')
  if kind == 'rankings':
    config.preference.learns = 'reward_model'
    config.preference.loss = dict(name='ranked_pairs')
    config.model.update(head='sequence_labels', num_labels=1)
  return config


@pytest.mark.parametrize('kind', ROWS)
def test_preferences_of_a_file(kind: str, tmp_path: pathlib.Path) -> None:
  config = written(kind, tmp_path)
  made = Trainer(config, str(tmp_path / 'run'))  # traces a step on its shapes
  units = made.environment.preferences(kind)
  size, decode = units.unit_size, made.environment.text
  several = [units.units(step, 2, None) for step in range(6)]
  for drawn in several:
    assert len(drawn.tokens) == 2 * size
    dtypes = {name: array.dtype for name, array in drawn.arrays.items()}
    assert dtypes == units.dtypes
  for step, drawn in enumerate(several):
    rows = rows_of(units.all_units(None), units.numbers(step, 2, None), size)
    assert (rows.tokens[:, : drawn.tokens.shape[1]] == drawn.tokens).all()
  lengths = {drawn.tokens.shape[1] for drawn in several}
  assert lengths == units.lengths(range(6), 2, None)
  assert max(lengths) <= units.length
  seen = {
    decode(row[real]) for drawn in several
    for row, real in zip(drawn.tokens, drawn.mask, strict=True)
  }  # fmt: skip
  asked = {'pairs': '2', 'rankings': 'd', 'unpaired': 'ccc'}[kind]
  assert any(text.startswith(asked) for text in seen)
  assert units.units(1, 2, 2).tokens.shape[0] == 2 * size
  assert units.held_out(3).tokens.shape[0] == 6
  if kind == 'unpaired':
    for drawn in several:
      assert (drawn.mask.argmax(1) == 12).all()
      assert not drawn.mask[:, :12].any()
      assert drawn.valid[:, 11:13].all()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ROWS)
def test_a_run_on_a_file(kind: str, tmp_path: pathlib.Path) -> None:
  Trainer(written(kind, tmp_path), str(tmp_path / 'run')).run()
  rows = figures(tmp_path / 'run')
  assert all(math.isfinite(row['loss']) for row in rows[:2])
  assert 'eval/pair_ece' in rows[-1]


def test_files_that_do_not_fit(tmp_path: pathlib.Path) -> None:
  config = written('unpaired', tmp_path)
  config.environment.max_prompt_length = 8
  tiny.json_lines(
    tmp_path / 'seen.jsonl', [dict(prompt='a' * 9, completion='b', label=True)]
  )
  with pytest.raises(ValueError, match='has 9 tokens, max_prompt_length=8'):
    Trainer(config, str(tmp_path / 'run'))
  config = written('pairs', tmp_path)
  config.preference.loss = dict(name='aot')
  with pytest.raises(ValueError, match="'aot' with pairs that have a prefer"):
    Trainer(config, str(tmp_path / 'run'))
  config = written('pairs', tmp_path)
  config.environment.preferences.held_out = None
  with pytest.raises(ValueError, match='but none are held out'):
    Trainer(config, str(tmp_path / 'run'))
  del config.environment.preferences['ties']
  with pytest.raises(ValueError, match='give train and held_out, each a path'):
    Trainer(config, str(tmp_path / 'run'))
