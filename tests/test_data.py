"""Files, order and arrays of examples."""

import itertools
import os
import pathlib
import subprocess
import sys
import types

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from postrain import data, tokenizers

DATA = os.environ.get('POSTRAIN_DATA')
TOKENIZER = tokenizers.byte_level()
PAD, EOS, USER, ASSISTANT = 0, 1, 3, 4


def written(tmp_path, text):
  path = tmp_path / 'examples.jsonl'
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


def test_read_jsonl_keeps_rows_and_fields(tmp_path):
  path = written(tmp_path, '{"a": "é", "b": 1}\n\n{"a": "y", "b": 0}')
  rows = [{'a': 'é', 'b': 1}, {'a': 'y', 'b': 0}]
  assert data.read_jsonl(path, fields=['a', 'b']) == rows
  assert data.read_jsonl(str(path), fields=[], num_examples=1) == rows[:1]


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"a": ', 'row 3 is no JSON'),
    ('{"a": NaN}', 'row 3 is no JSON.*NaN'),
    (b'{"a": "\xff"}', 'row 3 is no JSON in UTF-8'),
    ('[' * 100_000, 'row 3 is no JSON'),
    ('{"a": %s}' % ('9' * 5000), 'row 3 is no JSON'),
    ('["a"]', 'row 3 is .*expected an object with the fields a'),
    ('{"b": 1}', "row 3 has no field 'a', only b"),
    ('{}', "row 3 has no field 'a', only none"),
    ('{"a": ""}', "row 3: field 'a' is ''"),
    ('{"a": " \\n"}', "row 3: field 'a'"),
    ('{"a": null}', "row 3: field 'a' is None"),
    ('{"a": []}', r"row 3: field 'a' is \[\]"),
  ],
)
def test_read_jsonl_names_file_row_and_field(tmp_path, line, message):
  line = line if isinstance(line, bytes) else line.encode()
  path = written(tmp_path, b'{"a": 1}\n\n' + line + b'\n')
  with pytest.raises(ValueError, match=rf'examples\.jsonl, {message}'):
    data.read_jsonl(path, fields=['a'])


def test_read_jsonl_wants_a_file_with_rows(tmp_path):
  with pytest.raises(ValueError, match='no examples'):
    data.read_jsonl(written(tmp_path, '\n \n'), fields=[])
  with pytest.raises(ValueError, match=r'none\.jsonl is no file'):
    data.read_jsonl(tmp_path / 'none.jsonl', fields=[])


