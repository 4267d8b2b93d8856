"""Check a Hugging Face directory by its headers, before a weight is read."""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
import re
from typing import Any

from postrain.hub.headers import (
  WEIGHTS,
  Entry,
  files_inside,
  read_header,
  read_json,
)
from postrain.models import families
from postrain.models.config import Config

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
GENERATION = 'generation_config.json'
TIED_HEAD = 'lm_head.weight'
# Old files store what follows from the configuration.
DERIVED = re.compile(r'.*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)')
# Fields of config.json that are counts in every family that has them.
COUNTS = (
  'num_hidden_layers', 'n_layer', 'num_experts', 'num_local_experts',
  'num_experts_per_tok', 'vocab_size', 'hidden_size', 'n_embd',
  'intermediate_size', 'moe_intermediate_size', 'n_inner',
  'shared_expert_intermediate_size', 'num_attention_heads', 'n_head',
  'num_key_value_heads', 'head_dim', 'max_position_embeddings', 'n_positions',
)  # fmt: skip
STACKS = COUNTS[:4]
FLAGS = ('tie_word_embeddings', 'attention_bias', 'qkv_bias', 'mlp_bias',
         'norm_topk_prob')  # fmt: skip
SMALL = ('rms_norm_eps', 'layer_norm_epsilon')


@dataclasses.dataclass(frozen=True)
class Directory:
  """A directory whose headers are in order.

  Attributes:
    root: its path.
    config: of the model.
    source: its config.json.
    generation_config: its generation_config.json, None where it has none.
    entries: where the files have each tensor.
  """

  root: pathlib.Path
  config: Config
  source: Mapping[str, Any]
  generation_config: Mapping[str, Any] | None
  entries: Mapping[str, Entry]


def open(
  directory: str | os.PathLike[str],
  *,
  dtype: str = 'float32',
  head: str | None = 'language_model',
) -> Directory:
  """Check all that the headers of a directory tell; no weight is read.

  Args:
    directory: with config.json and safetensors, sharded or not.
    dtype: that parameters and activations will have.
    head: what the model must end in, see `Config`; a reward model is no policy.
      None for whatever it ends in.

  Raises:
    ValueError: files are missing, truncated, pickled or outside the directory;
      the index and the files differ; tensors are missing, unexpected, of a
      wrong shape or no floats; the model is of an unsupported kind or ends in
      another head.
  """
  root = pathlib.Path(directory)
  present = [n for n in ('config.json', GENERATION) if (root / n).is_file()]
  files_inside(root, present)
  block = read_json(root / 'config.json')
  generation = read_json(root / GENERATION) if GENERATION in present else None
  entries = _tensors(root)
  _check_fields(root / 'config.json', block, len(entries))
  config = dataclasses.replace(
    _config(root / 'config.json', block), dtype=dtype, param_dtype=dtype
  )
  if head is not None and config.head != head:
    raise ValueError(
      f'{root} has head={config.head!r}, not {head!r}: choose another'
      ' directory, or load it with its head'
    )
  _check_size(root, config, len(entries))
  entries = _prefixed(config, entries)
  _check_tensors(root, config, entries)
  return Directory(root, config, block, generation, entries)


def _check_fields(
  path: pathlib.Path, block: Mapping[str, Any], num_tensors: int
) -> None:
  """Before anything of these sizes is made."""
  for name in COUNTS:
    value = block.get(name)
    if value is not None and (type(value) is not int or value < 1):
      raise ValueError(f'{path}: {name}={value!r} must be a whole number > 0')
    if name in STACKS and value is not None and value > num_tensors:
      raise ValueError(
        f'{path}: {name}={value}, and the files hold {num_tensors} tensors: it'
        ' describes another model'
      )
  for name in FLAGS:
    if block.get(name) not in (None, True, False):
      raise ValueError(f'{path}: {name}={block[name]!r} must be true or false')
  for name in SMALL:
    value = block.get(name, 1e-6)
    if type(value) not in (int, float) or not 0 < value < 1:
      raise ValueError(f'{path}: {name}={value!r} must be in (0, 1)')


def _config(path: pathlib.Path, block: Mapping[str, Any]) -> Config:
  try:
    return families.from_huggingface(block)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
    raise ValueError(
      f'{path} has a field of another kind than expected ({error}); copy it'
      ' again'
    ) from error


