"""Files survive kills, lines say what happened, a picture is drawn."""

import io
import math
import os
import subprocess
import sys
import types

from hypothesis import given
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from postrain import metrics
from postrain.console import excerpt, summary


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'metrics.jsonl'


def write_steps(path, num_steps):
  lines = metrics.JsonLines(path)
  for step in range(num_steps):
    lines.write(step, {'reward': step / 3})
  lines.close()


def test_a_row_is_one_line_that_starts_with_its_step(path):
  lines = metrics.JsonLines(path)
  lines.write(7, {'reward': 0.1, 'text': 'a\nb \u2028 π'})
  lines.append({'x': 1}, {'x': 2})
  assert path.read_bytes() == (
    b'{"step": 7, "reward": 0.1, "text": "a\\nb \\u2028 \\u03c0"}\n'
    b'{"x": 1}\n{"x": 2}\n'
  )


@given(st.floats())
def test_floats_read_back_to_the_same_bits(tmp_path_factory, value):
  path = tmp_path_factory.mktemp('floats') / 'metrics.jsonl'
  metrics.JsonLines(path).write(0, {'x': value})
  (row,) = metrics.read(path)
  assert row['x'] == value or (math.isnan(row['x']) and math.isnan(value))
  assert math.copysign(1, row['x']) == math.copysign(1, value) or (
    math.isnan(value)
  )


def test_arrays_are_written_as_numbers(path):
  figures = {
    'numpy': np.float32(0.1),
    'jax': jnp.float32(0.1),
    'count': jnp.int32(3),
    'list': np.arange(3),
    'flag': np.bool_(True),
  }
  metrics.JsonLines(path).write(0, figures)
  (row,) = metrics.read(path)
  tenth = float(np.float32(0.1))
  assert row == {
    'step': 0,
    'numpy': tenth,
    'jax': tenth,
    'count': 3,
    'list': [0, 1, 2],
    'flag': True,
  }


def test_what_is_no_figure_is_refused_and_nothing_is_written(path):
  lines = metrics.JsonLines(path)
  with pytest.raises(TypeError, match='object'):
    lines.append({'x': 1}, {'x': object()})
  with pytest.raises(ValueError, match='rename the figure'):
    lines.write(0, {'step': 1})
  assert not path.exists()


def test_truncate_keeps_the_bytes_of_earlier_steps(path):
  write_steps(path, 5)
  whole = path.read_bytes()
  metrics.truncate(path, 5)
  assert path.read_bytes() == whole
  metrics.truncate(path, 3)
  assert path.read_bytes() == b''.join(whole.splitlines(True)[:3])
  metrics.truncate(path, 0)
  assert path.read_bytes() == b''
  assert os.listdir(path.parent) == ['metrics.jsonl']


def test_a_resumed_file_equals_the_uninterrupted_one(path, tmp_path):
  """Cut at every byte, as a kill would, then truncate and write the rest."""
  write_steps(path, 4)
  whole = path.read_bytes()
  torn = tmp_path / 'torn.jsonl'
  for cut in range(len(whole) + 1):
    torn.write_bytes(whole[:cut])
    num_complete = whole[:cut].count(b'\n')
    assert len(list(metrics.read(torn))) == num_complete
    for resumed in range(num_complete + 1):
      torn.write_bytes(whole[:cut])
      metrics.truncate(torn, resumed)
      lines = metrics.JsonLines(torn)
      for step in range(resumed, 4):
        lines.write(step, {'reward': step / 3})
      assert torn.read_bytes() == whole


def test_truncate_of_a_missing_file_makes_none(path):
  metrics.truncate(path, 3)
  assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{"step": 0}\n{"st{"step": 2}\n', 'line 2: no JSON'),
    (b'{"reward": 0}\n', "without 'step'"),
  ],
)
def test_truncate_refuses_what_it_cannot_read(path, content, message):
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    metrics.truncate(path, 1)
  assert path.read_bytes() == content


