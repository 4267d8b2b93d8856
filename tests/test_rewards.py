"""Rewards against answers judged by hand."""

import functools
import inspect
import json
import os
import pathlib
import types

import numpy as np
import pytest

from postrain import rewards
from postrain.rewards import scores
from postrain.types import Completion

DATA = os.environ.get('POSTRAIN_DATA')


def completion(text='', length=0, truncated=False):
  return Completion(text, [7] * length, truncated)


def graded(fn, *texts, answer=None, **hyperparameters):
  examples = [{'answer': answer}] * len(texts)
  return fn([completion(text) for text in texts], examples, **hyperparameters)


# (completion, reference, reward) as a careful teacher would give them.
MARKED = [
  ('#### 42', '42', 1),
  ('6 * 7 = 42\n#### 42', '6 * 7 = <<6*7=42>>42\n#### 42', 1),
  ('####42', '42', 1),
  ('####   42  ', '42', 1),
  ('####\n42', '42', 1),
  ('#### 42\n', '42', 1),
  ('#### 42.', '42', 1),
  ('#### 42.0', '42', 1),
  ('#### 42.00', '42', 1),
  ('#### 042', '42', 1),
  ('#### 43', '42', 0),
  ('#### 4', '42', 0),
  ('#### 420', '42', 0),
  ('#### 1,080', '1080', 1),
  ('#### 1080', '#### 1,080', 1),
  ('#### 109,200,000', '109200000', 1),
  ('#### 1,0800', '10800', 0),
  ('#### 10,80', '1080', 0),
  ('#### 1{,}080', '1080', 1),
  (r'#### 1\,080', '1080', 1),
  ('#### 1,080.50', '1080.5', 1),
  ('#### $18', '18', 1),
  (r'#### \$18', '18', 1),
  ('#### $ 18', '18', 1),
  ('#### $18.00', '18', 1),
  ('#### €18', '18', 1),
  ('#### 18$', '18', 1),
  ('#### $18.', '18', 1),
  ('#### 18 dollars', '18', 1),
  ('#### 5kg', '5', 1),
  ('#### 12 m^2', '12', 1),
  ('#### 12 cm2', '12', 1),
  ('#### 3pm', '3', 1),
  ('#### 50%', '50', 1),
  ('#### 50 %', '50', 1),
  ('#### -5', '-5', 1),
  ('#### - 5', '-5', 1),
  ('#### - 5', '5', 0),
  ('#### \N{MINUS SIGN}5', '-5', 1),
  ('#### -$5', '-5', 1),
  ('#### $-5', '-5', 1),
  ('#### -5', '5', 0),
  ('#### 5', '-5', 0),
  ('#### 0', '0', 1),
  ('#### -0', '0', 1),
  ('#### 0.1', '0.10', 1),
  ('#### .5', '0.5', 1),
  ('#### 0.1', '0.10000000000000000001', 0),
  ('#### 9007199254740993', '9007199254740992', 0),
  ('#### 1/2', '0.5', 1),
  ('#### 2/4', '1/2', 1),
  ('#### 1/3', '0.333', 0),
  ('#### 1/0', '0', 0),
  (r'#### \frac{1}{2}', '0.5', 1),
  (r'#### 2\frac{1}{2}', '0.5', 0),
  ('#### **42**', '42', 1),
  ('#### The answer is 42', '42', 1),
  ('#### x = 42', '42', 1),
  ('#### (42)', '42', 1),
  ('#### "42"', '42', 1),
  ('#### 42 or 43', '42', 0),
  ('#### 41 42 43', '42', 0),
  ('#### 41, 42', '42', 0),
  ('#### 40 + 2 = 42', '42', 0),
  ('#### 42\nThere were 3 boxes.', '42', 1),
  ('#### 41\n#### 42', '42', 1),
  ('#### 42\n#### 41', '42', 0),
  ('#### 3:30', '30', 0),
  ('#### 1.2.3', '3', 0),
  ('#### v2.5', '5', 0),
  ('#### 2^10', '2', 0),
  ('#### 42e3', '42', 0),
  ('#### 4!', '4', 0),
  ('#### forty-two', '42', 0),
  ('####', '42', 0),
  ('### 42', '42', 0),
  ('The answer is 42', '42', 0),
  ('42', '42', 0),
  ('', '42', 0),
  ('#### ٤٢', '42', 0),
  ('#### 4 2', '42', 0),
  ('#### nan', '42', 0),
  ('#### inf', '42', 0),
]
BOXED = [
  (r'\boxed{42}', '42', 1),
  (r'so \(\boxed{42}\).', '42', 1),
  (r'$\boxed {42}$', '42', 1),
  (r'\boxed{1{,}080}', '1080', 1),
  (r'\boxed{\frac{3}{4}}', '0.75', 1),
  (r'\boxed{-\dfrac{3}{4}}', '-0.75', 1),
  (r'\boxed{42\text{ apples}}', '42', 1),
  (r'\boxed{\$42}', '42', 1),
  (r'\boxed{41} no, \boxed{42}', '42', 1),
  (r'\boxed{42} no, \boxed{41}', '42', 0),
  (r'\boxed{42', '42', 0),
  (r'\boxed{}', '42', 0),
  ('42', '42', 0),
]
LAST = [
  ('The answer is 42.', '42', 1),
  ('First 41, then 42', '42', 1),
  ('42 is more than 41', '42', 0),
  ('It costs $1,080.50.', '1080.5', 1),
  ('10-5', '5', 1),
  ('10-5', '-5', 0),
  ('x = -5', '-5', 1),
  ('(10)-5', '5', 1),
  ('She has <<2*9=18>>18 dollars', '18', 1),
  ('Answer:42', '42', 1),
  ('wait...42', '42', 1),
  ('room B42', '42', 0),
  ('at 3:30', '30', 0),
  ('none', '42', 0),
]
TAGS = [
  ('<think>1</think><answer>42</answer>', '42', 1),
  ('<answer>\n$42\n</answer>', '42', 1),
  ('<answer>41</answer><answer>42</answer>', '42', 1),
  ('<answer>41 42</answer>', '42', 0),
  ('<answer>42', '42', 0),
  ('<think>42</think>', '42', 0),
]
BATTERY = [
  (extract, *case)
  for extract, cases in (
    ('marker', MARKED),
    ('boxed', BOXED),
    ('last', LAST),
    ('tags', TAGS),
  )
  for case in cases
]


