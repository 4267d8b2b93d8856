"""Write a Hugging Face directory, one file at a time, all or nothing."""

from collections.abc import Mapping
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from typing import Any

from flax import traverse_util
import numpy as np

from postrain.hub.directory import GENERATION, INDEX, SINGLE
from postrain.hub.headers import WEIGHTS
from postrain.models import families
from postrain.models.config import Config
from postrain.models.families import Path, Tensor
from postrain.types import Params

TOKENIZER_FILES = (
  'tokenizer*', 'special_tokens_map.json', 'added_tokens.json', 'vocab.*',
  'merges.txt', 'chat_template.*', 'additional_chat_templates/*.jinja',
  GENERATION,
)  # fmt: skip


def save(
  directory: str | os.PathLike[str],
  config: Config,
  params: Params,
  *,
  source: Mapping[str, Any] | None = None,
  tokenizer: Any = None,
  generation_config: Mapping[str, Any] | None = None,
  max_shard_bytes: int = 5_000_000_000,
  overwrite: bool = False,
) -> None:
  """Write a directory that transformers and vLLM read, all of it or nothing.

  Args:
    directory: appears by one rename when it is complete.
    config: of the model.
    params: its parameters, in shards or not, fully addressable from this
      process; the tensors of each file are gathered, written, forgotten.
    source: the config.json that the model came from, for its token ids.
    tokenizer: a directory to copy tokenizer files, chat templates and
      generation_config.json from, or an object with ``save_pretrained``; None
      writes none.
    generation_config: the generation_config.json to write, for its stop ids.
    max_shard_bytes: of a file, and so of the memory that writing takes; above
      this the weights are sharded with an index.
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
    if generation_config is not None:
      _write_json(root / GENERATION, generation_config)
    if target.exists():
      target.rename(pathlib.Path(scratch) / 'old')
    root.rename(target)


def _write_json(path: pathlib.Path, block: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(block, indent=2) + '\n', encoding='utf-8')


def _write_weights(
  root: pathlib.Path,
  config: Config,
  leaves: Mapping[Path, Any],
  max_shard_bytes: int,
) -> None:
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
    _write_file(root / file, {name: places[name] for name in shard}, leaves)
    # The library writes files that their owner alone may read.
    shutil.copymode(root / 'config.json', root / file)


def _write_file(
  path: pathlib.Path, places: Mapping[str, Tensor], leaves: Mapping[Path, Any]
) -> None:
  from safetensors.numpy import save_file

  tensors = {}
  for name, place in places.items():
    tensors[name] = place.stored(leaves)
    with np.errstate(invalid='ignore'):
      finite = np.isfinite(tensors[name]).all()
    if not finite:
      raise ValueError(
        f'{name} holds NaN or infinity: export parameters that are finite'
      )
  save_file(tensors, path, {'format': 'pt'})


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


def _leaves(config: Config, params: Params) -> dict[Path, Any]:
  """The parameters by path, if they are those of the configuration."""
  leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
  found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  wrong = found.items() ^ families.param_shapes(config).items()
  if wrong:
    raise ValueError(
      f'params and config differ in {", ".join(sorted(map(str, wrong)))}:'
      ' give the parameters of this config'
    )
  if not all(getattr(x, 'is_fully_addressable', True) for x in leaves.values()):
    raise ValueError(
      'params lie on the devices of several processes: gather them first, with'
      ' jax.experimental.multihost_utils.process_allgather'
    )
  dtypes = WEIGHTS.values()
  if odd := {str(x.dtype) for x in leaves.values()} - set(dtypes):
    raise ValueError(
      f'params of {", ".join(sorted(odd))}: weights may be {", ".join(dtypes)}'
    )
  return leaves


def _write_tokenizer(root: pathlib.Path, tokenizer: Any) -> None:
  if tokenizer is None:
    return
  if hasattr(tokenizer, 'save_pretrained'):
    tokenizer.save_pretrained(root)
    return
  source = pathlib.Path(tokenizer)
  files = {path for each in TOKENIZER_FILES for path in source.glob(each)}
  if not files:
    raise ValueError(f'{tokenizer} has no tokenizer files to copy')
  for path in files:
    copy = root / path.relative_to(source)
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, copy)