def test_a_killed_writer_leaves_complete_lines(path):
  """A process that dies without closing anything has lost no finished row."""
  program = (
    'import os, sys; from postrain.metrics import JsonLines\n'
    'lines = JsonLines(sys.argv[1])\n'
    "for step in range(20): lines.write(step, {'text': 'x' * 20000})\n"
    'os.kill(os.getpid(), 9)'
  )
  killed = subprocess.run([sys.executable, '-c', program, path])
  assert killed.returncode == -9
  assert [row['step'] for row in metrics.read(path)] == list(range(20))


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
  pytest.importorskip('tensorboardX')
  from tensorboardX.proto import event_pb2

  writer = metrics.TensorBoard(tmp_path, first_step=2)
  writer.write(2, {'reward': np.float32(0.5)})
  writer.close()
  (name,) = os.listdir(tmp_path)
  content = (tmp_path / name).read_bytes()
  events = []
  while content:  # length, its checksum, the event, its checksum
    length = int.from_bytes(content[:8], 'little')
    events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
    content = content[16 + length :]
  starts = [e.step for e in events if e.HasField('session_log')]
  scalars = [
    (e.step, v.tag, v.simple_value) for e in events for v in e.summary.value
  ]
  assert starts == [2]
  assert scalars == [(2, 'reward', 0.5)]


@pytest.mark.parametrize(
  ('module', 'extra', 'make'),
  [
    ('tensorboardX', 'tensorboard', lambda d: metrics.TensorBoard(d)),
    (
      'wandb',
      'wandb',
      lambda d: metrics.WeightsAndBiases(d, project='p', name='n', config={}),
    ),
  ],
)
def test_a_missing_extra_is_named(monkeypatch, tmp_path, module, extra, make):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match=rf"pip install 'postrain\[{extra}\]'"):
    make(tmp_path)


def test_weights_and_biases_continues_the_run_of_its_name(
  monkeypatch, tmp_path
):
  """Held against a stand-in: the real one wants an account."""
  calls = []

  class Run:
    def log(self, figures, step):
      calls.append((step, figures))

    def finish(self):
      calls.append('finish')

  def init(**options):
    calls.append(options)
    return Run()

  wandb = types.ModuleType('wandb')
  wandb.init = init
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  writer = metrics.WeightsAndBiases(
    tmp_path, project='sorting', name='seed0', config={'a': 1}
  )
  writer.write(3, {'reward': 0.5})
  writer.close()
  assert calls == [
    {
      'dir': str(tmp_path),
      'project': 'sorting',
      'name': 'seed0',
      'id': 'seed0',
      'resume': 'allow',
      'config': {'a': 1},
    },
    (3, {'reward': 0.5}),
    'finish',
  ]


def test_curves_draws_the_keys_that_exist(path, tmp_path):
  pytest.importorskip('matplotlib')
  write_steps(path, 4)
  metrics.JsonLines(path).write(4, {'accuracy': 0.5, 'kl': math.nan})
  picture = tmp_path / 'curves.png'
  assert metrics.curves(path, picture, ('reward', 'accuracy', 'kl', 'other'))
  content = picture.read_bytes()
  assert content[:8] == b'\x89PNG\r\n\x1a\n'
  height = int.from_bytes(content[20:24], 'big')
  assert height == round(3 * 1.8 * 120)  # a panel for each of three keys
  assert sorted(os.listdir(tmp_path)) == ['curves.png', 'metrics.jsonl']


def test_curves_says_why_it_draws_nothing(path, capsys, monkeypatch):
  picture = path.parent / 'curves.png'
  assert not metrics.curves(path, picture, ('reward',))
  assert capsys.readouterr().out.endswith('has none of reward\n')
  write_steps(path, 2)
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  monkeypatch.delitem(sys.modules, 'matplotlib.figure', raising=False)
  assert not metrics.curves(path, picture, ('reward',))
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  assert 'postrain[plots]' in out
  assert not picture.exists()


class FakeClock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


