"""Hugging Face directories in and out: config.json, safetensors, tokenizer."""

from collections.abc import Mapping
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

from flax import traverse_util
import numpy as np

from postrain.models import families
from postrain.models.transformer import Config, transformer
from postrain.types import Model, Params

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
TOKENIZER_FILES = (
  'tokenizer*', 'special_tokens_map.json', 'added_tokens.json', 'vocab.*',
  'merges.txt', 'chat_template.jinja', 'generation_config.json',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A loaded directory; ``params`` are NumPy arrays on the host.

  ``source`` is its config.json.
  """

  config: Config
  model: Model
  params: Params
  source: Mapping[str, Any]


def load(
  directory: str | os.PathLike[str],
  *,
  dtype: str = 'float32',
  head: str = 'language_model',
) -> Pretrained:
  """Load a directory of a known family; nothing is fetched or executed.

  The parameters stay on the host, so that a sharded placement never passes
  through one device. For another precision of activations or rematerialisation:
  ``transformer(dataclasses.replace(loaded.config, remat=...))``.

  Args:
    directory: with config.json and safetensors, sharded or not.
    dtype: of parameters and activations; files may be of another.
    head: what the model must end in, see `Config`; a reward model is no policy.

  Raises:
    ValueError: files are missing, truncated, pickled or outside the directory;
      tensors are missing, unexpected, of a wrong shape or not finite; the
      model is of an unsupported kind.
  """
  root = pathlib.Path(directory)
  block = _read_json(root / 'config.json')
  config = dataclasses.replace(
    families.from_huggingface(block), dtype=dtype, param_dtype=dtype
  )
  if config.head != head:
    raise ValueError(
      f'{root} has head={config.head!r}, not {head!r}: choose another'
      ' directory, or load it with its head'
    )
  params = _read_params(root, config)
  return Pretrained(config, transformer(config), params, block)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f'{path} is missing: give a Hugging Face directory')
  try:
    block = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}; copy it again') from error
  if not isinstance(block, dict):
    raise ValueError(f'{path} holds no JSON object; copy it again')
  return block


def weight_files(root: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a directory, from its index where it has one.

  Raises:
    ValueError: there are none, or the index names something else.
  """
  if (root / SINGLE).is_file():
    return [root / SINGLE]
  if not (root / INDEX).is_file():
    pickled = sorted(path.name for path in root.glob('*.bin'))
    found = f'; {", ".join(pickled)} may run code when read' if pickled else ''
    raise ValueError(
      f'{root} has neither {SINGLE} nor {INDEX}{found}: convert the weights'
      ' to safetensors'
    )
  names = _read_json(root / INDEX).get('weight_map')
  if not isinstance(names, dict) or not names:
    raise ValueError(f'{root / INDEX} has no weight_map: copy it again')
  for name in names.values():
    if not re.fullmatch(r'[\w.+-]+\.safetensors', str(name)):
      raise ValueError(
        f'{root / INDEX} names {name!r}: only *.safetensors beside the index'
        ' are read'
      )
  files = [root / name for name in sorted(set(names.values()))]
  if absent := [path.name for path in files if not path.is_file()]:
    raise ValueError(f'{root} lacks {", ".join(absent)}: copy them again')
  return files


def _sources(files: list[pathlib.Path]) -> dict[str, Any]:
  """The open file that holds each tensor."""
  from safetensors import SafetensorError, safe_open

  sources: dict[str, Any] = {}
  for path in files:
    try:
      file = safe_open(path, framework='numpy')
    except SafetensorError as error:
      raise ValueError(
        f'{path} is truncated or no safetensors file ({error}): copy it again'
      ) from error
    sources |= dict.fromkeys(file.keys(), file)
  return sources


def _read_params(root: pathlib.Path, config: Config) -> Params:
  places = families.tensors(config)
  sources = _sources(weight_files(root))
  # Old files store what is derived, and a tied head twice.
  known = {name for name in sources if name.endswith('rotary_emb.inv_freq')}
  tied = config.tie_embeddings and 'lm_head.weight' in sources
  known |= {'lm_head.weight'} if tied else set()
  missing = sorted(places.keys() - sources.keys())
  unexpected = sorted(sources.keys() - places.keys() - known)
  if missing or unexpected:
    raise ValueError(
      f'{root} lacks {len(missing)} tensors ({", ".join(missing[:8])}) and has'
      f' {len(unexpected)} unexpected ({", ".join(unexpected[:8])}): its files'
      ' are incomplete, or config.json describes another model'
    )
  leaves = {
    path: np.empty(shape, config.param_dtype)
    for path, shape in families.param_shapes(config).items()
  }
  for name, place in places.items():
    value = _checked(name, sources[name].get_tensor(name), place.shape)
    place.restore(value.astype(config.param_dtype), leaves)
  if tied:
    head = sources['lm_head.weight'].get_tensor('lm_head.weight')
    if not np.array_equal(head.astype(config.dtype), leaves['embedding',]):
      raise ValueError(
        f'{root}: lm_head.weight differs from the embedding although'
        ' tie_word_embeddings is true: set it to false in config.json'
      )
  return traverse_util.unflatten_dict(leaves)


def _checked(
  name: str, value: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  if value.shape != shape:
    raise ValueError(
      f'{name} has shape {value.shape}, expected {shape}: config.json'
      ' describes another model'
    )
  if not np.isfinite(value).all():
    raise ValueError(
      f'{name} holds NaN or infinity: use weights that are finite'
    )
  return value


def save(
  directory: str | os.PathLike[str],
  config: Config,
  params: Params,
  *,
  source: Mapping[str, Any] | None = None,
  tokenizer: Any = None,
  max_shard_bytes: int = 5_000_000_000,
  overwrite: bool = False,
) -> None:
  """Write a directory that transformers and vLLM read, all of it or nothing.

  Args:
    directory: appears by one rename when it is complete.
    config: of the model.
    params: its parameters, fully addressable from this process.
    source: the config.json that the model came from, for its token ids.
    tokenizer: a directory to copy tokenizer files from, or an object with
      ``save_pretrained``; None writes none.
    max_shard_bytes: above this the weights are sharded with an index.
    overwrite: replace an earlier export (a directory with a config.json).

  Raises:
    ValueError: the directory exists, or the parameters are not those of
      ``config`` or not finite.
  """
  target = pathlib.Path(directory).absolute()
  replaceable = overwrite and (target / 'config.json').is_file()
  if target.exists() and any(target.iterdir()) and not replaceable:
    raise ValueError(
      f'{target} is not empty: choose another directory, or replace an'
      ' earlier export with overwrite=True'
    )
  leaves = _leaves(config, params)
  dtype = str(leaves['embedding',].dtype)
  block = families.to_huggingface(
    dataclasses.replace(config, param_dtype=dtype), source
  )
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    dir=target.parent, prefix=f'.{target.name}.'
  ) as scratch:
    root = pathlib.Path(scratch) / 'new'
    root.mkdir()
    _write_json(root / 'config.json', block)
    _write_weights(root, config, leaves, max_shard_bytes)
    _write_tokenizer(root, tokenizer)
    if target.exists():
      target.rename(pathlib.Path(scratch) / 'old')
    root.rename(target)


def _write_json(path: pathlib.Path, block: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(block, indent=2) + '\n', encoding='utf-8')


def _write_weights(
  root: pathlib.Path,
  config: Config,
  leaves: dict[tuple[str, ...], Any],
  max_shard_bytes: int,
) -> None:
  from safetensors.numpy import save_file

  places = families.tensors(config)
  size = {
    name: math.prod(place.shape) * leaves[place.parts[0].path].dtype.itemsize
    for name, place in places.items()
  }
  shards = _shards(size, max_shard_bytes)
  files = [
    f'model-{i + 1:05}-of-{len(shards):05}.safetensors'
    for i in range(len(shards))
  ]
  if len(shards) == 1:
    files = [SINGLE]
  else:
    _write_json(root / INDEX, {
      'metadata': {'total_size': sum(size.values())},
      'weight_map': {
        name: file
        for file, shard in zip(files, shards, strict=True)
        for name in shard
      },
    })  # fmt: skip
  for file, shard in zip(files, shards, strict=True):
    tensors = {
      name: _checked(name, places[name].stored(leaves), places[name].shape)
      for name in shard
    }
    save_file(tensors, root / file, metadata={'format': 'pt'})


def _shards(size: Mapping[str, int], max_bytes: int) -> list[list[str]]:
  """Names in their order, as many to a shard as fit, at least one."""
  shards: list[list[str]] = [[]]
  room = max_bytes
  for name, num_bytes in size.items():
    if shards[-1] and num_bytes > room:
      shards.append([])
      room = max_bytes
    shards[-1].append(name)
    room -= num_bytes
  return shards


def _leaves(config: Config, params: Params) -> dict[tuple[str, ...], Any]:
  """The parameters by path, if they are those of the configuration."""
  leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
  found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  wrong = found.items() ^ families.param_shapes(config).items()
  if wrong:
    raise ValueError(
      f'params and config differ in {", ".join(sorted(map(str, wrong)))}:'
      ' give the parameters of this config'
    )
  return leaves


def _write_tokenizer(root: pathlib.Path, tokenizer: Any) -> None:
  if tokenizer is None:
    return
  if hasattr(tokenizer, 'save_pretrained'):
    tokenizer.save_pretrained(root)
    return
  files = {f for p in TOKENIZER_FILES for f in pathlib.Path(tokenizer).glob(p)}
  if not files:
    raise ValueError(f'{tokenizer} has no tokenizer files to copy')
  for path in files:
    shutil.copyfile(path, root / path.name)
