"""Environments: pure functions of their arguments, and rewards as texts."""

import pathlib

import numpy as np
import pytest
import tiny

from postrain import environments
from postrain.binding import bind
from postrain.environments import Environment
from postrain.environments.record import reward_weights
from postrain.recipe import plain
from postrain.types import Prompts, Samples


def make(config: object) -> Environment:
  block = plain(config)
  return bind(environments, block['environment'])(
    block['seed'], block['rewards']
  )


@pytest.fixture
def written(tmp_path: pathlib.Path) -> Environment:
  return make(tiny.text(tmp_path))


def test_nothing_is_compiled_to_make_one(tmp_path: pathlib.Path) -> None:
  compiled = len(tiny.compilations)
  for config in (tiny.sort(), tiny.arithmetic(), tiny.text(tmp_path)):
    make(config)
  assert tiny.compilations[compiled:] == []


def same(left: Prompts, right: Prompts) -> bool:
  return left.examples == right.examples and np.array_equal(
    left.tokens, right.tokens
  )


@pytest.mark.parametrize('kind', ['arithmetic', 'text'])
def test_prompts_are_a_function_of_the_iteration(
  kind: str, tmp_path: pathlib.Path
) -> None:
  config = tiny.text(tmp_path) if kind == 'text' else tiny.arithmetic()
  first, second = make(config), make(config)
  later = first.prompts(5, 4)
  assert same(later, second.prompts(5, 4))
  assert not same(later, first.prompts(6, 4))
  config.seed = 1
  assert not same(later, make(config).prompts(5, 4))
  assert same(first.held_out(3), second.held_out(3))
  assert later.tokens.shape[1] <= first.prompt_length


@pytest.mark.parametrize('kind', ['arithmetic', 'text'])
def test_demonstrations_train_the_completion_alone(
  kind: str, tmp_path: pathlib.Path
) -> None:
  config = tiny.text(tmp_path) if kind == 'text' else tiny.arithmetic()
  made = make(config)
  tokens, valid, mask = made.demonstrations(2, 4, None)
  again = made.demonstrations(2, 4, None)
  np.testing.assert_array_equal(tokens, again[0])
  assert tokens.shape == valid.shape == mask.shape
  assert len(tokens) == 4
  assert tokens.shape[1] <= made.demonstration_length
  assert not (mask & ~valid).any()
  for row in range(4):
    ids = tokens[row][mask[row]]
    assert ids[-1] == made.stop_ids[0]
    left, right = made.text(tokens[row][valid[row] & ~mask[row]])[:-1].split(
      '+'
    )
    answer = ids[:-1]
    assert made.text(answer) == str(int(left) + int(right))


def test_few_demonstrations_are_repeated(written: Environment) -> None:
  tokens, valid, _ = written.demonstrations(0, 6, 2)
  texts = [written.text(t[v]) for t, v in zip(tokens, valid, strict=True)]
  assert sorted(set(texts)) == ['0+0=0<|eos|>', '0+1=1<|eos|>']
  assert len(texts) == 6


def test_rewards_see_the_text_without_its_end(tmp_path: pathlib.Path) -> None:
  config = tiny.text(tmp_path)
  config.rewards.number = dict(name='tiny:number', weight=0.0)
  written = make(config)
  prompts = written.prompts(0, 1)
  digits = [written.tokenizer.encode(c)[0] for c in '42']
  stop = written.stop_ids[0]
  tokens = np.array([[*digits, stop], [*digits, digits[0]]])
  ended = np.array([stop in row for row in tokens])
  zeros = np.zeros(tokens.shape, np.float32)
  samples = Samples(tokens, tokens >= 0, zeros, zeros, ~ended, None)
  rewards = written.rewards(prompts, samples)
  assert rewards.keys() == {'length', 'finished', 'number'}
  assert rewards['number'].tolist() == [42, 424]
  assert rewards['length'].tolist() == [3, 3]
  assert rewards['finished'].tolist() == [1, 0]


def test_task_has_demonstrations_only_with_solutions() -> None:
  assert make(tiny.sort()).demonstrations is not None
  config = tiny.sort()
  config.environment = dict(name='task', task=dict(name='tabular'))
  config.rewards = dict(only=dict(name='table', weight=1.0))
  assert make(config).demonstrations is None


def test_reward_weights() -> None:
  blocks = {'a': {'name': 'x', 'weight': 1}, 'b': {'name': 'y', 'weight': 0.0}}
  assert reward_weights(blocks) == {'a': 1.0, 'b': 0.0}


@pytest.mark.parametrize(
  ('blocks', 'message'),
  [
    ({'a': {'name': 'x'}}, 'rewards.a=.* needs a finite number'),
    ({'a': {'weight': True}}, 'rewards.a=.* needs a finite number'),
    ({'a': {'weight': float('inf')}}, 'rewards.a=.* needs a finite number'),
    ({'a': None}, 'rewards.a=None: it needs a finite number'),
  ],
)
def test_reward_weights_that_are_none(blocks: dict, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    reward_weights(blocks)


CHAT = [
  {'role': 'user', 'content': '1+1='},
  {'role': 'assistant', 'content': '2'},
  {'role': 'user', 'content': '2+2='},
  {'role': 'assistant', 'content': '4'},
]


def chats(folder: pathlib.Path, **changes: object) -> Environment:
  """An environment of one conversation, in training and held out."""
  config = tiny.text(folder)
  path = str(tiny.json_lines(folder / 'chats.jsonl', [{'messages': CHAT}]))
  config.environment.update(
    train=path, held_out=path, prompt='messages', conversations='messages',
    completion=None, style='chat', max_prompt_length=200, max_length=200,
    stop_ids=None,
  )  # fmt: skip
  with config.environment.unlocked():
    config.environment.update(changes)
  return make(config)


def test_conversations_train_every_turn_of_the_assistant(
  tmp_path: pathlib.Path,
) -> None:
  made = chats(tmp_path)
  tokens, valid, mask = made.demonstrations(0, 1, None)
  prompt = made.prompts(0, 1)
  learnt = tokens[0][mask[0]]
  ends = np.flatnonzero(learnt == made.stop_ids[0])
  assert len(ends) == 2
  assert made.text(learnt[: ends[0]]).strip() == '2'
  assert made.text(learnt[ends[0] + 1 : ends[1]]).strip() == '4'
  # The prompt of a rollout is what stands before the last of them.
  before = prompt.tokens[0][prompt.mask[0]]
  np.testing.assert_array_equal(before, tokens[0][: len(before)])
  assert mask[0][len(before) : valid[0].sum()].any()
  assert '4' not in made.text(before)
  assert prompt.examples[0]['messages'] == CHAT[:3]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'style': 'plain'}, "conversations='messages' .*style='plain'"),
    ({'completion': 'messages'}, "completion='messages'"),
    ({'conversations': 'talk'}, "no field 'talk'"),
  ],
)
def test_conversations_that_cannot_be_learnt(
  changes: dict, message: str, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(ValueError, match=message):
    chats(tmp_path, **changes)
