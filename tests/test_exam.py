"""Examinations: figures by hand, files that survive a kill, bad input."""

import itertools
import json
import runpy

import jax
import numpy as np
import pytest
import tiny
from tiny import quick_compiler as quick_compiler

from postrain import exam, hub, policies, tokenizers
from postrain.evaluation import bootstrap_interval, wilson_interval
from postrain.models.transformer import Config

PROGRAM = runpy.run_path(str(tiny.ROOT / 'experiments' / 'evaluate.py'))
CONFIG = Config(
  vocab_size=261, num_layers=1, model_dim=8, mlp_dim=8, num_heads=2,
  num_kv_heads=1, head_dim=4, max_length=64,
)  # fmt: skip
ROWS = [
  {
    'question': f'{a}+{b}=' + ' ' * (a // 2) * 5,
    'answer': f'{a + b}\n#### {a + b}',
  }
  for a in range(3)
  for b in range(2)
]


def number(completions, examples):
  """Right where the first token is even."""
  return [float(each.tokens[0] % 2 == 0) for each in completions]


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp('model')
  params = jax.jit(hub.transformer(CONFIG).init)(jax.random.key(0))
  hub.save(path, CONFIG, params, tokenizer=tokenizers.byte_level())
  block = {'eos_token_id': [1, *range(40, 140)]}
  (path / 'generation_config.json').write_text(json.dumps(block))
  return path


@pytest.fixture(scope='module')
def policy(directory):
  return policies.from_directory(directory)


@pytest.fixture
def flags(directory, tmp_path):
  data = tiny.json_lines(tmp_path / 'data.jsonl', ROWS)
  return {
    'model': directory, 'data': data, 'output': tmp_path / 'out',
    'num_samples': 4, 'max_new_tokens': 4, 'batch_size': 2,
    'grader': 'test_exam:number',
  }  # fmt: skip


def run(flags, **others):
  given = {k: v for k, v in (flags | others).items() if v is not None}
  PROGRAM['main']([f'--{name}={value}' for name, value in given.items()])


def refusal(flags, **others):
  before = len(tiny.compilations)
  with pytest.raises(SystemExit) as error:
    run(flags, **others)
  assert len(tiny.compilations) == before
  message = str(error.value)
  assert message.startswith('error: ')
  assert '\n' not in message
  return message


def test_the_program_marks_and_continues_with_the_same_bits(flags, capsys):
  run(flags)
  shown = capsys.readouterr()
  out = flags['output']
  answers = (out / 'answers.jsonl').read_bytes()
  results = (out / 'results.json').read_bytes()
  rows = sorted(map(json.loads, answers.splitlines()), key=lambda r: r['index'])
  assert [row['prompt'] for row in rows] == [row['question'] for row in ROWS]
  assert all(len(row['samples']) == 4 for row in rows)
  assert {'stop', 'length'} >= {row['greedy']['finish'] for row in rows}
  assert 'the layout gsm8k' in shown.err
  assert '6/6 problems' in shown.err
  for name in ('greedy', 'mean@4', 'pass@1', 'pass@2', 'pass@4', 'truncated'):
    assert f'| {name} |' in shown.out
  assert 'maj' not in shown.out  # this grader reads no answers
  # Killed within a batch, within a line, and after the last.
  compiled = len(tiny.compilations)
  for size in (answers.find(b'\n') + 1, len(answers) - 3, len(answers)):
    (out / 'answers.jsonl').write_bytes(answers[:size])
    (out / 'results.json').unlink()
    run(flags)
    assert (out / 'answers.jsonl').read_bytes() == answers
    assert (out / 'results.json').read_bytes() == results
    assert capsys.readouterr().out == shown.out
  assert len(tiny.compilations) > compiled  # so the bits were made again


def test_another_configuration_in_the_same_folder_is_refused(flags, tmp_path):
  run(flags, num_samples=0)
  message = refusal(flags, num_samples=0, seed=1)
  assert 'settings.seed: 0 there, 1 here' in message
  assert 'settings.num_samples: 0 there, 4 here' in refusal(flags)
  other = tiny.json_lines(tmp_path / 'other.jsonl', ROWS[:4])
  assert 'problems: ' in refusal(flags, num_samples=0, data=other)
  (flags['output'] / 'answers.jsonl').write_text('{"index": \n')
  assert 'no JSON' in refusal(flags, num_samples=0)
  (flags['output'] / 'config.json').unlink()
  assert 'not empty and holds no examination' in refusal(flags)


def row(reference, greedy, *sampled):
  def answer(value):
    correct = value == reference
    return {'answer': value, 'correct': correct, 'finish': 'stop'}

  samples = [answer(value) for value in sampled]
  return {
    'reference': reference, 'greedy': answer(greedy), 'samples': samples,
  }  # fmt: skip


def test_marks_by_hand():
  rows = [
    row('1', '1', '1', '1', '2', None),
    row('2', '1', '2', '3', '3', '3'),
    row('3', '3', None, None, None, '3'),
    row('4', '1', '1', '2', '3', '1'),
  ]
  rows[0]['samples'][3]['finish'] = 'length'
  found = exam.marks(rows, ks=(1, 2, 4), seed=3)
  value = {k: a['value'] for k, a in found['accuracies'].items()}
  assert value == pytest.approx({
    'greedy': 0.5,
    'mean@4': 4 / 16,
    'pass@1': 4 / 16,
    'pass@2': (5 / 6 + 1 / 2 + 1 / 2) / 4,
    'pass@4': 0.75,
    'maj@4': 0.5,
  })  # fmt: skip
  assert found['truncated'] == 1 / 20
  for name, wins in (('greedy', 2), ('pass@4', 3), ('maj@4', 2)):
    ends = (found['accuracies'][name]['low'], found['accuracies'][name]['high'])
    assert ends == wilson_interval(wins, 4)
  mean = found['accuracies']['mean@4']
  ends = bootstrap_interval(np.array([0.5, 0.25, 0.25, 0]), seed=3)
  assert (mean['value'], mean['low'], mean['high']) == ends
  # Never right is no certainty.
  never = exam.marks([row('1', '2', '2', '2')] * 5, ks=(1,))
  for name in ('greedy', 'mean@2', 'pass@1', 'maj@2'):
    assert never['accuracies'][name]['high'] > 0.4
  assert 'maj@2' not in exam.marks(rows, votes=False)['accuracies']


LAYOUTS = {
  'gsm8k': [{'question': 'q', 'answer': '1+1=2\n#### 2'}],
  'svamp': [{'Body': 'b.', 'Question': 'q?', 'Answer': 2.0}],
  'math': [{'problem': 'q', 'answer': r'\frac{1}{2}', 'level': 3}],
  'bbh': [{'input': 'q', 'target': 'True'}],
  'aqua': [{'question': 'q', 'options': ['A)1', 'B)2'], 'correct': 'B'}],
  'mmlu': [{'question': 'q', 'choices': ['1', '2'], 'answer': 1}],
  'arc': [
    {
      'question': 'q',
      'choices': {'label': ['A', 'B'], 'text': ['1', '2']},
      'answerKey': 'B',
    }
  ],
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_layout_is_recognised_and_its_answer_can_be_graded(tmp_path, name):
  from postrain.rewards.answers import reference_answer

  path = tiny.json_lines(tmp_path / 'rows.jsonl', LAYOUTS[name])
  ((question, answer),), found, grader = exam.read_problems(path)
  assert f'layout {name} ' in found
  assert question[0] in 'qb'
  expected = {'math': '1/2', 'bbh': 'true'}.get(name)
  reference = reference_answer(
    grader, {'answer': answer}, 1, field='answer', marker='####'
  )
  expected = expected or ('B' if grader == 'choice' else '2')
  assert str(reference) == expected
  if grader == 'choice':
    assert question.endswith(('(B) 2', 'B)2'))
  listed = tmp_path / 'rows.json'
  for block in (LAYOUTS[name], {'canary': 'x', 'examples': LAYOUTS[name]}):
    listed.write_text(json.dumps(block))
    assert exam.read_problems(listed)[0] == [(question, answer)]


@pytest.mark.parametrize(
  ('rows', 'message'),
  [
    ([{'prompt': 'p', 'entry_point': 'f', 'test': 't'}], 'no sandbox'),
    ([{'prompt': 'p', 'code': 'c', 'test_list': ['assert 1']}], 'no sandbox'),
    ([{'question': 'q', 'answer': '1', 'tests': []}], 'no sandbox'),
    ([{'question': 'q'}], 'no layout .* fits .*question.*name question_field'),
    ([{'question': '', 'answer': '1'}], 'row 1 has an empty question'),
    ([{'question': ['q'], 'answer': '1'}], 'row 1 does not fit .*no text'),
    ([{'Body': 1, 'Question': 'q', 'Answer': 2}], 'row 1 does not fit'),
    ([{'question': 'q', 'choices': 1, 'answer': 0}], 'row 1 does not fit'),
    ([], 'no examples'),
    (['{"question": \n'], 'no JSON'),
  ],
)
def test_a_file_that_cannot_be_asked_is_refused(tmp_path, rows, message):
  path = tiny.json_lines(tmp_path / 'rows.jsonl', rows)
  with pytest.raises(ValueError, match=message):
    exam.read_problems(path)


@pytest.mark.parametrize(
  ('others', 'message'),
  [
    ({'data': 'nowhere.jsonl'}, 'nowhere.jsonl is no file'),
    ({'data': 'rows.jsonl.gz'}, 'unpack it with gunzip'),
    ({'model': 'nowhere'}, "'nowhere' does not exist"),
    ({'question_field': 'question'}, 'give both fields, or a layout'),
    ({'question_field': 'q', 'answer_field': 'answer'}, "row 1 does not fit"),
    ({'layout': 'x'}, "layout='x': known are svamp"),
    ({'layout': 'math'}, 'no layout (math) fits'),
    ({'num_examples': 0}, 'num_examples=0'),
    ({'num_examples': 1}, 'at least 2'),
    ({'ks': '1,8'}, 'k=8: pass@k needs k in [1, num_samples=4]'),
    ({'ks': '0'}, 'k=0'),
    ({'ks': 'x'}, '--ks=x: expected numbers'),
    ({'num_samples': -1}, 'num_samples=-1'),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'temperature': -1}, 'temperature=-1.0'),
    ({'grader': 'humaneval'}, 'no sandbox'),
    ({'grader': 'accurcy'}, "did you mean 'accuracy'"),
    ({'grader': 'contains'}, 'needs a value for: text'),
    ({'grader': 'choice'}, "row 1: the reference answer=.* is not a letter"),
    ({'prompt_template': 'Q:'}, "template='Q:' needs {question}"),
    ({'system': 'x'}, "system needs style='chat'"),
    ({'marker': ' '}, "marker=' '"),
    ({'max_new_tokens': 64}, 'no room for a prompt'),
    ({'max_new_tokens': 60}, 'row 5: the prompt has 9 tokens, of which 4'),
    ({'thinking': 'on'}, 'does not know enable_thinking'),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_compiles(flags, others, message):
  found = refusal(flags, **others)
  if '.*' in message:
    parts = iter(message.split('.*'))
    assert all(part in found for part in parts)
  else:
    assert message in found
  assert not flags['output'].exists()


def test_a_chat_has_a_system_message(policy, tmp_path, monkeypatch):
  asked = []
  encode = policies.Policy.encode
  monkeypatch.setattr(
    policies.Policy,
    'encode',
    lambda self, prompt: asked.append(prompt) or encode(self, prompt),
  )
  settings = exam.Settings(
    style='chat', system='Be short.', template='Q: {question}',
    max_new_tokens=2, batch_size=2, extract='last',
  )  # fmt: skip
  problems = [exam.Problem(f'{i}', f'{i}') for i in range(2)]
  results = exam.examine(policy, problems, settings, tmp_path / 'chat')
  assert asked[1] == [
    {'role': 'system', 'content': 'Be short.'},
    {'role': 'user', 'content': 'Q: 1'},
  ]
  assert results['num_samples'] == 0
  assert list(results['accuracies']) == ['greedy']


def test_batches_have_few_shapes():
  from postrain.exam.examiner import _batches

  prompts = [[0] * n for n in (1, 5, 9, 33, 40, 2, 64, 64, 64)]
  batches = list(_batches(prompts, 2))
  assert sorted(itertools.chain(*(ids for ids, _ in batches))) == list(range(9))
  assert all(len(prompts[i]) <= size for ids, size in batches for i in ids)
  assert len({size for _, size in batches}) <= 6
