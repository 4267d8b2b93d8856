"""Tokenizers: read from a directory or made on the spot, and checked.

Nothing is fetched. What a user wrote is never read as a special token: a
prompt that spells ``<|assistant|>`` must not open a turn.
"""

from collections.abc import Iterable, Sequence
import json
import os
import pathlib
from typing import Any

from postrain.chat import encode_chat as encode_chat

__all__ = ['byte_level', 'check', 'load', 'train_bpe']

PAD, EOS = '<|pad|>', '<|eos|>'
ROLES = ('system', 'user', 'assistant')
SPECIAL_TOKENS = (PAD, EOS, *(f'<|{role}|>' for role in ROLES))

# A turn is its role and its text; only the assistant ends its turns, so that
# the end of sequence is always a token that the policy chose.
CHAT_TEMPLATE = (
  '{% for message in messages %}'
  "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
  "{{ raise_exception('unknown role ' + message['role']) }}"
  '{% endif %}'
  "{{ '<|' + message['role'] + '|>' + message['content'] }}"
  "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def load(directory: str | os.PathLike[str]) -> Any:
  """Load a fast tokenizer from a local directory in Hugging Face layout.

  Never asks a hub, and runs no code of the directory: a name that is no
  directory and a tokenizer with a class of its own are errors at once.

  Args:
    directory: holds ``tokenizer.json``, which is read as it stands, or an older
      layout (``vocab.json`` and ``merges.txt``, ``tokenizer.model``) with a
      ``config.json`` or ``tokenizer_config.json`` that says of which model.

  Raises:
    ValueError: there is no such directory, no tokenizer in it that can be
      read, or one that needs code.
  """
  path = pathlib.Path(directory)
  if not path.is_dir():
    raise ValueError(
      f'tokenizer directory {str(path)!r} does not exist: download the model'
      ' first and pass its local directory, hub names are not resolved'
    )
  layouts = ('tokenizer.json', 'vocab.json', 'tokenizer.model')
  if not any((path / name).is_file() for name in layouts):
    raise ValueError(
      f'{str(path)!r} has no tokenizer.json: save a fast tokenizer there with'
      ' save_pretrained, or make one with byte_level or train_bpe'
    )
  _refuse_code(path)
  # The class of a model rebuilds what tokenizer.json says, not always alike.
  whole = (path / 'tokenizer.json').is_file()
  try:
    chosen = _fast_class() if whole else _auto_class()
    loaded = chosen.from_pretrained(path, local_files_only=True)
  except Exception as error:  # each layout has its own
    if whole:
      _json(path / 'tokenizer.json')  # says so where it is truncated
    raise ValueError(
      f'the tokenizer in {str(path)!r} cannot be read ({error}): where the'
      ' library of its layout (sentencepiece, tiktoken) is installed, load it'
      ' and write tokenizer.json with save_pretrained'
    ) from error
  if not loaded.is_fast:
    raise ValueError(
      f'the tokenizer in {str(path)!r} is a {type(loaded).__name__}, which does'
      ' not say where in a text its tokens are: save it as tokenizer.json'
    )
  return loaded


def byte_level(*, special_tokens: Sequence[str] = ()) -> Any:
  """Make a tokenizer of the 256 bytes: no training, exact on any text.

  Args:
    special_tokens: further ones beside `SPECIAL_TOKENS`.
  """
  from tokenizers import Tokenizer, models, pre_tokenizers

  specials = _special_tokens(special_tokens)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
  backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  return _wrapped(backend, specials)


def train_bpe(
  texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str] = ()
) -> Any:
  """Train a byte-level BPE tokenizer that splits numbers into digits.

  Args:
    texts: what to learn from; the same texts give the same tokenizer.
    vocab_size: ids at most, special tokens and the 256 bytes included; fewer
      where the texts run out of pairs.
    special_tokens: further ones beside `SPECIAL_TOKENS`.

  Raises:
    ValueError: no text, or a vocabulary too small for the bytes.

  References:
    Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword
    Units, arXiv:1508.07909.
  """
  from tokenizers import Tokenizer, models, pre_tokenizers, trainers

  specials = _special_tokens(special_tokens)
  smallest = 256 + len(specials)
  if vocab_size < smallest:
    raise ValueError(
      f'vocab_size={vocab_size}: the bytes and the special tokens alone take'
      f' {smallest}; raise it or use byte_level'
    )
  texts = list(texts)
  if not any(texts):
    raise ValueError('no text to train on: pass some, or use byte_level')
  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(specials),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer=trainer)
  return _wrapped(backend, specials)


