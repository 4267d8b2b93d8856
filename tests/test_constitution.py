"""The stages of a constitution: what they write, and all of them, small."""

import importlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tiny

from configs import constitution as config
from postrain import feedback, pipeline
from postrain.types import Completion

quick_compiler = tiny.quick_compiler
STAGES: Any = importlib.import_module(config.STAGES)
PRINCIPLES = feedback.constitution(config.PRINCIPLES)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def violating(texts: list[str]) -> float:
  return float(np.mean([
    any(feedback.violations(p, text) for p in PRINCIPLES) for text in texts
  ]))  # fmt: skip


def test_m20_revisions_violate_less_and_the_same_text_is_no_pair(
  tmp_path: pathlib.Path,
) -> None:
  STAGES.write_requests(directory=tmp_path, seed=0)
  rows = read(tmp_path / 'train.jsonl')
  asked = {row['prompt'] for row in rows}
  held_out = {row['prompt'] for row in read(tmp_path / 'held_out.jsonl')}
  assert len(asked | held_out) == 8 * 7 * 6
  assert not asked & held_out
  responses = [
    {'prompt': r['prompt'], 'response': r['completion']} for r in rows[:300]
  ]
  path = tiny.json_lines(tmp_path / 'responses.jsonl', responses)
  STAGES.revise(
    directory=tmp_path, responses=str(path), principles=config.PRINCIPLES,
    num_rounds=4, recall=0.9, seed=0,
  )  # fmt: skip
  found = read(tmp_path / 'revisions.jsonl')
  before = violating([row['response'] for row in found])
  after = violating([row['completion'] for row in found])
  assert 0.1 < after < before - 0.3
  for row in found:
    assert STAGES.helps(row['prompt'], row['completion']) == 1
    assert row['rounds'][-1]['text'] == row['completion']
  pairs = read(tmp_path / 'pairs.jsonl')
  changed = [r for r in found if r['response'] != r['completion']]
  assert len(found) == 300 > len(changed) == len(pairs)
  assert all(pair['chosen'] != pair['rejected'] for pair in pairs)


def test_m20_labels_agree_with_the_principles_as_often_as_the_judge(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """In both orders always; what is left of them says how sure it is."""
  STAGES.write_requests(directory=tmp_path, seed=1)
  answers: dict[str, list[str]] = {}
  for row in read(tmp_path / 'train.jsonl'):
    answers.setdefault(row['prompt'], []).append(row['completion'])
  monkeypatch.setattr(STAGES, '_answers', lambda *_: list(answers.values()))
  STAGES.compare(
    directory=tmp_path, model='', requests=str(tmp_path / 'train.jsonl'),
    num_pairs=4, principles=config.PRINCIPLES, seed=0,
    judge=dict(scale=2.0, position_bias=1.0, flip=0.1),
  )  # fmt: skip
  rows = read(tmp_path / 'pairs.jsonl')
  by_name = {p.name: p for p in PRINCIPLES}
  assert {row['principle'] for row in rows} == {*by_name}
  for row in rows:
    principle = by_name[row['principle']]
    fewer, more = (
      feedback.violations(principle, row[side])
      for side in ('chosen', 'rejected')
    )
    assert fewer <= more
    assert (row['preference'] > 0.5 + 1e-9) == (fewer < more)
    assert row['preference'] <= 0.9 + 1e-9  # of who errs one time in ten


def test_help_is_the_share_of_what_was_asked_for() -> None:
  examples = [{'prompt': 'abc='}] * 3
  completions = [Completion(t, [], False) for t in ('cXba', 'bbb', '')]
  found = STAGES.helpfulness(completions, examples)
  assert found == pytest.approx([1, 1 / 3, 0])


@pytest.mark.parametrize(
  ('pairs', 'algorithm'), [('judge', 'ppo'), ('revision', 'grpo')]
)
def test_the_stages_are_recipes(
  pairs: str, algorithm: str, tmp_path: pathlib.Path
) -> None:
  made = config.get_pipeline(pairs=pairs, algorithm=algorithm)
  planned = pipeline.plan(
    [pipeline.Stage(*item) for item in made.items()], str(tmp_path)
  )
  assert ('comparisons' in made) == (pairs == 'judge')
  assert planned[-1].name == 'report'


def test_other_choices_are_refused() -> None:
  with pytest.raises(ValueError, match="pairs='both'"):
    config.get_pipeline(pairs='both')
  with pytest.raises(ValueError, match="algorithm='rloo'"):
    config.get_pipeline(algorithm='rloo')


def test_m19_in_one_order_a_taste_for_a_position_is_what_is_learnt(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Originals are shown first, before their revisions."""
  noise: Any = importlib.import_module('experiments.constitution.noise')
  for name, size in dict(PAIRS=64, SAMPLES=16, SETS=4).items():
    monkeypatch.setattr(noise, f'NUM_{name}', size)
  found = {
    (orders, bias): noise._run(
      PRINCIPLES, 'original first', orders, bias, 0.0, 0
    )
    for orders, bias in (('both', 2.0), ('single', 0.0), ('single', 2.0))
  }
  for setting in (('both', 2.0), ('single', 0.0)):
    accuracy, after, before = found[setting]
    assert accuracy == 1
    assert after < before
  accuracy, after, before = found['single', 2.0]
  assert accuracy < 0.5
  assert after > before


@pytest.mark.slow
@pytest.mark.parametrize('pairs', ['judge', 'revision'])
def test_m20_every_stage_runs(pairs: str, tmp_path: pathlib.Path) -> None:
  made = config.get_pipeline(pairs=pairs)
  for stage in made.values():
    if 'program' in stage:
      continue
    stage.sft.num_steps = min(stage.sft.num_steps, 60)
    stage.preference.num_steps = min(stage.preference.num_steps, 2)
    stage.rl.num_iterations = min(stage.rl.num_iterations, 1)
    stage.rl.num_prompts = 4
  stages = [pipeline.Stage(*item) for item in made.items()]
  planned = pipeline.run(stages, str(tmp_path))
  report = json.loads(
    pathlib.Path(planned[-1].directory, 'report.json').read_text()
  )
  assert report.keys() == {'base', 'supervised', 'online'}
  for figures in report.values():
    assert {p.name for p in PRINCIPLES} < figures.keys()
    assert max(figures[p.name] for p in PRINCIPLES) <= figures['any'] <= 1
