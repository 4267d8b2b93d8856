"""Random weights in a Hugging Face directory, and rows of random words."""

import json
import os
import pathlib

import jax
import numpy as np

from benchmarks.shapes import EOS, NUM_BATCHES, PAD, Shape
from postrain import hub
from postrain.models.config import Config
from postrain.models.heads import with_labels
from postrain.models.transformer import transformer


def make(folder: str | os.PathLike[str], shape: Shape) -> None:
  """Write weights, tokenizer, demonstrations and pairs of a shape.

  The weights are those of every side, in the files that each reads by its own
  loader; ``critic`` has the same trunk with a random head of one value. A
  demonstration gets its last token, the end, from each side.
  """
  config = Config(**shape.model())
  params = jax.jit(transformer(config).init)(jax.random.key(0))
  hub.save(
    folder, config, params, source={'pad_token_id': PAD},
    tokenizer=_tokenizer(shape.vocab_size),
  )  # fmt: skip
  labelled, valued = with_labels(config, params)
  head = np.random.default_rng(1).standard_normal(valued['score'].shape)
  valued['score'] = np.float32(head / shape.model_dim**0.5)
  hub.save(
    os.path.join(folder, 'critic'), labelled, valued,
    source={'pad_token_id': PAD},
  )  # fmt: skip
  draw = np.random.default_rng(0)

  def words(number: int) -> str:
    return ' '.join(f't{i}' for i in draw.integers(2, shape.vocab_size, number))

  # A completion begins with a space: some join it to the prompt as text.
  length = shape.completion_length - 1

  def row(*names: str) -> dict[str, str]:
    completions = {name: ' ' + words(length) for name in names}
    return {'prompt': words(shape.prompt_length), **completions}

  files = {
    'demonstrations': [row('completion') for _ in range(shape.num_rows)],
    'pairs': [
      row('chosen', 'rejected') for _ in range(NUM_BATCHES * shape.num_pairs)
    ],
  }
  for name, rows in files.items():
    path = pathlib.Path(folder) / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(each) + '\n' for each in rows))


def _tokenizer(vocab_size: int) -> object:
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  vocab = {'<pad>': PAD, '<eos>': EOS}
  vocab |= {f't{i}': i for i in range(2, vocab_size)}
  backend = Tokenizer(models.WordLevel(vocab, unk_token='<pad>'))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token='<pad>', eos_token='<eos>',
    padding_side='left',
  )  # fmt: skip
