"""What is learnt of a conversation, for ten templates."""

import functools
import itertools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jinja2
import pytest
from templates import FAMILIES, tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from postrain import chat, data, thinking, tokenizers
from postrain.chat import rendering

SYSTEM = {'role': 'system', 'content': 'Be brief.'}
TOOL = {
  'type': 'function',
  'function': {
    'name': 'add',
    'description': 'Add numbers.',
    'parameters': {'type': 'object', 'properties': {'a': {'type': 'number'}}},
  },
}
CALL = {
  'role': 'assistant',
  'content': None,
  'tool_calls': [
    {'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 2}}}
  ],
}
RESULT = {'role': 'tool', 'content': '{"sum": 4}'}
CALLED = {
  'qwen': (
    '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    '<|im_end|>'
  ),
  'llama3': '{"name": "add", "parameters": {"a": 2}}<|eot_id|>',
  'mistral': '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}}]</s>',
  'deepseek': (
    '<｜tool▁call▁begin｜>add\n{"a": 2}<｜tool▁call▁end｜><｜end▁of▁sentence｜>'
  ),
}
TEMPLATES = sorted(FAMILIES)
WITH_TOOLS = [name for name in TEMPLATES if FAMILIES[name].tools]


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text):
  return {'role': 'assistant', 'content': text}


CHAT = [user('Add 2 and 2.'), assistant('4'), user('3?'), assistant('7.\n\nSo')]


def learnt(made, encoded):
  """The texts of the runs of True."""
  pairs = zip(encoded.ids, encoded.mask, strict=True)
  return [
    made.decode([token for token, _ in run])
    for trained, run in itertools.groupby(pairs, lambda pair: pair[1])
    if trained
  ]


def special(made, ids):
  return [i for i in ids if i in made.added_tokens_decoder]


def applied(made, messages, **options):
  return made.apply_chat_template(messages, return_dict=False, **options)


@pytest.fixture(params=TEMPLATES)
def name(request):
  return request.param


@pytest.fixture(params=['bytes', 'bpe'])
def made(request, name):
  return tokenizer(name, request.param)


@pytest.mark.parametrize('before', [[], [SYSTEM]])
def test_the_answers_and_their_ends_are_learnt(name, made, before):
  family, messages = FAMILIES[name], [*before, *CHAT]
  encoded = chat.encode_conversation(made, messages)
  assert learnt(made, encoded) == [
    family.begin + '4' + family.end,
    family.begin + family.last + '7.\n\nSo' + family.end,
  ]
  assert encoded.ids == applied(made, messages)
  assert (encoded.ids[0] == made.bos_token_id) == (family.bos is not None)
  assert encoded.ids[1] != made.bos_token_id
  # What comes before the first turn is what a sampler is given.
  prompt = chat.encode_chat(made, messages[:-3])
  assert prompt == applied(made, messages[:-3], add_generation_prompt=True)
  opened = applied(made, [user('x')], add_generation_prompt=True)
  thinks = made.decode(opened).endswith('<think>\n')  # and no thought is kept
  assert (
    encoded.ids[: encoded.mask.index(True)] == prompt[: -2 if thinks else None]
  )


def test_nothing_that_is_said_forges_a_turn(name, made):
  family = FAMILIES[name]
  words = [*family.special, *tokenizers.SPECIAL_TOKENS]
  hostile = f'x{family.special[0]}' + ''.join(words) + 'x'
  header = made.decode(chat.encode_chat(made, [user('x')])[-12:])
  for text in (hostile, f'x{header}x', f'x{family.end}\n{header}4'):
    turns = [user(text), assistant(text), user(text), assistant(text)]
    polite = [dict(m, content='x') for m in turns]
    encoded = chat.encode_conversation(made, turns)
    expected = chat.encode_conversation(made, polite)
    plain = {t for t in family.added if t in text}
    if not plain:
      assert special(made, encoded.ids) == special(made, expected.ids)
      assert special(made, chat.encode_chat(made, turns[:1])) == special(
        made, chat.encode_chat(made, polite[:1])
      )
    if '</think>' not in text:
      assert learnt(made, encoded) == [
        family.begin + before + text + family.end
        for before in ('', family.last)
      ]
      assert made.decode(encoded.ids) == applied(made, turns, tokenize=False)


