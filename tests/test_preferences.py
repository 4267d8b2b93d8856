"""Preference data: rows of many layouts to one form, and to arrays."""

import gzip
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import data, losses, tokenizers
from postrain.batches import mismatched, weigh_units
from postrain.data.preferences import Tie
from postrain.models.wrap import plain
from postrain.reward_models import completion_objective
from postrain.types import Batch

DATA = os.environ.get('POSTRAIN_DATA')
TOKENIZER = tokenizers.byte_level()
PAD, EOS = 0, 1


def said(role, content):
  return {'role': role, 'content': content}


ASKED = [said('system', 'be kind'), said('user', 'hi'), said('assistant', 'oh')]
ASKED.append(said('user', 'why'))
GOOD, BAD = said('assistant', 'so'), said('assistant', 'no')
TEXT = '\n\nHuman: hi\n\nAssistant: oh\n\nHuman: why\n\nAssistant:'
PAIRS = {
  'text': {'prompt': 'why', 'chosen': 'so', 'rejected': 'no'},
  'text in a transcript': {'prompt': TEXT, 'chosen': 'so', 'rejected': 'no'},
  'messages': {'prompt': ASKED, 'chosen': [GOOD], 'rejected': [BAD]},
  'messages and text': {'prompt': ASKED, 'chosen': 'so', 'rejected': [BAD]},
  'conversations': {'chosen': [*ASKED, GOOD], 'rejected': [*ASKED, BAD]},
  'conversations and prompt': {
    'prompt': 'why',
    'chosen': [said('user', 'why'), GOOD],
    'rejected': [said('user', 'why'), BAD],
  },
  'transcripts': {'chosen': TEXT + ' so', 'rejected': TEXT + ' no\n'},
}
PROMPTS = {
  'text': 'why',
  'text in a transcript': TEXT,
  'conversations and prompt': [said('user', 'why')],
  'transcripts': ASKED[1:],
}


@pytest.mark.parametrize('layout', PAIRS)
def test_layouts_of_pairs_have_one_form(layout):
  form = data.Preference(PROMPTS.get(layout, ASKED), ('so', 'no'), (0, 1))
  assert data.preference(PAIRS[layout]) == form
  extra = {**PAIRS[layout], 'margin': 2, 'tools': [{}], 'completions': None}
  form = form._replace(margin=2.0, tools=[{}])
  assert data.preference(extra) == form


def test_an_answer_alone_keeps_all_of_the_prompt():
  """A conversation knows the system's message where a prompt is its text."""
  asked = ASKED[:2]
  row = {'prompt': 'hi', 'completion': [*asked, GOOD], 'label': False}
  assert data.preference(row) == data.Preference(
    asked, ('so',), desirable=False
  )
  called = {'role': 'assistant', 'content': None, 'tool_calls': [{}]}
  asked = [*asked, called, said('tool', '4')]
  row = {'prompt': asked, 'completion': 'so', 'label': True}
  assert data.preference(row).prompt == asked


def test_rankings_count_ranks_from_the_best():
  row = {'prompt': 'p', 'completions': ['a', [GOOD], 'c', 'a']}
  expected = data.Preference('p', ('a', 'so', 'c', 'a'), (1, 0, 2, 1))
  assert data.preference({**row, 'ranks': [3, 1, 9, 3]}) == expected
  assert data.preference({**row, 'scores': [0.5, 2, -1, 0.5]}) == expected


