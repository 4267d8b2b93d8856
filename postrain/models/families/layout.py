"""Where the tensors of a checkpoint's files lie in the parameters."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from postrain.models.config import Config

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
  """A parameter, or one layer (and expert) of a stacked one, as a file has it.

  The file stores param[index].transpose(perm).reshape(shape): linear weights
  as [out, in], and heads are not an axis there.
  """

  path: Path
  index: tuple[int, ...]
  param_shape: tuple[int, ...]
  perm: tuple[int, ...]
  shape: tuple[int, ...]

  def gather(self, leaf: Any, out: np.ndarray) -> None:
    """Copy its values from a parameter, shard by shard.

    Indexing the whole array may sum over devices, which makes 0 of -0.
    """
    if not isinstance(leaf, jax.Array):
      out[...] = leaf[self.index]
      return
    for shard in leaf.addressable_shards:
      bounds = [
        s.indices(n) for s, n in zip(shard.index, leaf.shape, strict=True)
      ]
      pairs = list(zip(self.index, bounds, strict=False))
      if not shard.replica_id and all(b[0] <= i < b[1] for i, b in pairs):
        local = tuple(i - b[0] for i, b in pairs)
        values = shard.data[local] if local else shard.data
        out[shard.index[len(pairs) :]] = values

  def restored(self, value: np.ndarray) -> np.ndarray:
    """The parameter as a view of what a file has of it."""
    permuted = [self.param_shape[axis] for axis in self.perm]
    return value.reshape(permuted).transpose(np.argsort(self.perm))


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file: its parts side by side along an axis."""

  parts: tuple[Part, ...]
  axis: int = 0

  @property
  def shape(self) -> tuple[int, ...]:
    """In the file."""
    shape = list(self.parts[0].shape)
    shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
    return tuple(shape)

  def stored(self, leaves: Mapping[Path, Any]) -> np.ndarray:
    """The tensor of a file; of parameters in shards no more is gathered."""
    out = np.empty(self.shape, leaves[self.parts[0].path].dtype)
    for part, where in self.slices():
      part.gather(leaves[part.path], part.restored(out[where]))
    return out

  def slices(self) -> list[tuple[Part, tuple[slice, ...]]]:
    """Each part and where the file has it."""
    out, start = [], 0
    for part in self.parts:
      stop = start + part.shape[self.axis]
      out.append((part, (*[slice(None)] * self.axis, slice(start, stop))))
      start = stop
    return out


def plain(*path: str, shape: tuple[int, ...]) -> Tensor:
  """A parameter outside the layers that the file has as it is."""
  perm = tuple(range(len(shape)))
  return Tensor((Part(path, (), shape, perm, shape),))


class Names:
  """Collects the tensors of one layer: suffix in the file -> tensor.

  Each method names a tensor of the file, a parameter and its sizes.
  """

  def __init__(self, config: Config, layer: int):
    self.config = config
    self.layer = layer
    self.tensors: dict[str, Tensor] = {}

  def part(
    self, param: str, shape: tuple[int, ...], perm: tuple[int, ...],
    stored: tuple[int, ...], *expert: int,
  ) -> Part:  # fmt: skip
    """A part of this layer."""
    index = (self.layer, *expert)
    return Part(('layers', param), index, shape, perm, stored)

  def vector(self, name: str, param: str, *shape: int) -> None:
    """A norm or a bias."""
    perm = tuple(range(len(shape)))
    part = self.part(param, shape, perm, (math.prod(shape),))
    self.tensors[name] = Tensor((part,))

  def linear(
    self, name: str, param: str, inputs: int, outputs: int, *expert: int
  ) -> None:
    """A matrix, stored [out, in]."""
    self.tensors[name] = Tensor((self.matrix(param, inputs, outputs, *expert),))

  def matrix(self, param: str, inputs: int, outputs: int, *expert: int) -> Part:
    """The part of a matrix, stored [out, in]."""
    shape = (inputs, outputs)
    return self.part(param, shape, (1, 0), shape[::-1], *expert)

  def head_matrix(self, param: str, num: int) -> Part:
    """The part of a projection to heads, stored [heads x head_dim, in]."""
    c = self.config
    shape = (c.model_dim, num, c.head_dim)
    return self.part(param, shape, (1, 2, 0), (num * c.head_dim, c.model_dim))

  def output(self, name: str) -> None:
    """The projection after attention, stored [out, heads x head_dim]."""
    c = self.config
    shape = (c.num_heads, c.head_dim, c.model_dim)
    flat = (c.model_dim, c.num_heads * c.head_dim)
    self.tensors[name] = Tensor((self.part('output', shape, (2, 0, 1), flat),))

  def projections(self) -> list[tuple[str, str, int]]:
    """Letter, parameter and number of heads of query, key and value."""
    c = self.config
    return [
      ('q', 'query', c.num_heads),
      ('k', 'key', c.num_kv_heads),
      ('v', 'value', c.num_kv_heads),
    ]