@pytest.mark.parametrize(('extract', 'text', 'answer', 'reward'), BATTERY)
def test_m58_accuracy_agrees_with_a_teacher(extract, text, answer, reward):
  assert graded(rewards.accuracy, text, answer=answer, extract=extract) == [
    reward
  ]


def test_reference_may_be_a_number_in_any_field():
  rows = [completion('#### 3'), completion('#### 2.5'), completion('#### 4')]
  examples = [{'n': 3}, {'n': 2.5}, {'n': 5}]
  assert rewards.accuracy(rows, examples, field='n') == [1, 1, 0]


@pytest.mark.parametrize(
  ('example', 'message'),
  [
    ({'solution': '#### 1'}, r"row 1.*no field 'answer'.*solution"),
    ({'answer': 'blue'}, "row 1.*'blue' is not one number"),
    ({'answer': '1 or 2'}, 'row 1.*not one number'),
    ({'answer': None}, 'row 1.*not one number'),
    ({'answer': '#### ' + '9' * 65}, 'row 1.*not one number'),
  ],
)
def test_accuracy_refuses_a_broken_reference(example, message):
  rows = [completion('#### 1')] * 2
  with pytest.raises(ValueError, match=message):
    rewards.accuracy(rows, [{'answer': '1'}, example])


@pytest.mark.parametrize('extract', ['marker', 'boxed', 'last', 'tags'])
@pytest.mark.parametrize(
  'text',
  [
    '#### ' + '9' * 200_000,
    '#### 1e999999999',
    '9^9^9^9^9',
    '#### ' + '1.' * 100_000,
    '1,' * 100_000 + 'x',
    '-' * 200_000,
    '$' * 200_000,
    '7' + ' ' * 200_000 + 'x',
    '\\boxed{' * 30_000,
    '{' * 100_000 + '}' * 100_000,
    '<answer>' * 30_000,
    '####' * 50_000,
    '\\frac{' + '1' * 100_000,
    '\x00\ud800#### \udfff',
  ],
)
def test_m58_hostile_text_earns_nothing_and_ends(text, extract):
  assert graded(rewards.accuracy, text, answer='1', extract=extract) == [0]
  assert graded(rewards.answer_format, text) == [0]
  assert graded(rewards.format_tags, text) == [0]


