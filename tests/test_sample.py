"""Text from a model as it is decoded: the same as from the sampler."""

import dataclasses
import functools
import io
import json
import runpy
import sys

import jax
import numpy as np
import pytest
import tiny
from tiny import quick_compiler as quick_compiler

from postrain import hub, policies, tokenizers
from postrain.keys import run_key
from postrain.models.transformer import Config
from postrain.policies import Policy
from postrain.sampling import sample
from postrain.streaming import TextStream, make_streamer

PROGRAM = runpy.run_path(str(tiny.ROOT / 'experiments' / 'sample.py'))
CONFIG = Config(
  vocab_size=261, num_layers=1, model_dim=8, mlp_dim=8, num_heads=2,
  num_kv_heads=1, head_dim=4, max_length=128,
)  # fmt: skip
THINKING = '{% if enable_thinking is defined and enable_thinking %}+{% endif %}'


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """Random weights, tokens of bytes, and many ends."""
  path = tmp_path_factory.mktemp('model')
  tokenizer = tokenizers.byte_level()
  tokenizer.chat_template = THINKING + tokenizer.chat_template
  params = jax.jit(hub.transformer(CONFIG).init)(jax.random.key(0))
  hub.save(path, CONFIG, params, tokenizer=tokenizer)
  block = {'eos_token_id': [1, *range(40, 60)]}
  (path / 'generation_config.json').write_text(json.dumps(block))
  return path


@pytest.fixture(scope='module')
def policy(directory):
  return policies.from_directory(directory)


@pytest.mark.parametrize(
  'filters',
  [{'temperature': 0.0}, {'temperature': 2.0, 'top_k': 50, 'top_p': 0.9}],
)
def test_tokens_and_text_are_those_of_the_sampler(policy, filters):
  prompt, key = policy.encode('né 💡'), run_key(3, 'sample')
  draw = jax.jit(
    functools.partial(
      sample, policy.model, num_samples=3, max_new_tokens=24,
      stop_ids=policy.stop_ids, pad_id=0, **filters,
    )
  )  # fmt: skip
  tokens = np.asarray([prompt], np.int32)
  expected = draw(policy.params, tokens, np.ones_like(tokens, bool), key)
  stream = make_streamer(policy, max_new_tokens=24, **filters)
  for g in range(3):
    text, pieces = TextStream(policy), []
    for token in stream(prompt, key, g):
      pieces.append(text.push(token))
    pieces.append(text.flush())
    ids = expected.tokens[g][expected.mask[g]].tolist()
    assert text._ids == ids
    assert text.stopped == (not expected.truncated[g])
    assert ''.join(pieces) == text.text == policy.decode(ids)


def test_prompts_of_near_lengths_share_a_program(policy):
  stream = make_streamer(policy, max_new_tokens=2)
  key = run_key(0, 'sample')
  list(stream([70] * 40, key, 0))
  before = len(tiny.compilations)
  for length in (39, 50, 63):
    list(stream([70] * length, key, 0))
  assert len(tiny.compilations) == before
  with pytest.raises(ValueError, match=r'127 tokens, of which 126.*max_new_t'):
    list(stream([70] * 127, key, 0))


def pieces(policy, ids):
  text = TextStream(policy)
  return [text.push(i) for i in ids] + [text.flush()]


def test_half_a_character_is_held_back(policy):
  ids = tokenizers.encode_text(policy.tokenizer, 'aé💡b')
  assert pieces(policy, ids) == ['a', '', 'é', '', '', '', '💡', 'b', '']
  *_, first, _ = tokenizers.encode_text(policy.tokenizer, '💡')[:2]
  assert pieces(policy, [first]) == ['', '\ufffd']
  assert ''.join(pieces(policy, [first, ids[0]])) == '\ufffda'


def byte_fallback():
  """A vocabulary of one word and the bytes, as SentencePiece writes them."""
  from tokenizers import Tokenizer, decoders, models

  names = ['<unk>', '</s>', '▁hi', *(f'<0x{i:02X}>' for i in range(256))]
  vocabulary = {name: i for i, name in enumerate(names)}
  backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  return tokenizers._fast_class()(tokenizer_object=backend, eos_token='</s>')


def test_a_run_of_bytes_is_read_as_a_whole(policy):
  policy = dataclasses.replace(policy, tokenizer=byte_fallback())
  whole, half = [3 + b for b in '€'.encode()], 3 + 0xE2
  assert pieces(policy, [2, *whole, 2]) == ['hi', '', '', '', '€ hi', '']
  # The decoder gives up on all of a broken run, the good character too.
  broken = [2, *whole, half, 2]
  assert ''.join(pieces(policy, broken)) == policy.decode(broken)
  assert '€' not in policy.decode(broken)
  assert ''.join(pieces(policy, whole)) == '€'


def run(capsys, *flags, lines=None, monkeypatch=None):
  if lines is not None:
    monkeypatch.setattr(sys, 'stdin', io.StringIO(lines))
  PROGRAM['main'](list(flags))
  return capsys.readouterr()


