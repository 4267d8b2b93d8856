"""Adapters in the files of PEFT: adapter_config.json and safetensors."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from flax import traverse_util
import numpy as np

from postrain.models import families
from postrain.models.config import Config
from postrain.models.families import Part, Tensor
from postrain.models.lora import LoRA
from postrain.models.transformer import transformer
from postrain.types import Params, Path

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
# What a file may say without changing the function that we compute.
SUPPORTED = {
  'peft_type': ('LORA',), 'bias': (None, 'none'), 'use_dora': (None, False),
  'modules_to_save': (None, []), 'trainable_token_indices': (None,),
  'target_parameters': (None, []), 'layer_replication': (None,),
  'alora_invocation_tokens': (None,), 'use_bdlora': (None, False),
}  # fmt: skip


def save(
  directory: str | os.PathLike[str],
  config: Config,
  lora: LoRA,
  adapters: Params,
  *,
  base: str | None = None,
) -> None:
  """Write adapters as PEFT and vLLM read them.

  Where a family's files hold several of our matrices in one (Phi-3, GPT-2),
  the adapter of the one is that of all, in blocks, and of their common rank.

  Args:
    directory: made if absent; it may hold an earlier adapter.
    config: of the base model.
    lora: what was adapted, and how.
    adapters: of `postrain.adapted.Adapted` parameters.
    base: name or directory of the base, for the record.

  Raises:
    ValueError: an adapter is not finite.
  """
  from safetensors.numpy import save_file

  tensors, ranks, modules = {}, {}, set()
  leaves: dict[Path, Any] = traverse_util.flatten_dict(adapters)
  for name, place in families.tensors(config).items():
    parts = [i for i, p in enumerate(place.parts) if (*p.path, 'a') in leaves]
    if not parts:
      continue
    module = name.removesuffix('.weight')
    short = re.sub(r'^.*?\.\d+\.', '', module)
    modules.add(short)
    a, b = _stored(place, parts, leaves)
    if len(a) != lora.rank:
      ranks[short] = len(a)
    for letter, value in (('A', a), ('B', b)):
      key = f'base_model.model.{module}.lora_{letter}.weight'
      if not np.isfinite(value).all():
        raise ValueError(f'{key} holds NaN or infinity: take an earlier state')
      tensors[key] = np.ascontiguousarray(value)
  root = pathlib.Path(directory)
  root.mkdir(parents=True, exist_ok=True)
  (root / CONFIG).unlink(missing_ok=True)  # it comes last: without it, nothing
  save_file(tensors, root / WEIGHTS, metadata={'format': 'pt'})
  power = 0.5 if lora.rank_stabilized else 1
  block = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'inference_mode': True,
    'r': lora.rank,
    'lora_alpha': lora.alpha,
    'use_rslora': lora.rank_stabilized,
    'rank_pattern': ranks,
    'alpha_pattern': {k: lora.scale * r**power for k, r in ranks.items()},
    'target_modules': sorted(modules),
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': config.family == 'gpt2',
  }
  text = json.dumps(block, indent=2) + '\n'
  (root / CONFIG).write_text(text, encoding='utf-8')


def _stored(
  place: Tensor, parts: list[int], leaves: Mapping[Path, Any]
) -> tuple[np.ndarray, np.ndarray]:
  """A [rank, in] and B [out, rank] of a tensor, from those of its parts."""
  found = []
  for part, rows in [_rows(place)[i] for i in parts]:
    a, b = (np.asarray(leaves[*part.path, x][part.index]) for x in 'ab')
    found.append((a.reshape(-1, a.shape[-1]).T, b.reshape(len(b), -1).T, rows))
  if len(place.parts) == 1:
    return found[0][:2]
  rank = sum(len(a) for a, *_ in found)
  whole = np.zeros((place.shape[place.axis], rank), found[0][1].dtype)
  start = 0
  for a, b, rows in found:
    whole[rows, start : start + len(a)] = b
    start += len(a)
  return np.concatenate([a for a, *_ in found]), whole


def _rows(place: Tensor) -> list[tuple[Part, slice]]:
  """Each part of a tensor and its rows of B."""
  if len(place.parts) == 1:
    return [(place.parts[0], slice(None))]
  return [(part, where[-1]) for part, where in place.slices()]


def load(
  directory: str | os.PathLike[str], config: Config
) -> tuple[LoRA, Params]:
  """Read an adapter; nothing is fetched or executed.

  Args:
    directory: with adapter_config.json and adapter_model.safetensors.
    config: of the base model, from `postrain.hub.load`.

  Returns:
    What is adapted and the adapters, for `postrain.models.lora.lora` and
    `postrain.adapted.Adapted`.

  Raises:
    ValueError: files are missing, or hold what these adapters cannot be:
      DoRA, biases, whole modules, some of the layers.
  """
  from safetensors.numpy import load_file

  root = pathlib.Path(directory)
  if absent := [n for n in (CONFIG, WEIGHTS) if not (root / n).is_file()]:
    raise ValueError(
      f'{root} lacks {", ".join(absent)}: give a directory that PEFT saved as'
      ' safetensors'
    )
  block = json.loads((root / CONFIG).read_text(encoding='utf-8'))
  for key, values in SUPPORTED.items():
    if block.get(key) not in values:
      raise ValueError(
        f'{root / CONFIG}: {key}={block.get(key)!r} is not supported;'
        f' supported: {values[0]!r}'
      )
  tensors = load_file(root / WEIGHTS)
  lora, adapters = _restored(config, block, tensors)
  if tensors:
    raise ValueError(
      f'{root / WEIGHTS} has unexpected {", ".join(sorted(tensors)[:4])}: it is'
      ' of another model, or adapts what is no matrix of a layer'
    )
  return lora, adapters


def _restored(
  config: Config, block: Mapping[str, Any], tensors: dict[str, np.ndarray]
) -> tuple[LoRA, Params]:
  """Take the adapters of all layers out of the tensors of a file."""
  model = transformer(config)
  kernels = (model.kernels or dict)()
  found: dict[Path, list[np.ndarray]] = {}
  stabilized = bool(block.get('use_rslora'))
  lora = LoRA(
    rank=block['r'], alpha=block['lora_alpha'], targets='',
    rank_stabilized=stabilized,
  )  # fmt: skip
  for name, place in families.tensors(config).items():
    module = name.removesuffix('.weight')
    keys = [f'base_model.model.{module}.lora_{x}.weight' for x in 'AB']
    if not all(key in tensors for key in keys):
      continue
    down, up = (tensors.pop(key).astype(np.float32) for key in keys)
    own = LoRA(
      rank=len(down), targets='', rank_stabilized=stabilized,
      alpha=_pattern(block.get('alpha_pattern'), module, lora.alpha),
    )  # fmt: skip
    up *= np.float32(own.scale / lora.scale)
    for part, rows in _rows(place):
      _, num_inputs = kernels[part.path]
      inputs, outputs = (
        part.param_shape[:num_inputs],
        part.param_shape[num_inputs:],
      )
      a = down.T.reshape(*inputs, -1)
      b = up[rows].T.reshape(-1, *outputs)
      found.setdefault((*part.path, 'a'), []).append(a)
      found.setdefault((*part.path, 'b'), []).append(b)
  for path, layers in found.items():
    if len({x.shape for x in layers}) > 1 or len(layers) != config.num_layers:
      raise ValueError(
        f'{"/".join(path)} has {[x.shape for x in layers]} for'
        f' {config.num_layers} layers: adapt all of them, with one rank'
      )
  targets = '|'.join(sorted({'/'.join(path[:-1]) for path in found}))
  stacked = {path: np.stack(layers) for path, layers in found.items()}
  return (
    dataclasses.replace(lora, targets=targets),
    traverse_util.unflatten_dict(stacked),
  )


def _pattern(patterns: Any, module: str, default: Any) -> Any:
  """PEFT's rule: the first pattern that ends the name of a module."""
  for key, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({key})$', module):
      return value
  return default