def test_answer_format_wants_one_marker_and_a_number_at_the_end():
  good = ['#### 42', 'so\n#### -1,080.5\n', '#### $3.', '####7']
  bad = [
    '42', '####', '#### x', '#### 42 apples', '#### 1 2', '#### 4\nbye',
    '#### 1\n#### 1', '', '#### 1,2',
  ]  # fmt: skip
  assert graded(rewards.answer_format, *good) == [1] * len(good)
  assert graded(rewards.answer_format, *bad) == [0] * len(bad)


def test_m59_format_tags_stand_once_and_in_order():
  good = [
    '<think>a</think><answer>b</answer>',
    ' <think>\na\n</think>\n\n<answer>b\n</answer>\n',
    '<think></think><answer></answer>',
  ]
  bad = [
    '',
    'a',
    '<answer>b</answer><think>a</think>',
    '<think>a<answer>b</answer></think>',
    '<think>a</think><answer>b',
    'a</think><answer>b</answer>',
    '<think>a</think><answer>b</answer><answer>c</answer>',
    '<think><think>a</think><answer>b</answer>',
    '<think>a</think> so <answer>b</answer>',
    '<think>a</think><answer>b</answer> done',
    '<THINK>a</THINK><answer>b</answer>',
  ]
  assert graded(rewards.format_tags, *good) == [1] * len(good)
  assert graded(rewards.format_tags, *bad) == [0] * len(bad)
  opened = ['a</think><answer>b</answer>', good[0]]
  assert graded(rewards.format_tags, *opened, opened=True) == [1, 0]
  renamed = '<plan>a</plan><code>b</code>'
  assert graded(
    rewards.format_tags, renamed, good[0], first='plan', second='code'
  ) == [1, 0]


def test_length_penalty_is_a_ramp_in_tokens():
  rows = [completion('x' * 99, n) for n in (0, 60, 61, 70, 79, 80, 81, 500)]
  penalty = rewards.length_penalty(
    rows, [{}] * len(rows), max_length=80, window=20
  )
  np.testing.assert_allclose(
    penalty, [0, 0, -0.05, -0.5, -0.95, -1, -1, -1], rtol=1e-12
  )
  lengths = rewards.num_tokens(rows, [{}] * len(rows))
  assert lengths == [0, 60, 61, 70, 79, 80, 81, 500]
  for window in (0, 81):
    with pytest.raises(ValueError, match=rf'window={window}.*max_length=80'):
      rewards.length_penalty(rows, [], max_length=80, window=window)


def test_finished_reads_truncation():
  rows = [completion(truncated=True), completion()]
  assert rewards.finished(rows, [{}, {}]) == [0, 1]


def test_words_are_whole_and_text_is_literal():
  texts = ['A Cat sat.', 'concatenate', 'hot dogs', 'hot dog!', '']
  assert graded(rewards.mentions_any, *texts, words=('cat', 'hot dog')) == [
    1, 0, 0, 1, 0,
  ]  # fmt: skip
  assert graded(rewards.mentions_any, 'a.b', 'axb', words=('a.b',)) == [1, 0]
  assert graded(rewards.contains, *texts, text='cat') == [0, 1, 0, 0, 0]
  with pytest.raises(ValueError, match='expected words'):
    graded(rewards.mentions_any, 'a', words=('b', ' '))
  with pytest.raises(ValueError, match='name some text'):
    graded(rewards.contains, 'a', text='')