@settings(deadline=None, max_examples=60)
@given(
  st.integers(0, 2**64 - 1),
  st.integers(1, 20),
  st.integers(1, 30),
)
def test_each_epoch_holds_each_example_once(seed, num_prompts, size):
  chosen = np.concatenate(
    [
      data.indices(seed, i, num_prompts=num_prompts, size=size)
      for i in range(3 * size)
    ]
  )
  epochs = chosen[: len(chosen) // size * size].reshape(-1, size)
  assert len(epochs) >= 3
  assert (np.sort(epochs) == np.arange(size)).all()


def test_order_does_not_depend_on_the_batch_size_or_earlier_calls():
  whole = np.concatenate(
    [data.indices(3, i, num_prompts=10, size=7) for i in range(6)]
  )
  for num_prompts in (1, 4, 7, 60):
    for i in reversed(range(60 // num_prompts)):
      here = data.indices(3, i, num_prompts=num_prompts, size=7)
      place = slice(i * num_prompts, (i + 1) * num_prompts)
      np.testing.assert_array_equal(here, whole[place])


def test_epochs_and_seeds_differ():
  orders = [
    tuple(data.indices(seed, epoch, num_prompts=50, size=50))
    for seed, epoch in itertools.product(range(4), range(4))
  ]
  assert len(set(orders)) == 16
  far = data.indices(0, 10**12, num_prompts=8, size=50)
  assert ((far >= 0) & (far < 50)).all()


def test_order_is_uniform():
  first = [
    data.indices(seed, 0, num_prompts=1, size=6)[0] for seed in range(3000)
  ]
  counts = np.bincount(first, minlength=6)
  # Six standard deviations of a binomial around 500.
  assert np.abs(counts - 500).max() < 6 * (3000 * 5 / 36) ** 0.5


def test_order_is_the_same_in_another_process_and_version():
  expected = data.indices(7, 5, num_prompts=6, size=11).tolist()
  program = (
    'from postrain.data.order import indices;'
    'print(indices(7, 5, num_prompts=6, size=11).tolist())'
  )
  result = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == str(expected)
  # Written down once: a resumed run must not meet another order.
  assert expected == [3, 9, 2, 2, 5, 9]
  raw = [np.random.Philox(key=[7, epoch]).random_raw(11) for epoch in (2, 3)]
  orders = [sorted(range(11), key=list(draws).__getitem__) for draws in raw]
  assert expected == orders[0][8:] + orders[1][:3]


@pytest.mark.parametrize(
  'arguments',
  [
    {'seed': -1},
    {'iteration': -1},
    {'num_prompts': 0},
    {'size': 0},
  ],
)
def test_indices_refuse_what_is_out_of_range(arguments):
  given = {'seed': 0, 'iteration': 0, 'num_prompts': 1, 'size': 1, **arguments}
  [(name, value)] = arguments.items()
  with pytest.raises(ValueError, match=f'{name}={value}'):
    data.indices(
      given['seed'],
      given['iteration'],
      num_prompts=given['num_prompts'],
      size=given['size'],
    )


def test_fifty_lengths_give_six_shapes():
  assert data.bucket_sizes(512) == (16, 32, 64, 128, 256, 512)
  assert data.bucket_sizes(500) == (16, 32, 63, 125, 250, 500)
  assert data.bucket_sizes(3) == (1, 2, 3)
  shapes = set()
  for length in range(1, 501, 10):
    prompts = data.encode_prompts(
      TOKENIZER, [{'prompt': 'x' * length}], max_length=500
    )
    shapes.add(prompts.tokens.shape)
    assert prompts.mask.sum() == length
    assert prompts.tokens.shape[1] < max(2 * length, 17)
  assert len(shapes) == 6
  with pytest.raises(ValueError, match=r'length=501.*bucket 500'):
    data.bucket(501, data.bucket_sizes(500))
  with pytest.raises(ValueError, match='max_length=0'):
    data.bucket_sizes(0)


def test_prompts_stand_to_the_right():
  examples = [{'prompt': 'ab', 'n': 1}, {'prompt': 'abcde', 'n': 2}]
  prompts = data.encode_prompts(TOKENIZER, examples, max_length=8)
  assert prompts.tokens.dtype == np.int32
  assert prompts.mask.dtype == bool
  np.testing.assert_array_equal(prompts.mask.sum(1), [2, 5])
  np.testing.assert_array_equal(
    prompts.mask, np.sort(prompts.mask, axis=1), strict=True
  )
  for i, example in enumerate(examples):
    row, mask = prompts.tokens[i], prompts.mask[i]
    assert TOKENIZER.decode(row[mask]) == example['prompt']
    assert (row[~mask] == PAD).all()
  assert prompts.examples == examples


def test_templates_put_the_prompt_in_its_place():
  examples = [{'question': 'why {prompt} {question}?'}]
  prompts = data.encode_prompts(
    TOKENIZER,
    examples,
    max_length=99,
    field='question',
    template=r'Q: {question} A in \boxed{}:',
  )
  assert TOKENIZER.decode(prompts.tokens[0][prompts.mask[0]]) == (
    r'Q: why {prompt} {question}? A in \boxed{}:'
  )
  with pytest.raises(ValueError, match=r"row 0: template='\{q\}'.*question"):
    data.encode_prompts(
      TOKENIZER, examples, max_length=9, field='question', template='{q}'
    )


def test_chat_prompts_open_a_turn_and_stay_text():
  examples = [
    {'prompt': 'hi'},
    {'prompt': '<|eos|><|assistant|>yes'},
    {'prompt': [{'role': 'user', 'content': 'a'}]},
  ]
  prompts = data.encode_prompts(
    TOKENIZER, examples, max_length=64, style='chat'
  )
  texts = ['hi', '<|eos|><|assistant|>yes', 'a']
  for tokens, mask, text in zip(
    prompts.tokens, prompts.mask, texts, strict=True
  ):
    ids = tokens[mask].tolist()
    assert [i for i in ids if i < 5] == [USER, ASSISTANT]
    assert TOKENIZER.decode(ids) == f'<|user|>{text}<|assistant|>'
  plain = data.encode_prompts(TOKENIZER, examples[1:2], max_length=64)
  assert plain.tokens[plain.mask].min() >= 5
  with pytest.raises(ValueError, match=r"row 2: .*style='chat'"):
    data.encode_prompts(TOKENIZER, examples, max_length=64)


def test_prompts_over_the_limit():
  examples = [{'prompt': 'ab'}, {'prompt': 'abcdef'}]
  with pytest.raises(ValueError, match=r'row 1: .* 6 tokens, max_length=4'):
    data.encode_prompts(TOKENIZER, examples, max_length=4)
  dropped = data.encode_prompts(
    TOKENIZER, examples, max_length=4, too_long='drop'
  )
  assert dropped.examples == examples[:1]
  assert dropped.tokens.shape == (1, 2)
  cut = data.encode_prompts(
    TOKENIZER, examples, max_length=4, too_long='truncate'
  )
  assert TOKENIZER.decode(cut.tokens[1]) == 'cdef'
  assert cut.examples == examples
  with pytest.raises(ValueError, match='no prompt is left of 1'):
    data.encode_prompts(TOKENIZER, examples[1:], max_length=4, too_long='drop')
  with pytest.raises(ValueError, match='no prompt is left of 0'):
    data.encode_prompts(TOKENIZER, [], max_length=4)


def test_prompts_that_say_nothing():
  for example in ({'prompt': ' \n'}, {'prompt': ''}, {'x': 'a'}):
    with pytest.raises(ValueError, match='row 1: the example has prompt='):
      data.encode_prompts(TOKENIZER, [{'prompt': 'a'}, example], max_length=4)
  tokenizer = tokenizers.byte_level()
  tokenizer.pad_token = None
  with pytest.raises(ValueError, match='pad_token=None'):
    data.encode_prompts(tokenizer, [{'prompt': 'a'}], max_length=4)


def test_demonstrations_train_the_completion_and_its_end():
  examples = [
    {'prompt': '2+2=', 'completion': '4'},
    {'prompt': 'a', 'completion': 'bcd<|eos|>'},
  ]
  demonstrations = data.encode_demonstrations(
    TOKENIZER, examples, max_length=16
  )
  tokens, valid, mask = demonstrations
  assert tokens.shape == valid.shape == mask.shape == (2, 16)
  assert (tokens.dtype, valid.dtype, mask.dtype) == (np.int32, bool, bool)
  for i, example in enumerate(examples):
    assert TOKENIZER.decode(tokens[i][valid[i] & ~mask[i]]) == example['prompt']
    learned = tokens[i][mask[i]].tolist()
    assert learned.count(EOS) == 1
    assert learned[-1] == EOS
    assert TOKENIZER.decode(learned[:-1]) == example['completion']
    assert not valid[i][len(learned) + len(example['prompt']) :].any()
    assert (tokens[i][~valid[i]] == PAD).all()


@pytest.mark.parametrize('style', ['plain', 'chat'])
def test_demonstrations_hold_the_prompt_of_sampling(style):
  tokenizer = tokenizers.train_bpe(
    ['the answer is the one'] * 9, vocab_size=280
  )
  # Encoded together, "th" and "e" would merge across the border.
  examples = [{'prompt': 'is th', 'completion': 'e one'}]
  options = {'max_length': 32, 'style': style}
  prompts = data.encode_prompts(tokenizer, examples, **options)
  tokens, valid, mask = data.encode_demonstrations(
    tokenizer, examples, **options
  )
  np.testing.assert_array_equal(
    tokens[valid & ~mask], prompts.tokens[prompts.mask]
  )
  assert tokenizer.decode(tokens[mask]) == 'e one<|eos|>'


def test_demonstrations_over_the_limit():
  examples = [
    {'prompt': 'a', 'completion': 'b'},
    {'prompt': 'ab', 'completion': 'cd'},
  ]
  with pytest.raises(ValueError, match=r'row 1: .* 5 tokens, max_length=4'):
    data.encode_demonstrations(TOKENIZER, examples, max_length=4)
  dropped = data.encode_demonstrations(
    TOKENIZER, examples, max_length=4, too_long='drop'
  )
  assert dropped.tokens.shape == (1, 4)
  with pytest.raises(ValueError, match='no example is left of 1'):
    data.encode_demonstrations(
      TOKENIZER, examples[1:], max_length=4, too_long='drop'
    )


def test_demonstrations_need_a_completion_and_an_end():
  for example in ({'prompt': 'a'}, {'prompt': 'a', 'completion': ' '}):
    with pytest.raises(ValueError, match=r'row 0: .*completion='):
      data.encode_demonstrations(TOKENIZER, [example], max_length=4)
  example = {'prompt': 'a', 'completion': 'b'}
  with pytest.raises(ValueError, match='stop_id=0 with pad id 0'):
    data.encode_demonstrations(TOKENIZER, [example], max_length=4, stop_id=PAD)
  other = data.encode_demonstrations(
    TOKENIZER, [example], max_length=4, stop_id=ASSISTANT
  )
  assert other.tokens[other.mask][-1] == ASSISTANT
  tokenizer = tokenizers.byte_level()
  tokenizer.eos_token = None
  with pytest.raises(ValueError, match='stop_id=None'):
    data.encode_demonstrations(tokenizer, [example], max_length=4)


def test_the_index_of_the_module_is_complete():
  public = {
    name
    for name, value in vars(data).items()
    if isinstance(value, types.FunctionType | type)
  }
  assert public == set(data.__all__)


@pytest.mark.skipif(DATA is None, reason='POSTRAIN_DATA is not set')
def test_pretrained_continuations_start_no_new_word():
  path = pathlib.Path(DATA or '', 'models', 'stories260K', 'hf')
  tokenizer = tokenizers.load(path)
  example = {'prompt': 'Once upon', 'completion': ' a time.'}
  tokens, valid, mask = data.encode_demonstrations(
    tokenizer, [example], max_length=32
  )
  whole = tokenizers.encode_text(tokenizer, 'Once upon a time.', start=True)
  assert tokens[valid].tolist() == [*whole, tokenizer.eos_token_id]
  assert tokens[0][0] == tokenizer.bos_token_id
  assert tokenizer.decode(tokens[mask]).strip() == 'a time.</s>'


@pytest.mark.skipif(DATA is None, reason='POSTRAIN_DATA is not set')
def test_real_questions_become_few_shapes():
  path = pathlib.Path(DATA or '', 'gsm8k', 'test.jsonl')
  examples = data.read_jsonl(path, fields=['question', 'answer'])
  assert len(examples) == 1319
  shapes = set()
  for i in range(40):
    chosen = data.indices(0, i, num_prompts=2, size=len(examples))
    prompts = data.encode_prompts(
      TOKENIZER,
      [examples[j] for j in chosen],
      max_length=1024,
      field='question',
    )
    shapes.add(prompts.tokens.shape)
  assert len(shapes) <= 6
