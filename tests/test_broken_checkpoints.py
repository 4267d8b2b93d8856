"""Broken directories: each is refused at once, by name and with a remedy.

A row breaks a good directory of two files in one way, and says what the error
must match. `HEADERS` are refused before any weight is read.
"""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from postrain import hub, tokenizers
from postrain.hub import headers
from postrain.models import families
from postrain.models.config import Config

TINY = Config(
  vocab_size=300, num_layers=2, model_dim=8, mlp_dim=12, num_heads=4,
  num_kv_heads=2, head_dim=4, max_length=32,
)  # fmt: skip
ONE, TWO = (f'model-0000{i}-of-00002.safetensors' for i in (1, 2))
NORM, TABLE = 'model.norm.weight', 'model.embed_tokens.weight'
UP = 'model.layers.1.mlp.up_proj.weight'
# The library says what is wrong in words of its own.
NO_FILE = rf'{TWO} is truncated or no safetensors file \(.+\): copy it again'


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """A directory of two files with an index, a tokenizer and a template."""
  draw = np.random.default_rng(0)
  params: dict = {'layers': {}}
  for path, shape in families.param_shapes(TINY).items():
    inner = params['layers'] if len(path) == 2 else params
    inner[path[-1]] = draw.normal(size=shape).astype(np.float32)
  path = tmp_path_factory.mktemp('good') / 'model'
  hub.save(
    path, TINY, params, tokenizer=tokenizers.byte_level(),
    max_shard_bytes=11_000,
  )  # fmt: skip
  assert {p.name for p in path.glob('*.safetensors')} == {ONE, TWO}
  return path


@pytest.fixture
def model(good, tmp_path):
  return shutil.copytree(good, tmp_path / 'model')


def edit(name, change):
  """Change a JSON file."""

  def harm(model):
    block = json.loads((model / name).read_text())
    change(block)
    (model / name).write_text(json.dumps(block))

  return harm


def config(**fields):
  return edit('config.json', lambda block: block.update(fields))


def weights(change, name=TWO):
  """Change the tensors of a file."""

  def harm(model):
    tensors = load_file(model / name)
    change(tensors)
    save_file(tensors, model / name)

  return harm


def header(change, name=TWO):
  """Change what a file says of its tensors, and not the tensors."""

  def harm(model):
    content = (model / name).read_bytes()
    length = int.from_bytes(content[:8], 'little')
    said = json.loads(content[8 : 8 + length])
    text = change(said) or json.dumps(said)
    rest = content[8 + length :]
    length = len(text).to_bytes(8, 'little')
    (model / name).write_bytes(length + text.encode() + rest)

  return harm


def content(name, change):
  """Change the bytes of a file."""

  def harm(model):
    (model / name).write_bytes(change((model / name).read_bytes()))

  return harm


def mapped(tensor, file):
  """Another file for a tensor in the index."""
  return edit(hub.INDEX, lambda b: b['weight_map'].update({tensor: file}))


def tensor(name, **fields):
  return header(lambda said: said[name].update(fields))