NAMED = [
  'Once upon a time there was a dog named Max.',
  'She had a cat called Tom and a ball.',
  'a cat,\nnamed Mimi',
  'The bear was called Bruno.',
  'a little bird who was named Kiki',
  'a fish whose name was Nemo',
  "The dog's name was Spot.",
  'The dog\u2019s name is Spot.',
  'She saw a frog. Its name was Fred.',
  'Dog named Max',
]
NAMELESS = [
  'There was a girl named Lily who had a dog.',
  'A dog barked. The girl was called Sue.',
  'a dog named the best',
  'a dog named And',
  'a dog called. He ran',
  'The cat called It a day',
  'a dog. Her friend was Lily.',
]


def test_names_animal_wants_the_name_to_be_the_animals():
  assert graded(rewards.names_animal, *NAMED) == [1] * len(NAMED)
  assert graded(rewards.names_animal, *NAMELESS) == [0] * len(NAMELESS)
  assert graded(rewards.names_animal, *NAMELESS, mention=0.25) == [0.25] * len(
    NAMELESS
  )
  others = ['a hotdog named Max', 'dogs named Max', 'a robot named Max', '']
  assert graded(rewards.names_animal, *others, mention=0.5) == [0] * 4
  assert graded(rewards.names_animal, others[2], animals=('robot',)) == [1]
  with pytest.raises(ValueError, match='mention=2'):
    graded(rewards.names_animal, 'a', mention=2.0)


def test_an_animal_story_ends_by_itself_names_and_is_long_enough():
  named, nameless = NAMED[0], NAMELESS[0]
  rows = [
    completion(text, truncated=truncated)
    for text in (named, nameless)
    for truncated in (False, True)
  ]
  examples = [{}] * len(rows)
  assert rewards.animal_story(rows, examples) == [1, 0, 0, 0]
  parts = zip(
    rewards.finished(rows, examples),
    rewards.names_animal(rows, examples),
    strict=True,
  )
  assert rewards.animal_story(rows, examples) == [a * b for a, b in parts]
  length = len(named.split())
  for min_words, reward in ((length, 1), (length + 1, 0)):
    assert graded(rewards.animal_story, named, min_words=min_words) == [reward]
  padded = named.replace(' ', ' \n  ')
  assert graded(rewards.animal_story, padded, min_words=length + 1) == [0]
  robot = 'a robot named Max'
  assert graded(rewards.animal_story, robot) == [0]
  assert graded(rewards.animal_story, robot, animals=('robot',)) == [1]
  with pytest.raises(ValueError, match='expected words'):
    graded(rewards.animal_story, named, animals=())


def test_every_reward_ignores_the_batch_around_a_row():
  needed = {
    'choice': {'field': 'letter'},
    'contains': {'text': '4'},
    'mentions_any': {'words': ('42',)},
    'length_penalty': {'max_length': 8, 'window': 4},
  }
  rows = [completion('#### 42', 3), completion('a dog named Max', 7, True)]
  examples = [{'answer': '42', 'letter': 'B'}, {'answer': '1', 'letter': 'C'}]
  for name in rewards.__all__:
    fn = functools.partial(getattr(rewards, name), **needed.get(name, {}))
    kinds = {p.kind.name for p in inspect.signature(fn).parameters.values()}
    assert kinds <= {'POSITIONAL_OR_KEYWORD', 'KEYWORD_ONLY'}
    together = fn(rows, examples)
    assert together == [
      fn([r], [e])[0] for r, e in zip(rows, examples, strict=True)
    ]
    assert all(isinstance(value, float) for value in together)


def test_scores_keep_the_order_of_the_functions():
  rows = [completion('#### 4', 3), completion('5', 9, True)]
  examples = [{'answer': '4'}] * 2
  result = scores.score_completions(
    {
      'right': rewards.accuracy,
      'short': rewards.num_tokens,
      'odd': lambda rows, examples: (True, np.float32(0.5)),
      'array': lambda rows, examples: np.array([1, 2]),
    },
    rows,
    examples,
  )
  assert result.rewards.dtype == np.float32
  np.testing.assert_array_equal(
    result.rewards, [[1, 0], [3, 9], [1, 0.5], [1, 2]]
  )
  np.testing.assert_array_equal(result.num_failures, [0, 0, 0, 0])


