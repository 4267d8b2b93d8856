"""The reward model of graded solutions: its questions, and its rules."""

import os
import pathlib
import runpy
import types

import numpy as np
import pytest

from postrain import data

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / 'experiments' / 'gsm8k_rewards' / 'run.py'
rewards = types.SimpleNamespace(**runpy.run_path(str(PROGRAM)))
DATA = os.environ.get('POSTRAIN_DATA')


def graded(number, right, wrong):
  return {
    'question': f'{number} birds and 2 cats?\n',
    'a': {'is_correct': True, 'solution': right},
    'b': {'is_correct': False, 'solution': wrong},
  }


def test_what_is_held_out_shares_no_question():
  rows = [graded(n, f'{n} + 2\nA: {n + 2}', 'A: 9') for n in range(5)]
  pairs = data.solution_pairs(rows, num_pairs=None)
  first, second = rewards.divided(pairs, seed=0)
  assert (len(first), len(second)) == (3, 2)
  assert not {p.prompt for p in first} & {p.prompt for p in second}


def test_a_model_is_compared_with_the_rules():
  wrong = ['hm\nA: 9.50'] * 2 + ['A: 9.5'] * 2  # two as long as the right
  rows = [
    graded(n, f'{n} + 2\nA: {n + 2}', text) for n, text in enumerate(wrong)
  ]
  pairs = data.solution_pairs(rows, num_pairs=None)
  found = rewards.summarise(rows, pairs * 2, np.array([1.0, 1, 1, -1] * 2))
  assert found['questions'] == 4
  figures = found['figures']
  assert figures['the reward model']['accuracy'][0] == 0.75
  assert figures['the answer is whole']['accuracy'][0] == 1
  assert figures['the answer is whole']['agreement'] == 0.75
  assert figures['shorter is right']['accuracy'][0] == 0.25
  assert found['pairs_as_long'] == 4
  assert figures['written by the better model']['accuracy'][0] == 1
  assert '| the reward model | 0.750 [' in rewards.table(found)


@pytest.mark.skipif(DATA is None, reason='POSTRAIN_DATA is not set')
def test_the_real_solutions_are_divided_by_question():
  path = pathlib.Path(DATA or '', 'gsm8k', rewards.FILE)
  rows = data.read_jsonl(path, fields=('question',))
  pairs = data.solution_pairs(rows, num_pairs=None)
  parts = rewards.divided(pairs, seed=0)
  assert len(pairs) == sum(map(len, parts)) == 2426
  assert not {p.prompt for p in parts[0]} & {p.prompt for p in parts[1]}
  answers = {(r['question'], v['solution']): v['is_correct'] for r in rows
             for v in r.values() if isinstance(v, dict)}  # fmt: skip
  for pair in pairs:
    right, wrong = (answers[pair.prompt, text] for text in pair.completions)
    assert right
    assert not wrong