def pickled(model):
  for path in model.glob('model*'):
    path.unlink()
  (model / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n')


def linked(name):
  """A file that lies elsewhere, as a link."""

  def harm(model):
    os.replace(model / name, model.parent / name)
    (model / name).symlink_to(model.parent / name)

  return harm


def cast(dtype, name=NORM):
  return weights(lambda t: t.update({name: t[name].astype(dtype)}))


def poison(value, name=UP):
  return weights(lambda t: t[name].__setitem__((3, 2), value))


def quantised(model):
  """FP8 as the format has it, one byte a number."""
  cast(np.int8)(model)
  tensor(NORM, dtype='F8_E4M3')(model)


def head(model):
  """A head of its own although the config ties it."""
  table = np.ones((300, 8), np.float32)
  weights(lambda t: t.update({'lm_head.weight': table}))(model)
  mapped('lm_head.weight', TWO)(model)


def repeated(name, key):
  """The first key of an object stands twice."""
  return content(name, lambda b: b.replace(b'{', b'{"%b": 1, ' % key, 1))


HEADERS = {
  'no config': (lambda m: (m / 'config.json').unlink(), 'is missing: give'),
  'empty config': (content('config.json', lambda b: b''), 'is no JSON.*again'),
  'cut config': (content('config.json', lambda b: b[:90]), 'is no JSON.*again'),
  'list as config': (content('config.json', lambda b: b'[]'), 'no JSON object'),
  'deep config': (content('config.json', lambda b: b'[' * 10**5), 'is no JSON'),
  'bytes as config': (content('config.json', lambda b: b'\xff'), 'is no JSON'),
  'key twice': (repeated('config.json', b'vocab_size'), "'vocab_size' stands"),
  'linked config': (linked('config.json'), 'is a link to .* put the file'),
  'foreign family': (config(model_type='mamba'), "json: .*'mamba' is not"),
  'no family': (config(model_type=None), 'model_type=None is not supported'),
  'quantised': (config(quantization_config={'bits': 4}), 'quantization_config'),
  '10**12 layers': (
    config(num_hidden_layers=10**12), r'layers=1000000000000, and the files',
  ),
  '10**12 wide': (config(hidden_size=10**12), 'has shape .* another model'),
  '10**12 tokens': (config(vocab_size=10**12), 'shape .*300, 8.*another model'),
  'layers as text': (config(num_hidden_layers='2'), "='2' must be a whole"),
  'no heads': (config(num_attention_heads=0), 'heads=0 must be a whole'),
  'half a head': (config(num_key_value_heads=1.5), 'heads=1.5 must be a whole'),
  'null for eps': (config(rms_norm_eps=None), r'eps=None must be in \(0, 1'),
  'tie as text': (config(tie_word_embeddings='no'), "'no' must be true or"),
  'theta as list': (config(rope_parameters=[1]), 'another kind than expected'),
  'one layer more': (config(num_hidden_layers=3), r'lacks 9 .*layers\.2'),
  'one layer less': (config(num_hidden_layers=1), r'9 unexpected .*layers\.1'),
  'other vocabulary': (config(vocab_size=299), r'\(300, 8\), expected \(299'),
  'untied': (config(tie_word_embeddings=False), r'lacks 1 .*lm_head\.weight'),
  'pickle alone': (pickled, r'pytorch_model\.bin may run code.* convert'),
  'renamed pickle': (content(TWO, lambda b: b'\x80\x02}q.' * 9), 'is a pickle'),
  'renamed archive': (content(TWO, lambda b: b'PK\x03\x04' + b), 'of PyTorch'),
  'pointer': (
    content(TWO, lambda b: b'version https://git-lfs.github.com/spec/v1\n'),
    'pointer of Git LFS: fetch',
  ),
  'page': (content(TWO, lambda b: b'<!DOCTYPE html><html>'), 'page of HTML'),
  'no index': (lambda m: (m / hub.INDEX).unlink(), 'has neither model.safet'),
  'empty index': (edit(hub.INDEX, lambda b: b.clear()), 'has no weight_map'),
  'list as index': (
    edit(hub.INDEX, lambda b: b.update(weight_map=[TWO])), 'has no weight_map',
  ),
  'index names twice': (repeated(hub.INDEX, b'weight_map'), 'stands twice'),
  'traversal': (mapped(NORM, f'../{TWO}'), 'only .* beside the index'),
  'absolute path': (mapped(NORM, f'/etc/{TWO}'), 'only .* beside the index'),
  'no name': (mapped(NORM, None), 'None: only .* beside the index'),
  'pickle in index': (mapped(NORM, 'a.bin'), "'a.bin': only"),
  'absent file': (mapped(NORM, 'b.safetensors'), r'lacks b\.safetensors: copy'),
  'absent shard': (lambda m: (m / TWO).unlink(), f'lacks {TWO}: copy'),
  'linked weights': (linked(TWO), 'is a link to .*, outside'),
  'wrong file': (mapped(NORM, ONE), rf'{ONE} differ in {NORM}: take'),
  'not in index': (
    edit(hub.INDEX, lambda b: b['weight_map'].pop(NORM)), rf'differ in {NORM}',
  ),
  'in two files': (
    weights(lambda t: t.update({TABLE: np.zeros((300, 8), np.float32)})),
    rf'{TABLE} is in {ONE} and again in {TWO}',
  ),
  'missing tensor': (weights(lambda t: t.pop(NORM)), rf'differ in {NORM}'),
  'transposed': (
    weights(lambda t: t.update({UP: t[UP].T.copy()})),
    rf'{UP} has shape \(8, 12\), expected \(12, 8\)',
  ),
  'integers': (cast(np.int8), f'{NORM} is I8, weights may be F64, F32'),
  'FP8': (quantised, f'{NORM} is F8_E4M3, .* that is not quantised'),
  'booleans': (cast(np.bool_), f'{NORM} is BOOL'),
  'empty file': (content(TWO, lambda b: b''), NO_FILE),
  'cut length': (content(TWO, lambda b: b[:5]), NO_FILE),
  'cut header': (content(TWO, lambda b: b[:100]), NO_FILE),
  'cut tensors': (content(TWO, lambda b: b[:-1]), NO_FILE),
  'padded': (content(TWO, lambda b: b + b'\0'), NO_FILE),
  'vast header': (content(TWO, lambda b: b'\xff' * 8 + b[8:]), NO_FILE),
  'header of junk': (header(lambda s: 'x' * 64), NO_FILE),
  'tensor twice': (
    header(lambda s: json.dumps(s).replace(UP, NORM)), NO_FILE,
  ),
  'no offsets': (header(lambda s: s[UP].clear()), NO_FILE),
  'shape of text': (tensor(UP, shape='12x8'), NO_FILE),
  'negative': (tensor(UP, shape=[-12, -8]), NO_FILE),
  'larger shape': (tensor(UP, shape=[10**9, 10**9]), NO_FILE),
  'wider dtype': (tensor(UP, dtype='F64'), NO_FILE),
  'unknown dtype': (tensor(UP, dtype='F3'), NO_FILE),
  'overlap': (tensor(UP, data_offsets=[0, 384]), NO_FILE),
  'outside': (tensor(UP, data_offsets=[10**15, 10**15 + 384]), NO_FILE),
}  # fmt: skip
VALUES = {
  'NaN': (poison(np.nan), f'{UP} holds NaN or infinity'),
  'infinity': (poison(-np.inf), f'{UP} holds NaN or infinity'),
  'beyond float32': (
    weights(lambda t: t.update({UP: t[UP] * np.float64(1e300)})),
    f'{UP} holds .*beyond float32: use weights',
  ),
  'false tie': (head, 'lm_head.weight differs from the embedding'),
}  # fmt: skip


@pytest.mark.parametrize('row', HEADERS)
def test_headers_suffice(model, row, monkeypatch):
  def read(*args):
    raise AssertionError('a weight is read')

  harm, message = HEADERS[row]
  harm(model)
  monkeypatch.setattr(headers.Entry, 'rows', read)
  with pytest.raises(ValueError, match=message):
    hub.load(model)


@pytest.mark.parametrize('row', VALUES)
def test_values_are_checked(model, row):
  harm, message = VALUES[row]
  hub.load(model)
  harm(model)
  hub.open(model)
  with pytest.raises(ValueError, match=message):
    hub.load(model)


VOCABULARY = 'the tokenizer has ids up to 260, the embedding 200 rows: resize'
TOKENIZERS = {
  'none': (lambda m: (m / 'tokenizer.json').unlink(), 'has no tokenizer.json'),
  'cut': (content('tokenizer.json', lambda b: b[:-9]), 'no JSON.*again'),
  'empty': (content('tokenizer.json', lambda b: b''), 'no JSON.*again'),
  'list': (content('tokenizer.json', lambda b: b'[]'), 'no JSON object: copy'),
  'no model': (edit('tokenizer.json', lambda b: b.pop('model')), 'cannot be'),
  'code': (
    edit('tokenizer_config.json', lambda b: b.update(
      auto_map={'AutoTokenizer': ['mine.Tokenizer', None]}
    )),
    'names a class of its own',
  ),
  'cut settings': (
    content('tokenizer_config.json', lambda b: b[:20]), 'no JSON.*again',
  ),
  'list as settings': (
    content('tokenizer_config.json', lambda b: b'[]'), 'no JSON object: copy',
  ),
  'vocabulary': (lambda m: None, VOCABULARY),
}  # fmt: skip


@pytest.mark.parametrize('row', TOKENIZERS)
def test_tokenizers(model, row):
  harm, message = TOKENIZERS[row]
  harm(model)
  with pytest.raises(ValueError, match=message):
    tokenizers.check(tokenizers.load(model), 200)


def test_the_links_of_a_download_cache_are_followed(good, tmp_path):
  snapshot = tmp_path / 'snapshots' / 'abc'
  for folder in (snapshot, tmp_path / 'blobs'):
    folder.mkdir(parents=True)
  for number, path in enumerate(sorted(good.iterdir())):
    shutil.copyfile(path, tmp_path / 'blobs' / str(number))
    (snapshot / path.name).symlink_to(f'../../blobs/{number}')
  assert hub.load(snapshot).config == TINY


ODD = (None, True, -1, 0, 2.5, 10**12, 10**400, 'x', [], [1], {}, {'a': 1})


def test_any_field_of_the_config_may_be_odd(model):
  block = json.loads((model / 'config.json').read_text())
  for name in [*block, 'rope_scaling', 'attention_bias', 'layer_types']:
    for value in ODD:
      (model / 'config.json').write_text(json.dumps(block | {name: value}))
      with contextlib.suppress(ValueError):
        hub.open(model)


def test_any_byte_of_a_header_may_be_odd(model):
  draw = np.random.default_rng(0)
  for name in (TWO, hub.INDEX, 'config.json'):
    whole = (model / name).read_bytes()
    size = (
      8 + int.from_bytes(whole[:8], 'little') if name == TWO else len(whole)
    )
    for _ in range(100):
      broken = bytearray(whole)
      broken[draw.integers(size)] = draw.integers(256)
      (model / name).write_bytes(broken)
      with contextlib.suppress(ValueError):
        hub.open(model)
    (model / name).write_bytes(whole)