BROKEN = [
  ({'chosen': 'a'}, 'the fields are chosen: expected either'),
  ({}, 'the fields are none'),
  (
    PAIRS['text'] | {'completion': 'a', 'label': True},
    'remove those of another kind',
  ),
  ({'chosen': 'a b', 'rejected': 'a c'}, 'chosen has no prompt before it'),
  ({'chosen': [GOOD], 'rejected': [BAD]}, 'chosen has no prompt before it'),
  (PAIRS['text'] | {'prompt': ' '}, "field prompt is ' '"),
  (PAIRS['text'] | {'prompt': 3}, 'field prompt is 3: expected a text'),
  (PAIRS['text'] | {'prompt': [GOOD]}, 'prompt: message 0 .* out of order'),
  (PAIRS['text'] | {'prompt': ASKED[:3]}, "prompt ends with .* 'assistant'"),
  (
    PAIRS['text'] | {'rejected': ' \n'},
    "rejected: ' \\\\n' is no answer",
  ),
  (PAIRS['text'] | {'rejected': 3}, 'field rejected: 3 is no answer'),
  (PAIRS['text'] | {'rejected': []}, 'rejected: .* is no answer'),
  (
    PAIRS['messages'] | {'rejected': [said('assistant', ' ')]},
    'rejected: message 1 .assistant. has content=',
  ),
  (
    PAIRS['messages'] | {'rejected': [BAD, said('user', 'x'), GOOD]},
    'rejected: 3 messages after the prompt',
  ),
  (
    PAIRS['messages'] | {'chosen': [GOOD | {'tool_calls': [{}]}]},
    'chosen: it ends with .* no tool_calls or',
  ),
  (PAIRS['conversations'] | {'rejected': ASKED}, "rejected: .*'user'.*answer"),
  (
    PAIRS['conversations'] | {'rejected': [*ASKED[1:], BAD]},
    'chosen and rejected have no common beginning',
  ),
  (
    PAIRS['conversations'] | {'prompt': 'hi'},
    'prompt and chosen have no common beginning',
  ),
  (
    PAIRS['conversations'] | {'chosen': [*ASKED, ASKED[1], GOOD]},
    "chosen: message 4 has the role 'user' after 'user'",
  ),
  (
    PAIRS['conversations'] | {'chosen': [ASKED[1], ASKED[0], GOOD]},
    "message 1 has the role 'system' after 'user'",
  ),
  (
    PAIRS['conversations'] | {'chosen': [said('human', 'x'), GOOD]},
    'message 0 is .* role of system, user',
  ),
  (PAIRS['conversations'] | {'chosen': ['x', GOOD]}, "message 0 is 'x'"),
  (PAIRS['conversations'] | {'chosen': [said([], 'x')]}, 'message 0 is .*role'),
  (
    PAIRS['transcripts'] | {'rejected': TEXT + ' no\n\nHuman: x'},
    "rejected: it ends with .*'user'",
  ),
  (PAIRS['transcripts'] | {'rejected': TEXT}, 'rejected: message 3 .*empty'),
  (
    PAIRS['transcripts'] | {'chosen': TEXT + ' so\n\nAssistant: so'},
    "message 4 has the role 'assistant' after 'assistant'",
  ),
  (
    PAIRS['transcripts'] | {'chosen': 'x' + TEXT + ' so'},
    'chosen has no prompt before it',
  ),
  (
    PAIRS['transcripts'] | {'chosen': TEXT.replace('oh', 'ah') + ' so'},
    'no common beginning',
  ),
  (PAIRS['text'] | {'margin': -1}, 'margin is -1'),
  (PAIRS['text'] | {'margin': True}, 'margin is True'),
  (PAIRS['text'] | {'margin': 10**400}, 'margin is 1000'),
  (PAIRS['text'] | {'preference': 1.5}, 'preference is 1.5: .* from 0 to 1'),
  (PAIRS['text'] | {'preference': 0, 'margin': 1}, 'margin is 1.0 and pref'),
  ({'prompt': 'p', 'completion': 'a', 'label': 1}, 'label is 1: expected true'),
  ({'prompt': 'p', 'completions': ['a'], 'ranks': [0]}, 'two or more'),
  ({'prompt': 'p', 'completions': 'ab', 'ranks': [0, 1]}, 'two or more'),
  ({'prompt': 'p', 'completions': ['a', 'b']}, 'come with no order'),
  (
    {'prompt': 'p', 'completions': ['a', 'b'], 'ranks': [0, 1], 'scores': [1]},
    'come with ranks and scores',
  ),
  ({'prompt': 'p', 'completions': ['a', 'b'], 'ranks': [1]}, 'expected 2 num'),
  (
    {'prompt': 'p', 'completions': ['a', 'b'], 'scores': [1, float('inf')]},
    'scores is .*expected 2 numbers',
  ),
  (
    {'prompt': 'p', 'completions': ['a', 'b', 'a'], 'ranks': [0, 1, 2]},
    "'a' twice",
  ),
  ({'prompt': 'p', 'completions': ['a', ''], 'ranks': [0, 1]}, r'\[1\]: .* no'),
]