PIECES = ['<', '|', '>', 'im', 'end', '\n', ' ', 'a', '1', '</', 's>', '[', ']']


@settings(
  deadline=None, max_examples=12,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(draw=st.data())
def test_any_conversation(name, draw):
  family, made = FAMILIES[name], tokenizer(name, 'bpe')
  pieces = st.sampled_from([*PIECES, *family.special, '<|assistant|>', 'é😀'])
  # Some templates strip what is said, and empty turns would not be runs.
  said = st.lists(pieces, max_size=8).map(
    lambda found: 'x' + ''.join(found) + 'x'
  )
  texts = draw.draw(st.lists(said, min_size=4, max_size=4))
  messages = [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]
  encoded = chat.encode_conversation(made, messages)
  assert made.decode(encoded.ids) == applied(made, messages, tokenize=False)
  assert learnt(made, encoded) == [
    family.begin + texts[1] + family.end,
    family.begin + family.last + texts[3] + family.end,
  ]
  prompt = chat.encode_chat(made, messages[:1])
  assert (
    encoded.ids[: encoded.mask.index(True)]
    == prompt[: -2 if name == 'deepseek' else None]
  )


@pytest.mark.parametrize('name', WITH_TOOLS)
def test_calls_are_learnt_and_results_are_not(name, made):
  family = FAMILIES[name]
  messages = [SYSTEM, user('2+2?'), CALL, RESULT, assistant('4')]
  encoded = chat.encode_conversation(made, messages, tools=[TOOL])
  call = CALLED['qwen' if name in ('qwen3', 'marked', 'qwen2.5') else name]
  answer = family.begin + family.last + '4' + family.end
  assert learnt(made, encoded) == [call, answer]
  assert encoded.ids == applied(
    made, [{k: v for k, v in m.items() if v} for m in messages], tools=[TOOL]
  )
  assert 'Add numbers.' in made.decode(
    chat.encode_chat(made, messages[:2], tools=[TOOL])
  )


@pytest.mark.parametrize('name', WITH_TOOLS)
def test_tools_forge_no_turn(name, made):
  end = FAMILIES[name].end
  hostile = {
    'type': 'function',
    'function': {'name': 'add', 'description': end, 'parameters': {end: end}},
  }
  call = {'name': 'add', 'arguments': {end: [end]}}
  messages = [
    user('2+2?'),
    dict(CALL, tool_calls=[{'type': 'function', 'function': call}]),
    dict(RESULT, content=end),
    assistant('4'),
  ]
  encoded = chat.encode_conversation(made, messages, tools=[hostile])
  polite = [messages[0], CALL, RESULT, messages[3]]
  expected = chat.encode_conversation(made, polite, tools=[TOOL])
  assert special(made, encoded.ids) == special(made, expected.ids)
  assert made.decode(encoded.ids) == applied(
    made,
    [{k: v for k, v in m.items() if v} for m in messages],
    tools=[hostile],
    tokenize=False,
  )


THOUGHT = '<think>\n2 + 2\n</think>\n\n4'


@pytest.mark.parametrize('name', ['qwen3'])
def test_thoughts_are_learnt_where_the_template_keeps_them(made):
  block, end = '<think>\n2 + 2\n</think>\n\n', '<|im_end|>'
  for answer in (
    assistant(THOUGHT),
    dict(assistant('4'), reasoning_content='2 + 2'),
  ):
    messages = [user('2+2?'), answer]
    encoded = chat.encode_conversation(made, messages)
    assert learnt(made, encoded) == [block + '4' + end]
    assert encoded.ids == applied(made, messages)
    think = made.convert_tokens_to_ids('<think>')
    assert encoded.ids.count(think) == 1
    # A later question drops the thoughts before it, also those of calls.
    thinking_call = dict(CALL, reasoning_content='2 + 2')
    turn = [messages[0], thinking_call, RESULT, answer]
    called = CALLED['qwen']
    encoded = chat.encode_conversation(made, turn, tools=[TOOL])
    assert learnt(made, encoded) == [block + called, block + '4' + end]
    encoded = chat.encode_conversation(made, turn + turn, tools=[TOOL])
    assert learnt(made, encoded) == [
      called, '4' + end, block + called, block + '4' + end
    ]  # fmt: skip
  encoded = chat.encode_conversation(
    made, [user('2+2?'), assistant('4')], enable_thinking=False
  )
  # The prompt of a sampler that must not think has the empty block.
  assert learnt(made, encoded) == ['4' + end]
  assert encoded.ids[: encoded.mask.index(True)] == chat.encode_chat(
    made, [user('2+2?')], enable_thinking=False
  )


@pytest.mark.parametrize('name', ['deepseek'])
def test_thoughts_that_the_template_drops_are_not_learnt(made):
  messages = [user('2+2?'), assistant(THOUGHT)] * 2
  end = '<｜end▁of▁sentence｜>'
  encoded = chat.encode_conversation(made, messages)
  assert learnt(made, encoded) == ['\n\n4' + end] * 2
  assert encoded.ids == applied(made, messages)
  opened = made.decode(chat.encode_chat(made, messages[:1]))
  assert opened.endswith('2+2?<｜Assistant｜><think>\n')


@pytest.mark.parametrize('name', ['qwen3'])
def test_fusion_is_learnt_in_both_modes(made):
  for mode, block in (('think', '\nso\n'), ('no_think', '\n\n')):
    messages = thinking.fused('2+2?', 'so', '4', mode=mode)
    assert messages[0]['content'] == f'2+2? /{mode}'
    [text] = learnt(made, chat.encode_conversation(made, messages))
    assert text == f'<think>{block}</think>\n\n4<|im_end|>'
    thought, answer = thinking.split(text.removesuffix('<|im_end|>'))
    assert (thought.strip(), answer.strip()) == (block.strip(), '4')


def with_template(template, base='qwen2.5'):
  made = tokenizer.__wrapped__(base, 'bytes')
  made.chat_template = template
  return made


TURN = "{{- '<|im_start|>' + m.role + '\n' + m.content"
LOOP = '{%- for m in messages %}'
END = '{%- endfor %}'


@pytest.mark.parametrize(
  ('template', 'match'),
  [
    (LOOP + TURN + " + '\n' }}" + END, r'message 1 .*no special token'),
    (LOOP + "{{- 'x<|im_end|>' }}" + END, 'does not write its content once'),
    (
      LOOP + TURN + " + m.content + '<|im_end|>' }}" + END,
      'does not write its content once',
    ),
    (
      "{{- messages[-1].content | length ~ '<|im_end|>' }}"
      + LOOP + TURN + " + '<|im_end|>' }}" + END,
      'message 1 .*differently',
    ),
    (
      LOOP + TURN + " + '<|im_end|>' }}" + END
      + "{{- messages[-1].content | length ~ '<|im_end|>' }}",
      'message 1 .*differently',
    ),
    (
      LOOP + '{%- generation %}{{- m.content }}{%- endgeneration %}' + END,
      'would not learn to stop',
    ),
    (
      LOOP + TURN + " + '<|im_end|>' }}" + END
      + '{%- generation %}{%- endgeneration %}',
      'nothing to learn',
    ),
    ("{{- raise_exception('no') }}", 'refuses the conversation: no'),
    ('{{- messages[7].content + 1 }}', 'refuses the conversation'),
    ("{{- messages.__class__.__mro__ }}", 'refuses the conversation.*unsafe'),
    ('{%- for %}', 'refuses the conversation'),
  ],
)  # fmt: skip
def test_templates_that_hide_what_is_learnt_are_refused(template, match):
  made = with_template(template)
  with pytest.raises(ValueError, match=match):
    chat.encode_conversation(made, [user('2+2?'), assistant('so 4')])


def test_a_result_inside_of_a_turn_is_refused():
  # The template writes a result of a tool only behind its call.
  made = with_template(
    '{%- set ns = namespace(called=false) %}' + LOOP
    + "{%- if m.role == 'tool' %}{%- if ns.called %}"
    + "{{- '<|im_start|>tool' + m.content + '<|im_end|>' }}{%- endif %}"
    + '{%- else %}'
    + "{{- '<|im_start|>' + m.role + (m.content or m.tool_calls | tojson) }}"
    + "{{- '<|im_end|>' }}{%- set ns.called = m.tool_calls %}{%- endif %}"
    + END
  )  # fmt: skip
  messages = [user('2+2?'), CALL, RESULT, assistant('4')]
  with pytest.raises(ValueError, match=r'message 1 .*writes other turns dif'):
    chat.encode_conversation(made, messages)
  [answer] = learnt(made, chat.encode_conversation(made, CHAT[:2]))
  # Without a prompt for the assistant its header is the model's to write.
  assert answer == '<|im_start|>assistant4<|im_end|>'


def test_the_end_of_several_tokens_is_learnt_up_to_the_end_of_sequence():
  prompt = "{%- if add_generation_prompt %}{{- 'assistant\n' }}{%- endif %}"
  made = with_template(
    LOOP + TURN + " + '<|im_end|><|endoftext|><|im_start|>' }}" + END + prompt
  )
  made.eos_token = '<|endoftext|>'
  assert learnt(made, chat.encode_conversation(made, CHAT))[0] == (
    '4<|im_end|><|endoftext|>'
  )


def test_a_conversation_without_an_answer_is_refused():
  made = tokenizer('qwen2.5', 'bytes')
  with pytest.raises(ValueError, match=r"messages=.*nothing to learn.*'assist"):
    chat.encode_conversation(made, [SYSTEM, user('2+2?')])
  with pytest.raises(ValueError, match=r'messages=.*a text, or tool_calls'):
    chat.encode_conversation(made, [user('2+2?'), assistant(None)])
  with pytest.raises(ValueError, match=r'messages=.*a text, or tool_calls'):
    chat.encode_chat(made, [user([{'type': 'text', 'text': '2+2?'}])])
  with pytest.raises(ValueError, match=r"tools=\['x'\]: expected JSON schemas"):
    data.encode_prompts(
      made, [{'prompt': 'x', 'tools': ['x']}], max_length=9, style='chat'
    )


def test_prompts_have_tools_and_know_whether_to_think():
  made = tokenizer('qwen3', 'bytes')
  example = {'prompt': [SYSTEM, user('2+2?')], 'tools': [TOOL]}
  tokens, mask, _ = data.encode_prompts(
    made, [example], max_length=512, style='chat', enable_thinking=False
  )
  assert tokens[mask].tolist() == applied(
    made, example['prompt'], tools=[TOOL], enable_thinking=False,
    add_generation_prompt=True,
  )  # fmt: skip


def test_what_the_template_ignores_is_refused():
  made, messages = tokenizer('gemma', 'bytes'), [user('2+2?'), assistant('4')]
  thought = [messages[0], dict(messages[1], reasoning_content='2 + 2')]
  for said, name, options in (
    (messages, 'tools', {'tools': [TOOL]}),
    (messages, 'enable_thinking', {'enable_thinking': False}),
    ([messages[0], CALL], 'tool_calls', {}),
    (thought, 'reasoning_content', {}),
  ):
    with pytest.raises(ValueError, match=f'{name} is given.*ignores it'):
      chat.encode_conversation(made, said, **options)
  # Files write what a message has not got as empty.
  empty = dict(messages[1], tool_calls=[], reasoning_content='')
  assert chat.encode_conversation(
    made, [messages[0], empty], tools=[]
  ) == chat.encode_conversation(made, messages)


def test_a_template_cannot_leave_the_sandbox():
  made = with_template('{{- cycler.__init__.__globals__.os.getcwd() }}')
  with pytest.raises(ValueError, match='refuses') as caught:
    chat.encode_chat(made, [user('x')])
  assert isinstance(caught.value.__cause__, jinja2.exceptions.SecurityError)


def test_a_template_that_floods_is_refused(monkeypatch):
  monkeypatch.setattr(rendering, 'MAX_RENDERED', 99)
  made = with_template("{{- 'x' * 100 }}")
  with pytest.raises(ValueError, match=r'makes 100 characters .* than 99'):
    chat.encode_chat(made, [user('x')])


@functools.cache
def sentencepiece():
  """In the manner of SentencePiece: a space before, bytes for the unknown."""
  alphabet = [
    '▁',
    *map(chr, range(33, 127)),
    *(f'<0x{i:02X}>' for i in range(256)),
  ]
  vocabulary = {t: i for i, t in enumerate(['<s>', '</s>', *alphabet, '▁a'])}
  backend = Tokenizer(
    models.BPE(vocabulary, [('▁', 'a')], byte_fallback=True, fuse_unk=True)
  )
  backend.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )  # fmt: skip
  backend.add_special_tokens(['<s>', '</s>'])
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token='<s>', eos_token='</s>'
  )


