"""Thoughts and answers: tags in any disorder, flags of which the last wins."""

import doctest

from hypothesis import given
from hypothesis import strategies as st
import pytest

from postrain import thinking


def test_the_examples_of_the_docstrings():
  failed, tried = doctest.testmod(thinking)
  assert not failed
  assert tried


@pytest.mark.parametrize(
  ('text', 'thought', 'answer'),
  [
    ('4', None, '4'),
    ('', None, ''),
    ('<think>so</think>4', 'so', '4'),
    ('<think></think>4', '', '4'),
    ('<think>\nso\n</think>\n\n4\n', '\nso\n', '\n\n4\n'),
    ('so</think>4', 'so', '4'),  # the prompt has opened it
    ('<think>so 4', 'so 4', ''),  # cut off
    ('<think>so</think>', 'so', ''),
    ('</think>', '', ''),
    ('Well. <think>so</think>4', 'so', '4'),
    ('<think>a<think>b</think>c</think>4', 'a<think>b</think>c', '4'),
    ('<think>a</think>5<think>b</think>4', 'a</think>5<think>b', '4'),
    ('<think>a</think>5<think>b', 'a</think>5<think>b', ''),
    ('</think><think>4', '4', ''),
    ('<Think>so</Think>4', None, '<Think>so</Think>4'),
  ],
)
def test_split(text, thought, answer):
  assert thinking.split(text) == (thought, answer)


@given(st.lists(st.sampled_from(['<think>', '</think>', 'a', '\n', '<']))
       .map(''.join))  # fmt: skip
def test_an_answer_has_no_tag(text):
  thought, answer = thinking.split(text)
  assert '<think>' not in answer
  assert '</think>' not in answer
  assert text.endswith(answer)
  assert (thought or '') in text


def messages(*texts):
  roles = ('user', 'assistant')
  return [
    {'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)
  ]


@pytest.mark.parametrize(
  ('texts', 'wanted'),
  [
    (['2+2?'], True),
    (['2+2? /no_think'], False),
    (['/no_think 2+2? /think'], True),
    (['/think', '4', '3? /no_think'], False),
    (['/no_think', '4', '3?'], False),  # it stays until another one
    (['/no_think', '4 /think', '3?'], False),  # said by the assistant
    (['see a/no_think and /no_thinking, /think.'], True),
    (['2+2?\n/no_think'], False),
  ],
)
def test_the_last_flag_wins(texts, wanted):
  assert thinking.wants_thinking(messages(*texts)) is wanted
  call = {'role': 'assistant', 'content': None, 'tool_calls': [{}]}
  assert thinking.wants_thinking([*messages(*texts), call]) is wanted


def test_the_system_has_a_flag_too():
  system = {'role': 'system', 'content': 'Be brief. /no_think'}
  assert not thinking.wants_thinking([system, *messages('2+2?')])
  assert thinking.wants_thinking([system, *messages('2+2? /think')])


def test_fused():
  question = messages('1+1?', '2', '2+2? /no_think')
  for mode, flag, block in (
    ('think', ' /think', 'so'),
    ('no_think', ' /no_think', ''),
    (None, '', ''),
  ):
    made = thinking.fused(question, 'so', '4', mode=mode)
    assert made[:2] == question[:2]
    assert made[2]['content'] == '2+2? /no_think' + flag
    assert made[3] == {
      'role': 'assistant',
      'content': f'<think>{block}</think>4',
    }
    assert thinking.split(made[3]['content']) == (block, '4')
  assert question == messages('1+1?', '2', '2+2? /no_think')
  [asked, answered] = thinking.fused('2+2?', 'so', '4')
  assert asked == {'role': 'user', 'content': '2+2?'}
  assert answered['content'] == '<think>so</think>4'
  assert thinking.fused('x', '', '4', mode='no_think')[1]['content'] == (
    '<think></think>4'
  )


def test_fused_refuses_what_would_teach_a_broken_block():
  for arguments, match in (
    (('x', 'so', ' '), r"answer=' '"),
    (('x', '', '4'), r"thoughts=''.*no_think"),
    (('x', 'a</think>b', '4'), r'thoughts=.*remove <think>'),
    (('x', 'so', '<think>4'), r'answer=.*remove <think>'),
    (([], 'so', '4'), r'question=\[\].*one of the user'),
    ((messages('x', 'y'), 'so', '4'), r'question=.*one of the user'),
  ):
    with pytest.raises(ValueError, match=match):
      thinking.fused(*arguments)