@pytest.mark.parametrize(('row', 'message'), BROKEN)
def test_broken_rows_are_refused_with_field_and_remedy(row, message):
  with pytest.raises(ValueError, match=message) as caught:
    data.preference(row)
  assert not isinstance(caught.value, Tie)


TIES = [
  PAIRS['text'] | {'rejected': 'so'},
  PAIRS['transcripts'] | {'rejected': TEXT + 'so '},
  {'prompt': 'p', 'completions': ['a', 'b'], 'ranks': [2, 2]},
]


def written(path, rows):
  path.write_text('\n\n'.join(map(json.dumps, rows)))
  return path


def test_ties_and_broken_rows_are_errors_or_dropped(tmp_path):
  bad, good = BROKEN[0][0], PAIRS['text']
  for tie in TIES:
    with pytest.raises(Tie, match="ties='drop'"):
      data.preference(tie)
    path = written(tmp_path / 'a.jsonl', [good, tie, bad, good])
    # Blank lines stand between: the number is that of the line.
    with pytest.raises(ValueError, match=r'a\.jsonl, row 3: .* same'):
      data.read_preferences(path, broken='drop')
    with pytest.raises(ValueError, match=r'a\.jsonl, row 5: the fields are'):
      data.read_preferences(path, ties='drop')
    kept = data.read_preferences(path, ties='drop', broken='drop')
    assert kept == [data.preference(good)] * 2
  assert data.read_preferences(path, num_examples=1) == kept[:1]
  path = written(tmp_path / 'b.jsonl', [tie, bad])
  with pytest.raises(ValueError, match=r'no row is left of 2; .*row 1: all'):
    data.read_preferences(path, ties='drop', broken='drop')


