"""The comparison with other libraries, without any: our side, and what it
refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import ROOT, quick_compiler

from benchmarks.peers import driver, material, ours, protocol
from benchmarks.shapes import SHAPES

cheap = quick_compiler
slow = pytest.mark.slow
SHAPE = SHAPES['miniature']
TOKENS = SHAPE.num_rows * SHAPE.completion_length


def told(**changes):
  figures = dict(logprobs=[-3.0, -4.0], losses=[0.7, 0.6, 0.5], tokens=TOKENS)
  return {**figures, **changes}


def test_sides_that_agree_are_told_how_well():
  near = told(logprobs=[-3.00003, -4.0], losses=[0.7, 0.6], values=[2.0, 1e-6])
  ours = told(values=[2.0, 0.0])  # of the largest, for some are next to 0
  gaps = driver.agree('here', {'ours': ours, 'trl': near}, SHAPE)
  assert gaps['losses'] == 0
  assert gaps['values'] == pytest.approx(5e-7)
  assert gaps['logprobs'] == pytest.approx(1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(logprobs=[-3.001, -4.0]), r'here: trl gives logprobs \[-3.001, -4'),
    (dict(losses=[0.7, 0.61]), r'trl gives losses \[0.7, 0.61\], ours \[0.7'),
    (dict(losses=[0.7, float('nan')]), 'trl gives losses'),
    (dict(losses=[]), 'trl gave no losses'),
    (dict(values=[2.0, 1e-3]), r'trl gives values \[2.0, 0.001\], ours \[2.0'),
    (dict(tokens=TOKENS - 1), f'trl sampled {TOKENS - 1} tokens, not {TOKENS}'),
  ],
)
def test_sides_that_disagree_are_refused(changes, message):
  ours = told(values=[2.0, 0.0]) if 'values' in changes else told()
  with pytest.raises(ValueError, match=message):
    driver.agree('here', {'ours': ours, 'trl': told(**changes)}, SHAPE)


def test_a_missing_interpreter_is_named_with_the_remedy():
  with pytest.raises(ValueError, match=r'no interpreter nowhere/python for hf'):
    driver.interpreters(['ours', 'hf'], 'nowhere/python')
  with pytest.raises(ValueError, match='make peers'):
    driver.measure('generate', 'tiny', ['trl'], peers='nowhere/python')
  assert driver.interpreters(['ours'], '') == {'ours': sys.executable}


@pytest.mark.parametrize(('rounds', 'sides'), [(0, ['ours']), (3, [])])
def test_nothing_to_measure_is_refused(rounds, sides):
  with pytest.raises(ValueError, match=rf'sft with rounds={rounds} and'):
    driver.measure('sft', 'tiny', sides, peers='', rounds=rounds)


def test_a_side_that_fails_is_quoted(tmp_path):
  worker = driver.Worker(
    sys.executable, 'protocol_of_nobody', 'sft', 'tiny', str(tmp_path), 1
  )
  with pytest.raises(ValueError, match=r'No module .*protocol_of_nobody'):
    worker.read()
  worker.close()


class Turns:
  """A session that ends the program after some steps."""

  def __init__(self, steps):
    self.answers, self.steps = [], steps

  def answer(self, **figures):
    self.answers.append(figures)
    if len(self.answers) > self.steps:
      raise EOFError


def answers(job, steps, folder, tmp_path, monkeypatch):
  """What our side says when it is ready, and behind each step."""
  flags = dict(job=job, shape='miniature', folder=folder, workdir=tmp_path)
  flags = [f'--{k}={v}' for k, v in flags.items()]
  monkeypatch.setattr(sys, 'argv', ['ours', '--micro_batches=2', *flags])
  turns = Turns(steps)
  monkeypatch.setattr(protocol, 'session', lambda: turns)
  with pytest.raises(EOFError):
    ours.main()
  return turns.answers


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp('peers') / 'weights'
  material.make(made, SHAPE)
  return made


@pytest.mark.parametrize(
  'job',
  ['grpo', *(pytest.param(j, marks=slow) for j in ('generate', 'ppo', 'sft'))],
)
def test_our_side_answers(job, folder, tmp_path, monkeypatch):
  """The trainer itself, and its sampler."""
  ready, *steps = answers(job, 3, folder, tmp_path, monkeypatch)
  assert len(ready['logprobs']) == SHAPE.num_rows
  assert ready['versions']['jax']
  assert ('values' in ready) == (job == 'ppo')
  if job in ('generate', 'grpo', 'ppo'):
    assert steps[-1]['tokens'] == TOKENS
  else:
    first, second, third = steps[-1]['losses']
    assert first > second > third  # the same rows, again and again
  if job != 'generate':
    assert 'update' in steps[-1]['phases']


def test_steps_on_pairs_follow_trl(folder, tmp_path, monkeypatch):
  """Plain SGD on four batches in turn, with the losses that TRL had."""
  path = ROOT / 'benchmarks/results/peers-dpo-miniature-2.json'
  known = json.loads(path.read_text())['trajectory']['losses']['trl']
  # One step is under way and one unwritten where another is asked for.
  last = answers(
    protocol.TRAJECTORY, len(known) + 1, folder, tmp_path, monkeypatch
  )[-1]
  assert len(known) == driver.STEPS
  assert max(known) - min(known) > 0.1  # something was learnt
  np.testing.assert_allclose(last['losses'][: len(known)], known, rtol=1e-4)


@slow
def test_the_programs_run(tmp_path):
  done = subprocess.run(
    [
      sys.executable, 'benchmarks/peers/run.py', '--sides=ours',
      '--jobs=sft', '--shapes=miniature', '--rounds=1',
      '--micro_batches=2', f'--out={tmp_path}',
    ],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert '| sft | miniature | 2 | ours |' in done.stdout
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  (step,) = result['sides']['ours']['steps']
  assert step['cpu'] > 0
  assert step['peak_mib'] > 1
  done = subprocess.run(
    [
      sys.executable, 'benchmarks/decode.py', '--shapes=miniature',
      '--rounds=1',
    ],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert '| miniature | 1 |' in done.stdout