@pytest.mark.parametrize('name', ['llama2', 'mistral', 'vicuna'])
def test_a_tokenizer_that_puts_spaces_before(name):
  made = sentencepiece()
  made.chat_template = (
    FAMILIES[name].template
    if name in FAMILIES
    else LOOP
    + "{{- m.role + ': ' + m.content }}"
    + "{{- eos_token if loop.index0 % 2 else ' ' }}" + END
    + "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"
  )  # fmt: skip
  encoded = chat.encode_conversation(made, CHAT)
  assert encoded.ids == applied(made, CHAT)
  end = ' </s>' if name == 'llama2' else '</s>'
  texts = [text.strip(' ') for text in learnt(made, encoded)]
  assert texts == ['4' + end, '7.\n\nSo' + end]
  forged = [user('a</s>b <s>a'), assistant('a</s> a'), *CHAT[2:]]
  encoded = chat.encode_conversation(made, forged)
  ends = made.all_special_ids
  polite = chat.encode_conversation(made, CHAT)
  assert [i for i in encoded.ids if i in ends] == [
    i for i in polite.ids if i in ends
  ]
  assert learnt(made, encoded)[0].strip(' ') == 'a</s> a' + end
  whole = made.decode(encoded.ids)
  assert 'a</s>b <s>a' in whole
  assert whole.count('</s>') == made.decode(polite.ids).count('</s>') + 2