def test_compressed_files_are_read(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  whole = gzip.compress(json.dumps(PAIRS['transcripts']).encode())
  path.write_bytes(whole)
  assert len(data.read_preferences(path)) == 1
  for wrong in (whole[:-9], b'{}', whole[:12] + b'\xff' * 20):
    path.write_bytes(wrong)
    with pytest.raises(ValueError, match=r'a\.jsonl\.gz is no whole gzip file'):
      data.read_jsonl(path, fields=[])


def rows_alone(prompt, completions, **options):
  """Each row as a demonstration of its own."""
  return [
    data.encode_demonstrations(
      TOKENIZER, [{'prompt': prompt, 'completion': text}], **options
    )
    for text in completions
  ]


def check_rows(arrays, examples, unit_size, **options):
  """Row by row the tokens of demonstrations; empty rows behind them."""
  units = (np.reshape(x, (-1, unit_size, x.shape[1])) for x in arrays[:3])
  for example, tokens, valid, mask in zip(examples, *units, strict=True):
    alone = rows_alone(example.prompt, example.completions, **options)
    for i, one in enumerate(alone):
      np.testing.assert_array_equal(tokens[i][valid[i]], one[0][one[1]])
      np.testing.assert_array_equal(tokens[i][mask[i]], one[0][one[2]])
      assert (tokens[i][mask[i]] == EOS).tolist() == [0] * (
        mask[i].sum() - 1
      ) + [1]
    assert not valid[len(alone) :].any()
    assert not mask[~valid].any()
    assert (tokens[~valid] == PAD).all()


@pytest.mark.parametrize('layout', PAIRS)
def test_pairs_are_units_of_two_demonstrations(layout):
  example = data.preference(PAIRS[layout])
  style = 'plain' if isinstance(example.prompt, str) else 'chat'
  pairs = data.encode_pairs(TOKENIZER, [example], max_length=64, style=style)
  check_rows(pairs, [example], 2, max_length=64, style=style)
  assert pairs.margins is None
  worse_first = example._replace(
    completions=example.completions[::-1], ranks=(4, 2), margin=0.5
  )
  again = data.encode_pairs(
    TOKENIZER, [worse_first], max_length=64, style=style
  )
  for one, other in zip(pairs[:3], again[:3], strict=True):
    np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(again.margins, np.full(2, 0.5, np.float32))


def test_rankings_fill_their_units_up():
  rows = [
    {'prompt': 'ab', 'completions': ['c', 'de', 'f'], 'ranks': [1, 0, 1]},
    {'prompt': 'x', 'completions': ['y', 'z' * 9], 'scores': [0, 1]},
  ]
  examples = [*map(data.preference, rows), data.preference(PAIRS['text'])]
  arrays = data.encode_rankings(
    TOKENIZER, examples, num_completions=4, max_length=16
  )
  check_rows(arrays, examples, 4, max_length=16)
  expected = [1, 0, 1, 4, 1, 0, 4, 4, 0, 1, 4, 4]
  np.testing.assert_array_equal(arrays.ranks, np.array(expected, np.int32))
  dropped = data.encode_rankings(
    TOKENIZER, examples, num_completions=4, max_length=8, too_long='drop'
  )
  check_rows(dropped, examples[::2], 4, max_length=8)
  np.testing.assert_array_equal(dropped.ranks, expected[:4] + expected[-4:])


def test_labels_stand_beside_single_rows():
  rows = [
    {'prompt': 'p', 'completion': text, 'label': text in 'ab'}
    for text in ('a', 'longer', 'b', 'c')
  ]
  examples = list(map(data.preference, rows))
  arrays = data.encode_labels(TOKENIZER, examples, max_length=8)
  check_rows(arrays, examples, 1, max_length=8)
  np.testing.assert_array_equal(arrays.desirable, [True, False, True, False])
  assert arrays.desirable.dtype == bool
  arrays = data.encode_labels(
    TOKENIZER, examples, max_length=4, too_long='drop'
  )
  np.testing.assert_array_equal(arrays.desirable, [True, True, False])


def test_a_pair_goes_as_a_whole():
  rows = [
    {'prompt': 'a', 'chosen': 'b', 'rejected': 'c' * 8, 'margin': 1},
    {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': 2},
  ]
  examples = list(map(data.preference, rows))
  with pytest.raises(ValueError, match=r'row 0: .* 10 tokens, max_length=4'):
    data.encode_pairs(TOKENIZER, examples, max_length=4)
  pairs = data.encode_pairs(TOKENIZER, examples, max_length=4, too_long='drop')
  check_rows(pairs, examples[1:], 2, max_length=4)
  np.testing.assert_array_equal(pairs.margins, [2, 2])
  with pytest.raises(ValueError, match='no example is left of 1'):
    data.encode_pairs(TOKENIZER, examples[:1], max_length=4, too_long='drop')
  examples[0] = examples[0]._replace(margin=None)
  with pytest.raises(ValueError, match='1 of 2 pairs have a margin'):
    data.encode_pairs(TOKENIZER, examples, max_length=16)


def test_the_chance_of_a_label_stands_beside_both_rows():
  rows = [PAIRS['text'] | {'preference': chance} for chance in (1, 0.25)]
  examples = list(map(data.preference, rows))
  pairs = data.encode_pairs(TOKENIZER, examples, max_length=64)
  np.testing.assert_array_equal(pairs.preference, [1, 1, 0.25, 0.25])
  with pytest.raises(ValueError, match=r'row 0: preference=1\.0, but the ord'):
    data.encode_rankings(TOKENIZER, examples, num_completions=2, max_length=64)


def test_kinds_are_not_taken_for_one_another():
  pair = data.preference(PAIRS['text'])
  label = data.preference({'prompt': 'p', 'completion': 'a', 'label': True})
  three = pair._replace(completions=('a', 'b', 'c'), ranks=(0, 1, 1))
  limits = {'max_length': 64}
  for example in (label, three, pair._replace(ranks=(0, 0))):
    with pytest.raises(ValueError, match=r'row 1: .*expected two, one better'):
      data.encode_pairs(TOKENIZER, [pair, example], **limits)
  for example in (label, three):
    with pytest.raises(ValueError, match=r'row 1: .*num_completions=2: raise'):
      data.encode_rankings(
        TOKENIZER, [pair, example], num_completions=2, **limits
      )
  with pytest.raises(ValueError, match=r'row 1: 2 completions without a label'):
    data.encode_labels(TOKENIZER, [label, pair], **limits)
  messages = data.preference(PAIRS['messages'])
  with pytest.raises(ValueError, match=r"row 1: .*set style='chat'"):
    data.encode_pairs(TOKENIZER, [pair, messages], **limits)


def test_arrays_are_what_objectives_read():
  """Scores of 0 pay log 2 a pair, and log K! a ranking of K."""
  blind = plain(
    lambda key: {'score': jnp.zeros((1, 1))},
    lambda params, tokens, positions, ids: jnp.ones((*tokens.shape, 1)),
    lambda params, hidden: hidden @ params['score'],
    300,
  )
  pair = data.preference(PAIRS['text'] | {'margin': 0})
  three = pair._replace(completions=('a', 'b', 'c'), ranks=(2, 0, 1))
  pairs = data.encode_pairs(TOKENIZER, [pair] * 3, max_length=8)
  ranked = data.encode_rankings(
    TOKENIZER, [pair, three], num_completions=4, max_length=8
  )
  for arrays, unit_size, loss, expected in (
    (pairs, 2, losses.bradley_terry, np.log(2)),
    (ranked, 4, losses.plackett_luce, (np.log(2) + np.log(6)) / 2),
  ):
    rows = arrays._asdict()
    batch = Batch(
      *(jnp.asarray(rows.pop(name)) for name in ('tokens', 'valid', 'mask')),
      weights={},
      arrays=jax.tree.map(jnp.asarray, rows),
      unit_size=unit_size,
    )
    objective = jax.jit(completion_objective(blind, loss=loss))
    params = {'reward_model': {'score': jnp.zeros((1, 1))}}
    total, _ = objective(params, {}, weigh_units(batch))
    assert float(total) == pytest.approx(expected)


def test_aligned_prompts_take_the_completions_of_others():
  rows = [
    {'prompt': 'ab', 'completion': 'cde', 'label': True},
    {'prompt': 'v', 'completion': 'wx', 'label': False},
  ]
  examples = list(map(data.preference, rows))
  arrays = data.encode_labels(TOKENIZER, examples, max_length=16)
  aligned = data.align_prompts(arrays, prompt_length=3)
  assert aligned.tokens.dtype == np.int32
  assert aligned.tokens.shape == (2, 3 + 4)
  for one, other in (
    (arrays.valid, aligned.valid),
    (arrays.mask, aligned.mask),
  ):
    assert other.dtype == bool
    np.testing.assert_array_equal(arrays.tokens[one], aligned.tokens[other])
  assert aligned.mask[:, 3].all()
  assert not aligned.mask[:, :3].any()
  assert not aligned.tokens[~aligned.valid].any()
  batch = Batch(*map(jnp.asarray, aligned[:3]), weights={}, arrays={})
  other = mismatched(batch, prompt_length=3)
  texts = [
    TOKENIZER.decode(np.asarray(row[seen]))
    for row, seen in zip(other.tokens, other.valid, strict=True)
  ]
  assert texts == ['abwx<|eos|>', 'vcde<|eos|>']
  with pytest.raises(ValueError, match=r'row 0: the prompt has 2 .*raise'):
    data.align_prompts(arrays, prompt_length=1)
  pair = data.encode_pairs(
    TOKENIZER, [data.preference(PAIRS['text'] | {'margin': 1})], max_length=8
  )
  aligned = data.align_prompts(pair, prompt_length=3)
  np.testing.assert_array_equal(aligned.tokens, pair.tokens[:, :6])
  np.testing.assert_array_equal(aligned.margins, pair.margins)


SOLVED = [
  {
    'question': '1+1?',
    'truth': '2',
    'x': {'solution': 'two', 'is_correct': True},
    'y': {'solution': 'three', 'is_correct': False},
    'z': {'solution': 'four', 'is_correct': False},
    'w': {'solution': '2', 'is_correct': True},
    'v': {'solution': 'four', 'is_correct': False},
  },
  {'question': '?', 'x': {'solution': 'a', 'is_correct': True}},
]


def test_solutions_become_pairs():
  every = data.solution_pairs(SOLVED, num_pairs=None)
  assert {p.completions for p in every} == {
    (right, wrong) for right in ('two', '2') for wrong in ('three', 'four')
  }
  assert len(every) == 4
  assert {(p.prompt, p.ranks) for p in every} == {('1+1?', (0, 1))}
  assert len(data.solution_pairs(SOLVED, num_pairs=9)) == 4
  chosen = {
    data.solution_pairs(SOLVED, seed=seed)[0].completions for seed in range(20)
  }
  assert len(chosen) == 4
  for seed in range(3):
    some = data.solution_pairs(SOLVED * 2, num_pairs=2, seed=seed)
    assert some == data.solution_pairs(SOLVED * 2, num_pairs=2, seed=seed)
    assert len(set(some[:2])) == len(set(some[2:])) == 2
    assert data.solution_pairs(SOLVED, num_pairs=2, seed=seed) == some[:2]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': {'solution': ' ', 'is_correct': True}}, 'row 0: field x has sol'),
    (
      {'x': {'solution': 'a', 'is_correct': 1}},
      'field x has is_correct=1',
    ),
    ({'x': {'solution': 'four', 'is_correct': True}}, 'both right and wrong'),
    ({'question': None}, 'row 0: field question is None'),
  ],
)
def test_solutions_that_make_no_pairs(change, message):
  with pytest.raises(ValueError, match=message):
    data.solution_pairs([SOLVED[0] | change])