def test_timer_adds_spans_and_starts_again():
  clock = FakeClock()
  timer = metrics.StepTimer(clock)
  for name, seconds in [('sample', 2.0), ('update', 1.0), ('sample', 0.5)]:
    with timer.span(name):
      clock.now += seconds
  clock.now += 0.5
  assert timer.finish(num_tokens=400) == {
    'seconds/sample': 2.5,
    'seconds/update': 1.0,
    'seconds/total': 4.0,
    'tokens_per_second': 100.0,
  }
  assert timer.finish() == {'seconds/total': 0.0}


def test_timer_counts_a_span_that_fails():
  clock = FakeClock()
  timer = metrics.StepTimer(clock)

  def fail():
    with timer.span('reward'):
      clock.now += 3.0
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  assert timer.finish()['seconds/reward'] == 3.0


HEADLINE = ('loss', 'reward', 'kl')
FIGURES = {
  'kl': 0.00123456,
  'reward': jnp.float32(0.5),
  'unnamed': 1.0,
  'seconds/sample': 1.5,
  'seconds/update': 0.25,
  'seconds/total': 2.0,
  'tokens_per_second': 12345.6,
}
LINE = (
  'step   7/100  reward 0.5  kl 0.001235'
  '  |  2.00 s (sample 1.50, update 0.25)  12,346 tokens/s'
)


def test_summary_shows_headline_times_and_speed():
  assert summary(7, 100, FIGURES, HEADLINE) == LINE
  assert summary(0, 5, {}, HEADLINE) == 'step 0/5'


def test_console_prints_plain_lines_where_there_is_no_terminal(capsys):
  console = metrics.Console(100, headline=HEADLINE)
  console.write(7, FIGURES)
  console.table(0, [])
  console.close()
  assert capsys.readouterr().out == LINE + '\n'


def test_console_prints_a_hundred_lines_of_a_long_run(capsys):
  console = metrics.Console(1000, headline=('loss', 'eval/greedy'))
  for step in range(1001):
    evaluated = {'eval/greedy': 0.5} if step == 7 else {}
    console.write(step, {'loss': 1.0, **evaluated})
  console.close()
  lines = capsys.readouterr().out.splitlines()
  assert [line.split('/')[0] for line in lines[:3]] == [
    'step    0', 'step    7', 'step   10'
  ]  # fmt: skip
  assert len(lines) == 102


ROWS = [
  {
    'prompt': f'[bold]{i}+1=',
    'completion': f'{i + 1}\n\x1b[2J',
    'reward': np.float32(i),
    'advantage': -0.5,
  }
  for i in range(5)
]


def test_table_shows_samples_as_they_are_every_few_steps(capsys):
  console = metrics.Console(100, headline=HEADLINE, table_every=5, num_rows=2)
  for step in range(1, 10):
    console.table(step, ROWS)
  console.close()
  text = capsys.readouterr().out
  assert text.count('step 5') == 1
  assert text.count('step') == 1
  words = [line.split() for line in text.splitlines()]
  assert ['prompt', 'completion', 'reward', 'advantage'] in words
  assert ['[bold]0+1=', r'1\n\x1b[2J', '0', '-0.5'] in words
  assert ['[bold]1+1=', r'2\n\x1b[2J', '1', '-0.5'] in words
  assert 'bold]2' not in text
  assert '\x1b' not in text


def test_console_draws_a_bar_on_a_terminal(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '120')
  monkeypatch.delenv('NO_COLOR', raising=False)
  file = Terminal()
  monkeypatch.setattr(sys, 'stdout', file)
  console = metrics.Console(100, headline=HEADLINE, table_every=1)
  console.write(7, FIGURES)
  console.table(7, ROWS)
  console.close()
  text = file.getvalue()
  assert '8/100' in text
  assert LINE in text
  assert '[bold]0+1=' in text
  assert text.count('\x1b[?25l') == text.count('\x1b[?25h') == 1  # the cursor


def test_excerpt_keeps_the_ends():
  assert excerpt('π 3\t4') == r'π 3\t4'
  short = excerpt('a' * 500 + 'b' * 500, num_characters=23)
  assert short == 'a' * 10 + ' … ' + 'b' * 10
