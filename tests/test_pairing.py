"""Pairs that the policy writes: who is chosen, and that runs repeat them."""

import math
import pathlib
from typing import Any

from ml_collections import ConfigDict
import numpy as np
import pytest
from test_preference_stage import Killed, close, figures, written
import tiny

from postrain import trainer
from postrain.environments import Environment
from postrain.learned_rewards import unjudged
from postrain.pairing import Pairing, beside, demonstrations, rewarded
from postrain.preferring import comparisons
from postrain.recipe import Recipe, make_recipe
from postrain.trainer import Trainer
from postrain.types import Prompts, Samples

quick_compiler = tiny.quick_compiler
SLOW = pytest.mark.slow
# No prompt likes the word 0, all like the stop token 4, and 3 is padding.
BAD, GOOD = [0, 0, 4], [4, 3, 3]
ROWS = [BAD, GOOD, GOOD, BAD, BAD, BAD]
PROMPTS = Prompts(
  np.array([[1, 2]] * 3, np.int32), np.ones((3, 2), bool), [{}] * 3
)


def writing(source: str, **changes: Any) -> ConfigDict:
  config = tiny.preference('online')
  config.preference.update(source=source, num_examples=None, **changes)
  config.evaluation.every = 0
  config.checkpoint.export = False
  return config


def assembled(config: ConfigDict) -> tuple[Recipe, Environment]:
  recipe = make_recipe(config)
  return recipe, unjudged(recipe)


def sampled(environment: Environment, tokens: list) -> Samples:
  """Samples that are given."""
  rows = np.asarray(tokens, np.int32)
  mask = rows != environment.pad_id
  zeros = np.zeros(rows.shape, np.float32)
  return Samples(rows, mask, zeros, zeros, np.zeros(len(rows), bool))


def test_m27_the_completion_with_more_reward_is_chosen() -> None:
  _, environment = assembled(writing('rewards'))
  units = rewarded(environment, PROMPTS, sampled(environment, ROWS))
  wanted = [1, 2, *GOOD], [1, 2, *BAD]
  for row, tokens in enumerate([*wanted, *wanted]):
    assert units.tokens[row].tolist() == tokens
    assert units.valid[row].tolist() == [t != 3 for t in tokens]
    assert units.mask[row].tolist() == [False] * 2 + [
      t != 3 for t in tokens[2:]
    ]
  assert not units.valid[4:].any()  # a tie
  assert not units.mask[4:].any()


def test_m27_raters_who_never_err_prefer_by_gold() -> None:
  config = writing('raters')
  config.environment.rater = dict(scale=math.inf, tie_width=0.0)
  recipe, environment = assembled(config)
  known = comparisons(recipe, environment).compare
  assert known is not None
  samples = sampled(environment, ROWS)
  units = known(0, PROMPTS, samples)
  close(tuple(units), tuple(rewarded(environment, PROMPTS, samples)), atol=0)


def test_m28_a_demonstration_is_preferred_to_a_sample(
  tmp_path: pathlib.Path,
) -> None:
  config = written('pairs', tmp_path)
  config.preference.source = 'self_play'
  config.preference.batch_size = 3
  recipe, environment = assembled(config)
  prompts, tokens, mask = demonstrations(recipe, environment, 0)
  draw: Any = environment.demonstrations
  rows, valid, _ = draw(0, 3, None)
  units = beside(
    prompts, tokens, mask, sampled(environment, (tokens + 1).tolist())
  )
  for row in range(3):  # the same tokens, wherever they stand
    real = units.tokens[2 * row][units.valid[2 * row]]
    assert real.tolist() == rows[row][valid[row]].tolist()
    place = environment.prompt_length
    assert not units.mask[2 * row, :place].any()
    assert units.mask[2 * row, place]
  assert (units.tokens[1::2, place:] == tokens + 1).all()
  config.sampling.max_new_tokens = 1
  with pytest.raises(ValueError, match=r'max_new_tokens=1 .* raise the limits'):
    demonstrations(*assembled(config), 0)


@pytest.mark.parametrize(
  'source',
  ['self_play', *(pytest.param(s, marks=SLOW) for s in ('raters', 'rewards'))],
)
def test_m27_m28_a_killed_run_writes_the_same_pairs(
  source: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = writing(source, num_steps=4, reference_every=2)
  config.preference.optimizer.learning_rate = 0.1
  config.checkpoint.every = 1
  compiled, units = [], Pairing.units

  def noting(self: Pairing, *rest: Any) -> Any:
    compiled.append(len(tiny.compilations))
    return units(self, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(Pairing, 'units', noting)
    expected = Trainer(config, str(tmp_path / 'whole')).run()
  assert compiled[1] == compiled[-1]
  rows = figures(tmp_path / 'whole')
  for step, row in enumerate(rows[:4]):  # the reference is new at 0 and 2
    assert (abs(row['loss'] - math.log(2)) < 1e-6) == (step % 2 == 0)

  def die_at(at: str, number: int) -> None:
    if (at, number) == ('in_rollout', 3):
      raise Killed

  killed = tmp_path / 'killed'
  with monkeypatch.context() as patch:
    patch.setattr(trainer.workdir, 'die_at', die_at)
    with pytest.raises(Killed):
      Trainer(config, str(killed)).run()
  close(Trainer(config, str(killed)).run(), expected, atol=0)
  logs = [folder / 'metrics.jsonl' for folder in (killed, tmp_path / 'whole')]
  assert logs[0].read_bytes() == logs[1].read_bytes()