def check(
  tokenizer: Any, vocab_size: int, *, stop_ids: Sequence[int] | None = None
) -> None:
  """Refuse a tokenizer that would train something silently wrong.

  Args:
    tokenizer: of prompts and completions.
    vocab_size: rows of the model's embedding.
    stop_ids: what ends a completion; None for the end-of-sequence token.

  Raises:
    ValueError: an id without a row in the embedding; no padding token, or one
      that also ends completions (the loss would skip the end, and the model
      never learn to stop); nothing that ends a completion.
  """
  largest = max(tokenizer.get_vocab().values())
  if largest >= vocab_size:
    raise ValueError(
      f'the tokenizer has ids up to {largest}, the embedding {vocab_size} rows:'
      f' resize the embedding to at least {largest + 1}, or load the'
      ' tokenizer that belongs to the model'
    )
  if stop_ids is None:
    if tokenizer.eos_token_id is None:
      raise ValueError(
        'eos_token=None: set tokenizer.eos_token, or give stop_ids'
      )
    stop_ids = (tokenizer.eos_token_id,)
  outside = [i for i in stop_ids if not 0 <= i < vocab_size]
  if outside or not stop_ids:
    raise ValueError(
      f'stop_ids={tuple(stop_ids)}: expected at least one id, all in'
      f' [0, {vocab_size})'
    )
  pad = tokenizer.pad_token_id
  if pad is None:
    raise ValueError(
      'pad_token=None: set tokenizer.pad_token to a token that text never uses'
    )
  if pad in (*stop_ids, tokenizer.eos_token_id):
    raise ValueError(
      f'pad_token={tokenizer.pad_token!r} (id {pad}) also ends completions:'
      ' set tokenizer.pad_token to another, unused token'
    )


def encode_text(tokenizer: Any, text: str, *, start: bool = False) -> list[int]:
  """Encode a text as mere text: special tokens in it are spelled out.

  Args:
    tokenizer: a fast tokenizer.
    text: of a user, a data set, a completion.
    start: put what the tokenizer puts before a sequence (the beginning-of-
      sequence token of a Llama); what it would append is left off.
  """
  ids = tokenizer(text, add_special_tokens=start, split_special_tokens=True)
  ids = list(ids['input_ids'])
  if start and ids and ids[-1] == tokenizer.eos_token_id:
    ids.pop()
  return ids


def _special_tokens(further: Sequence[str]) -> tuple[str, ...]:
  tokens = (*SPECIAL_TOKENS, *further)
  if len(set(tokens)) < len(tokens) or not all(tokens):
    raise ValueError(
      f'special_tokens={tuple(further)}: they must be distinct, not empty and'
      f' none of {SPECIAL_TOKENS}'
    )
  return tokens


def _wrapped(backend: Any, specials: Sequence[str]) -> Any:
  from tokenizers import AddedToken, decoders

  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(
    [AddedToken(token, special=True, normalized=False) for token in specials]
  )
  return _fast_class()(
    tokenizer_object=backend,
    pad_token=PAD,
    eos_token=EOS,
    extra_special_tokens=[t for t in specials if t not in (PAD, EOS)],
    padding_side='left',
    chat_template=CHAT_TEMPLATE,
    clean_up_tokenization_spaces=False,
  )


def _refuse_code(path: pathlib.Path) -> None:
  """Refuse a directory whose tokenizer is a class in a file beside it."""
  for name in ('tokenizer_config.json', 'config.json'):
    written = _json(path / name) if (path / name).is_file() else {}
    classes = written.get('auto_map') or {}
    # An old form is the list of the tokenizer's classes alone.
    if isinstance(classes, list) or 'AutoTokenizer' in classes:
      raise ValueError(
        f'{str(path / name)!r} names a class of its own, auto_map={classes!r}:'
        ' no code of a download is run; take a directory with tokenizer.json'
        ' alone'
      )


def _json(file: pathlib.Path) -> dict[str, Any]:
  try:
    written = json.loads(file.read_text('utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{str(file)!r} is no JSON ({error}): copy it again'
    ) from error
  if not isinstance(written, dict):
    raise ValueError(f'{str(file)!r} holds no JSON object: copy it again')
  return written


def _auto_class() -> Any:
  _fast_class()
  from transformers import AutoTokenizer

  return AutoTokenizer


def _fast_class() -> type:
  # Transformers advises to install PyTorch, which nothing here uses.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  from transformers import PreTrainedTokenizerFast

  return PreTrainedTokenizerFast