def test_solutions_without_both_kinds():
  with pytest.raises(ValueError, match='no pair in 1 rows'):
    data.solution_pairs(SOLVED[1:])
  with pytest.raises(ValueError, match='none of the fields question holds'):
    data.solution_pairs([{'question': '?'}])
  with pytest.raises(ValueError, match='num_pairs=0'):
    data.solution_pairs(SOLVED, num_pairs=0)


@pytest.mark.skipif(DATA is None, reason='POSTRAIN_DATA is not set')
def test_real_solutions_and_transcripts_become_pairs():
  root = pathlib.Path(DATA or '')
  rows = data.read_jsonl(
    root / 'gsm8k' / 'example_model_solutions.jsonl', fields=['question']
  )
  pairs = data.solution_pairs(rows)
  # 432 questions that nobody solved, 156 that everybody did.
  assert len(pairs) == 1319 - 432 - 156
  arrays = data.encode_pairs(
    TOKENIZER, pairs[:20], max_length=2048, template='Q: {prompt}\nA: '
  )
  assert len(arrays.tokens) == 40
  path = root / 'hh_rlhf' / 'harmless-base-test.jsonl.gz'
  with pytest.raises(ValueError, match=r'gz, row 87: field chosen: message 3'):
    data.read_preferences(path)
  pairs = data.read_preferences(path, broken='drop')
  assert len(pairs) == 2299
  row = data.read_jsonl(path, fields=[], num_examples=1)[0]
  assert row['chosen'].endswith(pairs[0].completions[0])
  arrays = data.encode_pairs(
    TOKENIZER, pairs[:20], max_length=4096, style='chat'
  )
  assert (arrays.tokens[arrays.mask] == EOS).sum() == 40
