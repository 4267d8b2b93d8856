"""Heads of labels: reward models as Hugging Face has them.

``...ForSequenceClassification`` has score.weight [K, D] and is read at the last
token that is not ``pad_token_id``; ``...ForTokenClassification``, which has
score.bias too, at every token. Reward models with heads of their own code
(``Qwen2ForProcessRewardModel``, ``LlamaForRewardModelWithGating``) are refused
by name.
"""

from collections.abc import Mapping
from typing import Any

from postrain.models.config import Config
from postrain.models.families import reading
from postrain.models.families.layout import Part, Tensor
from postrain.models.heads import label_shapes

# What a class of transformers is called after the family's name.
SUFFIXES = {
  'ForCausalLM': 'language_model',
  'LMHeadModel': 'language_model',
  'ForSequenceClassification': 'sequence_labels',
  'ForTokenClassification': 'token_labels',
}
STEMS = {'gemma3_text': 'Gemma3Text'}
# In transformers they have none, or one of other names.
WITHOUT_TOKEN_LABELS = ('gemma3_text', 'gpt2', 'olmo2')


def read(block: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `Config` that say what the model ends in.

  Raises:
    ValueError: a class or a head that is not built.
  """
  for name in block.get('architectures') or ():
    suffixes = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    if not suffixes:
      raise ValueError(
        f'architectures has {name!r}, which is not supported; supported:'
        f' classes that end in {", ".join(SUFFIXES)}'
      )
    head = SUFFIXES[suffixes[0]]
    if head == 'language_model':
      return {}
    reading.supported(block, {'token_classification_bias': (True,)})
    _check_family(block['model_type'], head)
    # transformers writes no names of labels where they are its default two.
    names = block.get('id2label')
    return dict(
      head=head,
      num_labels=len(names) if names else block.get('num_labels', 2),
      tie_embeddings=True,
    )
  return {}


def _check_family(family: str, head: str) -> None:
  if head == 'token_labels' and family in WITHOUT_TOKEN_LABELS:
    raise ValueError(
      f'token classification of {family} is not supported; supported: that of'
      f' families other than {", ".join(WITHOUT_TOKEN_LABELS)}'
    )


def architecture(config: Config, causal: str) -> str:
  """The class in transformers, from that of the language model."""
  if not config.num_labels:
    return causal
  stem = causal
  for suffix in SUFFIXES:
    stem = stem.removesuffix(suffix)
  (suffix,) = (k for k, v in SUFFIXES.items() if v == config.head)
  return STEMS.get(config.family, stem) + suffix


def write(config: Config, source: Mapping[str, Any] | None) -> dict[str, Any]:
  """Labels and padding of a config.json.

  Raises:
    ValueError: no padding token by which transformers finds the last token.
  """
  if not config.num_labels:
    return {}
  _check_family(config.family, config.head)
  if config.head == 'sequence_labels':
    check_padding(config, source or {})
  names = (source or {}).get('id2label') or {}
  if len(names) != config.num_labels:
    names = {str(i): f'LABEL_{i}' for i in range(config.num_labels)}
  return {
    'id2label': dict(names),
    'label2id': {name: int(i) for i, name in names.items()},
  }


def check_padding(config: Config, source: Mapping[str, Any]) -> None:
  """Refuse a padding token with which transformers reads another token.

  It takes the last token that is not ``pad_token_id``, so that such tokens
  inside a text do no harm and one at its end is passed over.

  Raises:
    ValueError: there is none, or texts end with it.
  """
  pad, ends = source.get('pad_token_id'), source.get('eos_token_id')
  if pad is None or not 0 <= pad < config.vocab_size:
    raise ValueError(
      f'pad_token_id={pad!r}: transformers finds the token to score by it; give'
      ' source an id of the vocabulary that no text ends with'
    )
  if pad in (ends if isinstance(ends, list) else [ends]):
    raise ValueError(
      f'pad_token_id={pad} ends texts (eos_token_id={ends}): transformers would'
      ' score the token before it; give source another pad_token_id, or no'
      ' eos_token_id if the model was trained so'
    )


def tensors(config: Config) -> dict[str, Tensor]:
  """Name in the file -> its place."""
  names = {'score': 'score.weight', 'score_bias': 'score.bias'}
  out = {}
  for param, shape in label_shapes(config).items():
    axes = tuple(range(len(shape)))
    part = Part((param,), (), shape, axes[::-1], shape[::-1])
    out[names[param]] = Tensor((part,))
  return out