def test_the_program_continues_a_prompt(directory, policy, capsys):
  flags = (f'--model={directory}', '--max_new_tokens=12', '--seed=5')
  shown = run(capsys, *flags, '--prompt=Hi', '--num_samples=2')
  stream = make_streamer(policy, max_new_tokens=12)
  texts, ends = '', []
  for g in range(2):
    ids = list(stream(policy.encode('Hi'), run_key(5, 'sample'), g))
    texts += policy.decode(ids) + '\n'
    end = 'stop token' if ids[-1] in policy.stop_ids else '--max_new_tokens=12'
    ends.append(f'[{len(ids)} tokens, ended by {end}]')
  assert shown.out == texts
  assert shown.err.splitlines() == ends


def test_the_program_keeps_a_conversation(directory, capsys, monkeypatch):
  seen = []
  encode = Policy.encode

  def spy(self, prompt):
    seen.append(list(prompt))
    return encode(self, prompt)

  monkeypatch.setattr(Policy, 'encode', spy)
  flags = (f'--model={directory}', '--chat', '--max_new_tokens=6')
  lines = 'Hi\n\nAnd you?\n'
  shown = run(
    capsys, *flags, '--system=Short.', lines=lines, monkeypatch=monkeypatch
  )
  roles = [message['role'] for message in seen[-1]]
  assert roles == ['system', 'user', 'assistant', 'user']
  replies = shown.out.removesuffix('\n')
  assert replies.startswith(seen[-1][2]['content'])


def test_thinking_is_asked_of_the_template(directory):
  policy = policies.from_directory(directory)
  messages = [{'role': 'user', 'content': 'x'}]
  off, on = policy.encode(messages), None
  policies.set_thinking(policy, True)
  on = policy.encode(messages)
  assert policy.tokenizer.decode(on) == '+' + policy.tokenizer.decode(off)
  policy.tokenizer.chat_template = 'x'
  with pytest.raises(ValueError, match='does not know enable_thinking'):
    policies.set_thinking(policy, True)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--model=nowhere'], "'nowhere' does not exist"),
    (['--workdir=nowhere'], 'no config of a run'),
    (['--step=3'], 'step=3: a directory has no checkpoints'),
    (['--temperature=-1'], 'temperature=-1.0'),
    (['--temperature=nan'], 'temperature=nan'),
    (['--top_k=0'], 'top_k=0'),
    (['--top_p=0'], 'top_p=0'),
    (['--min_p=2'], 'min_p=2'),
    (['--seed=-1'], 'seed=-1'),
    (['--num_samples=0'], '--num_samples=0'),
    (['--max_new_tokens=0'], 'max_new_tokens=0'),
    (['--max_new_tokens=128'], 'no room for a prompt'),
    (['--prompt='], 'no tokens'),
  ],
)
def test_a_mistake_is_one_line_before_anything_compiles(
  directory, flags, message
):
  own = flags[0].startswith(('--model', '--workdir'))
  source = [] if own else [f'--model={directory}']
  prompt = [] if flags[0].startswith('--prompt') else ['--prompt=x']
  before = len(tiny.compilations)
  with pytest.raises(SystemExit) as error:
    PROGRAM['main'](['--max_new_tokens=8', *source, *prompt, *flags])
  assert str(error.value).startswith('error: ')
  assert message in str(error.value)
  assert len(tiny.compilations) == before


def test_a_run_gives_the_actor_of_a_checkpoint(tmp_path):
  from postrain.checkpoints import Checkpoints
  from postrain.trainer import Trainer

  workdir = tmp_path / 'run'
  trainer = Trainer(tiny.text(tmp_path), str(workdir))
  state = trainer._states.fresh()
  later = dataclasses.replace(
    state, params=jax.tree.map(lambda x: x + 1, state.params)
  )
  checkpoints = Checkpoints(str(workdir / 'checkpoints'), keep=2)
  checkpoints.save(1, state)
  checkpoints.save(2, later)
  checkpoints.close()
  files = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}
  policy = policies.from_run(workdir)
  jax.tree.map(
    np.testing.assert_array_equal, policy.params, later.params['actor']
  )
  assert policy.source.endswith('step 2')
  assert policy.stop_ids == trainer.environment.stop_ids
  earlier = policies.from_run(workdir, step=1)
  assert earlier.fingerprint() != policy.fingerprint()
  assert files == {
    p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()
  }
  with pytest.raises(ValueError, match=r'step=7: .* has checkpoints of 1, 2'):
    policies.from_run(workdir, step=7)


def test_a_run_without_text_or_checkpoint_is_refused(tmp_path):
  from postrain.checkpoints import Checkpoints

  (tmp_path / 'config.json').write_text(
    json.dumps({'config': tiny.sort().to_dict()})
  )
  with pytest.raises(ValueError, match='no checkpoint yet'):
    policies.from_run(tmp_path)
  checkpoints = Checkpoints(str(tmp_path / 'checkpoints'), keep=1)
  checkpoints.save(1, {'x': np.zeros(1)})
  checkpoints.close()
  with pytest.raises(ValueError, match=r"environment 'task'.* no text"):
    policies.from_run(tmp_path)