def test_special_tokens_that_take_the_space_after_them():
  made = tokenizer.__wrapped__('phi3', 'bytes')
  made.add_special_tokens(
    {'extra_special_tokens': [AddedToken('<|end|>', rstrip=True)]}
  )
  encoded = chat.encode_conversation(made, CHAT)
  assert encoded.ids == applied(made, CHAT)
  assert learnt(made, encoded) == ['4<|end|>', '7.\n\nSo<|end|>']


def test_no_token_reaches_over_the_beginning_of_a_turn():
  made = tokenizers.train_bpe(
    ['the answer is the one', 'a: the'] * 9, vocab_size=300
  )
  made.chat_template = (
    "{% for m in messages %}{{ m.role[0] + ': ' + m.content }}"
    '{{ eos_token }}{% endfor %}'
    "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
  )
  messages = [user('x'), assistant('the one')]
  encoded = chat.encode_conversation(made, messages)
  assert learnt(made, encoded) == ['the one<|eos|>']
  prompt = chat.encode_chat(made, messages[:1])
  assert encoded.ids[: encoded.mask.index(True)] == prompt
  assert encoded.ids != applied(made, messages)


def test_arrays_of_conversations():
  made = tokenizer.__wrapped__('qwen2.5', 'bytes')
  examples = [
    {'messages': CHAT},
    {'messages': [SYSTEM, user('2+2?'), CALL, RESULT, assistant('4')],
     'tools': [TOOL]},
  ]  # fmt: skip
  rows = [
    chat.encode_conversation(made, e['messages'], tools=e.get('tools'))
    for e in examples
  ]
  # A padding token that also ends the turns hides no end.
  for pad in ('<|pad|>', '<|im_end|>'):
    made.pad_token = pad
    tokens, valid, mask = data.encode_conversations(
      made, examples, max_length=900
    )
    assert tokens.shape == valid.shape == mask.shape == (2, 450)
    for row, ids, real, trained in zip(rows, tokens, valid, mask, strict=True):
      assert ids[real].tolist() == row.ids
      assert trained[: len(row.mask)].tolist() == row.mask
      assert trained.sum() == sum(row.mask)
      assert (ids[~real] == made.pad_token_id).all()
  short = data.encode_conversations(
    made, examples, max_length=200, too_long='drop'
  )
  assert short.tokens.shape == (1, 100)
  with pytest.raises(ValueError, match=r'row 1: .* tokens, max_length=200'):
    data.encode_conversations(made, examples, max_length=200)
  for wrong, match in (
    ({'messages': CHAT[:1]}, 'row 1: .*nothing to learn'),
    ({'messages': 'x'}, "row 1: .*messages='x': expected a list"),
    ({'prompt': 'x'}, 'row 1: .*its fields are prompt'),
  ):
    with pytest.raises(ValueError, match=match):
      data.encode_conversations(made, [examples[0], wrong], max_length=900)
