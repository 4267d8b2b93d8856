"""Hugging Face model families: configurations and tensor names, both ways.

A family is a module with ``ARCHITECTURES`` (model_type -> the class in
transformers), ``read`` (config.json -> fields of `Config`), ``write`` (the
other way) and ``tensors`` (names in the files -> places in the parameters).
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from postrain.models.config import Config
from postrain.models.families import (
  gemma,
  gpt2,
  heads,
  llama,
  mixtures,
  phi,
  reading,
)
from postrain.models.families.layout import Part, Path, Tensor

__all__ = [
  'FAMILIES', 'Part', 'Path', 'Tensor', 'from_huggingface', 'param_shapes',
  'tensors', 'to_huggingface',
]  # fmt: skip

FAMILIES: dict[str, Any] = {
  name: module
  for module in (llama, gemma, phi, gpt2, mixtures)
  for name in module.ARCHITECTURES
}


def from_huggingface(block: Mapping[str, Any]) -> Config:
  """Read a config.json.

  Args:
    block: the parsed file, of old or new transformers.

  Returns:
    Config of float32 parameters and activations.

  Raises:
    ValueError: a model type or a feature that this decoder lacks, or a missing
      field; the message lists what works.
  """
  family = _family(block.get('model_type'))
  reading.supported(block, reading.SUPPORTED)
  return Config(**family.read(block) | heads.read(block))


def _family(name: Any) -> Any:
  if name not in FAMILIES:
    raise ValueError(
      f'model_type={name!r} is not supported; supported: {", ".join(FAMILIES)}'
    )
  return FAMILIES[name]


# What a config.json says beside the function that the model computes.
KEPT = ('bos_token_id', 'eos_token_id', 'pad_token_id', 'initializer_range',
        'router_aux_loss_coef', 'output_router_logits')  # fmt: skip


def to_huggingface(
  config: Config, source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """Write a config.json that old and new transformers read.

  Args:
    config: of the model.
    source: the config.json that it came from, whose token ids are kept;
      without it there are none, rather than those of the family's first model.

  Raises:
    ValueError: the family does not have these features.
  """
  family = _family(config.family)
  block = {
    'architectures': [
      heads.architecture(config, family.ARCHITECTURES[config.family])
    ],
    'model_type': config.family,
    **dict.fromkeys(KEPT[:3]),
    **{key: source[key] for key in KEPT if source and key in source},
    **family.write(config),
    **heads.write(config, source),
    'dtype': config.param_dtype,
    'torch_dtype': config.param_dtype,
  }
  own = ('dtype', 'param_dtype', 'remat', 'scan_layers', 'attention')
  again = dataclasses.replace(
    from_huggingface(block), **{name: getattr(config, name) for name in own}
  )
  lost = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(Config)
    if getattr(config, field.name) != getattr(again, field.name)
  }
  if lost:
    raise ValueError(
      f'the family {config.family!r} has no'
      f' {", ".join(f"{k}={v!r}" for k, v in lost.items())}: set'
      ' config.family to one that has, or leave it out'
    )
  return block


def tensors(config: Config) -> dict[str, Tensor]:
  """Each tensor of the Hugging Face files and its place, in writing order."""
  return _family(config.family).tensors(config) | heads.tensors(config)


def param_shapes(config: Config) -> dict[Path, tuple[int, ...]]:
  """Path of each parameter -> its shape, layers (and experts) stacked."""
  out: dict[Path, tuple[int, ...]] = {}
  sizes = (config.num_layers, config.num_experts)
  for tensor in tensors(config).values():
    for part in tensor.parts:
      out[part.path] = (*sizes[: len(part.index)], *part.param_shape)
  return out
