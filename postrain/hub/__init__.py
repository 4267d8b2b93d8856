"""Hugging Face directories in and out: config.json, safetensors, tokenizer."""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

from postrain.hub.directory import INDEX, SINGLE, Directory, open
from postrain.hub.placing import read
from postrain.hub.writing import save
from postrain.models.transformer import Config, transformer
from postrain.types import Model, Params

__all__ = [
  'INDEX', 'SINGLE', 'Directory', 'Pretrained', 'load', 'open', 'read', 'save',
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A loaded directory.

  Attributes:
    config: of the model.
    model: its functions.
    params: NumPy arrays on the host, or arrays in their shards.
    source: its config.json.
    generation_config: its generation_config.json, None where it has none.
  """

  config: Config
  model: Model
  params: Params
  source: Mapping[str, Any]
  generation_config: Mapping[str, Any] | None = None


def load(
  directory: str | os.PathLike[str],
  *,
  dtype: str = 'float32',
  head: str = 'language_model',
  shardings: Any | Callable[[Model], Any] = None,
) -> Pretrained:
  """Load a directory of a known family; nothing is fetched or executed.

  All that the headers of its files tell is checked before a weight is read;
  then the weights go block by block to where they belong. For another precision
  of activations or rematerialisation:
  ``transformer(dataclasses.replace(loaded.config, remat=...))``.

  Args:
    directory: with config.json and safetensors, sharded or not.
    dtype: of parameters and activations; files may be of another.
    head: what the model must end in, see `Config`; a reward model is no policy.
    shardings: of the parameters, one for all or a tree, or a function of the
      model, such as ``partial(sharding.param_shardings, mesh)``, that gives
      them; None keeps the parameters on the host, as NumPy arrays.

  Raises:
    ValueError: see `open` and `read`.
  """
  opened = open(directory, dtype=dtype, head=head)
  model = transformer(opened.config)
  if callable(shardings):
    shardings = shardings(model)
  return Pretrained(
    opened.config, model, read(opened, shardings), opened.source,
    opened.generation_config,
  )  # fmt: skip