@pytest.mark.parametrize(
  ('returned', 'message'),
  [
    ([0.0], "reward 'mine' returned 1 values for 3 completions"),
    ([0.0] * 4, 'returned 4 values'),
    (1.0, 'expected a list of 3 floats'),
    (np.ones(()), 'expected a list of 3 floats'),
    ('abc', 'expected a list of 3 floats'),
    (None, 'returned None'),
    ([0.0, None, 0.0], 'returned None for row 1'),
    ([0.0, 0.0, float('nan')], "returned nan for row 2.*failures='zero'"),
    ([float('-inf'), 0.0, 0.0], 'returned -inf for row 0'),
    ([1e39, 0.0, 0.0], 'row 0'),
    ([10**400, 0.0, 0.0], 'row 0'),
    ([0.0, '1', 0.0], "returned '1' for row 1"),
    (np.ones((3, 1)), 'row 0'),
  ],
)
def test_scores_refuse_what_would_be_silently_wrong(returned, message):
  with pytest.raises(ValueError, match=message):
    scores.score_completions(
      {'mine': lambda rows, examples: returned}, [completion()] * 3, [{}] * 3
    )


def test_scores_name_a_function_that_raises():
  def mine(rows, examples):
    raise KeyError('solution')

  for failures in ('error', 'zero'):
    with pytest.raises(
      ValueError, match=r"'mine' raised KeyError.*sol"
    ) as info:
      scores.score_completions(
        {'mine': mine}, [completion()], [{}], failures=failures
      )
    assert isinstance(info.value.__cause__, KeyError)
  with pytest.raises(ValueError, match='1 completions but 2 examples'):
    scores.score_completions({}, [completion()], [{}, {}])


def test_scores_count_failures_and_give_up_on_many():
  rows, examples = [completion()] * 5, [{}] * 5

  def score(values):
    return scores.score_completions(
      {'mine': lambda rows, examples: values}, rows, examples, failures='zero'
    )

  result = score([1.0, None, 1.0, 0.5, 1.0])
  np.testing.assert_array_equal(result.rewards, [[1, 0, 1, 0.5, 1]])
  np.testing.assert_array_equal(result.num_failures, [1])
  with pytest.raises(ValueError, match='2 of 5 rows'):
    score([1.0, None, float('nan'), 0.5, 1.0])


def test_the_index_of_the_module_is_complete():
  functions = {
    name
    for name, value in vars(rewards).items()
    if isinstance(value, types.FunctionType)
  }
  assert functions == set(rewards.__all__)


def lines(name):
  path = pathlib.Path(DATA or '', 'gsm8k', name)
  return [json.loads(line) for line in path.read_text('utf-8').splitlines()]


@pytest.mark.skipif(DATA is None, reason='POSTRAIN_DATA is not set')
def test_reference_answers_earn_their_reward():
  examples = lines('train.jsonl')
  rows = [completion(example['answer']) for example in examples]
  assert len(rows) == 7473
  assert sum(rewards.accuracy(rows, examples)) == 7473
  assert sum(rewards.answer_format(rows, examples)) == 7473
  assert sum(rewards.accuracy(rows, examples, extract='last')) == 7473


@pytest.mark.skipif(DATA is None, reason='POSTRAIN_DATA is not set')
def test_grades_agree_with_published_labels():
  agreed = []
  for example in lines('example_model_solutions.jsonl'):
    for answer in example.values():
      if isinstance(answer, dict):
        [reward] = rewards.accuracy(
          [completion(answer['solution'])],
          [example],
          marker='A:',
          field='ground_truth',
        )
        agreed.append(bool(reward) == answer['is_correct'])
  assert len(agreed) == 4 * 1319
  assert np.mean(agreed) >= 0.995
