"""The judge of stories, and its pairs."""

import pathlib
import runpy
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = ROOT / 'experiments' / 'stories_preferences' / 'texts.py'
texts = types.SimpleNamespace(**runpy.run_path(str(PROGRAM)))

HELLO = '"Hello, my dear friend!" said Tom.'
BYE = 'Mom said, "We will go home."'


@pytest.mark.parametrize(
  ('text', 'score'),
  [
    ('Tom had a red ball.', 0),
    (HELLO, 0.5),
    (f'{HELLO} {BYE}', 1),
    (f'{HELLO} Tom ran. "hello my dear friend," he said.', 0.5),
    ('"Oh no!" said Tom. "Yes, yes!" said Mom.', 0),
    (f'{BYE} Then Tom said, "I want to', 0.5),
    (f'{HELLO} ' + 'The cat ran to the dog. ' * 5, 0),
    (f'{HELLO} {BYE} "Can I come too?" he said. "Yes, you can all come."', 1),
  ],
)
def test_the_judge_counts_what_is_said_once(text, score):
  assert texts.talk(text) == pytest.approx(score)


def test_the_best_is_paired_with_the_worst_while_they_differ():
  scores = np.array([[0.0, 1.0, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
  rows = np.arange(8)[:, None]
  tokens, valid, mask = texts.pairs_of((rows, rows >= 0, rows > 0), scores)
  assert tokens[:, 0].tolist() == [1, 2, 3, 0]
  assert valid.all()
  assert mask[:, 0].tolist() == [True, True, True, False]


def test_pairs_are_as_wide_as_the_widest(tmp_path):
  def part(width):
    x = np.ones((2, width), int)
    return x, x > 0, x > 0

  texts.write(str(tmp_path / 'pairs.npz'), train=part(3), held_out=part(2))
  with np.load(tmp_path / 'pairs.npz') as arrays:
    assert arrays['train_valid'].all()
    assert arrays['held_out_valid'].tolist() == [[False, True, True]] * 2