def weight_files(root: pathlib.Path) -> dict[str, list[str] | None]:
  """The safetensors files of a directory, and what its index says is in each.

  Raises:
    ValueError: there are none, or the index names something else.
  """
  if (root / SINGLE).is_file():
    return {SINGLE: None}
  if not (root / INDEX).is_file():
    pickled = sorted(path.name for path in root.glob('*.bin'))
    found = f'; {", ".join(pickled)} may run code when read' if pickled else ''
    raise ValueError(
      f'{root} has neither {SINGLE} nor {INDEX}{found}: convert the weights'
      ' to safetensors'
    )
  files_inside(root, [INDEX])
  names = read_json(root / INDEX).get('weight_map')
  if not isinstance(names, dict) or not names:
    raise ValueError(f'{root / INDEX} has no weight_map: copy it again')
  files: dict[str, list[str] | None] = {}
  for tensor, name in names.items():
    if not re.fullmatch(r'[\w.+-]+\.safetensors', str(name)):
      raise ValueError(
        f'{root / INDEX} names {name!r}: only *.safetensors beside the index'
        ' are read'
      )
    files[name] = [*(files.get(name) or []), tensor]
  if absent := sorted(name for name in files if not (root / name).is_file()):
    raise ValueError(f'{root} lacks {", ".join(absent)}: copy them again')
  return files


def _tensors(root: pathlib.Path) -> dict[str, Entry]:
  listed = weight_files(root)
  entries: dict[str, Entry] = {}
  for name, path in files_inside(root, sorted(listed)).items():
    found = read_header(path)
    if twice := sorted(found.keys() & entries.keys()):
      raise ValueError(
        f'{_some(twice)} is in {entries[twice[0]].path.name} and again in'
        f' {name}: take the files of one export'
      )
    expected = listed[name]
    if expected is not None and set(expected) != found.keys():
      raise ValueError(
        f'{root / INDEX} and {name} differ in'
        f' {_some(sorted(found.keys() ^ set(expected)))}: take the index and'
        ' the files of one export'
      )
    entries |= found
  return entries


def _check_size(root: pathlib.Path, config: Config, num_tensors: int) -> None:
  """Before the names of all layers and experts are made."""
  if config.num_layers * max(config.num_experts, 1) > num_tensors:
    raise ValueError(
      f'{root / "config.json"}: {config.num_layers} layers of'
      f' {config.num_experts} experts, and the files hold {num_tensors}'
      ' tensors: it describes another model'
    )


def _prefixed(
  config: Config, entries: Mapping[str, Entry]
) -> Mapping[str, Entry]:
  """Entries by full names; files of a bare model, such as gpt2's, lack some."""
  names = families.tensors(config)
  table = next(iter(names))
  prefix = table.split('.')[0] + '.'
  if table.removeprefix(prefix) not in entries:
    return entries
  heads = {TIED_HEAD, *(n for n in names if not n.startswith(prefix))}
  return {n if n in heads else prefix + n: e for n, e in entries.items()}


def _check_tensors(
  root: pathlib.Path, config: Config, entries: Mapping[str, Entry]
) -> None:
  shapes = {n: place.shape for n, place in families.tensors(config).items()}
  found = {name for name in entries if not DERIVED.fullmatch(name)}
  if config.tie_embeddings and TIED_HEAD in found:  # some have it twice
    shapes[TIED_HEAD] = (config.vocab_size, config.model_dim)
  missing = sorted(shapes.keys() - found)
  unexpected = sorted(found - shapes.keys())
  if missing or unexpected:
    raise ValueError(
      f'{root} lacks {len(missing)} tensors ({_some(missing)}) and has'
      f' {len(unexpected)} unexpected ({_some(unexpected)}): its files'
      ' are incomplete, or config.json describes another model'
    )
  for name, shape in shapes.items():
    entry = entries[name]
    if entry.shape != shape:
      raise ValueError(
        f'{entry.path}: {name} has shape {entry.shape}, expected {shape}:'
        ' config.json describes another model'
      )
    if entry.dtype not in WEIGHTS:
      raise ValueError(
        f'{entry.path}: {name} is {entry.dtype}, weights may be'
        f' {", ".join(WEIGHTS)}: take a checkpoint that is not quantised'
      )


def _some(names: list[str]) -> str:
  rest = f' and {len(names) - 8} more' if len(names) > 8 else ''
  return ', '.join(names[:8]) + rest
