"""Low-rank adapters on a frozen model."""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any, NamedTuple
import zlib

from flax import traverse_util
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from postrain.adapted import Adapted
from postrain.models.norms import widened
from postrain.types import Model, Params, Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """W + scale A B in place of W, for some matrices; there is no dropout.

  Attributes:
    rank: inner axis of A B.
    alpha: scale = alpha / rank.
    targets: regular expression for whole paths, 'layers/(query|value)'.
    rank_stabilized: scale = alpha / sqrt(rank) instead.

  References:
    Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models,
    arXiv:2106.09685. Kalajdzievski, 2023, A Rank Stabilization Scaling Factor
    for Fine-Tuning with LoRA, arXiv:2312.03732.
  """

  rank: int
  alpha: int | float
  targets: str
  rank_stabilized: bool = False

  def __post_init__(self) -> None:
    """Refuse what no adapter can be made of.

    Raises:
      ValueError: names the field, its value and what would do.
    """
    if self.rank < 1:
      raise ValueError(f'rank={self.rank}: it must be at least 1')
    if not self.alpha > 0:
      raise ValueError(f'alpha={self.alpha}: it must be positive')
    try:
      re.compile(self.targets)
    except re.error as error:
      raise ValueError(
        f'targets={self.targets!r} is no regular expression: {error}'
      ) from error

  @property
  def scale(self) -> float:
    """What multiplies A B."""
    return self.alpha / self.rank ** (0.5 if self.rank_stabilized else 1)


@flax.struct.dataclass
class Stored:
  """A frozen kernel in another form, of fewer bits: kernel = restore(form)."""

  form: Any
  restore: Callable[[Any], Array] = flax.struct.field(pytree_node=False)

  shape = property(lambda self: self.form.shape)
  ndim = property(lambda self: self.form.ndim)
  dtype = property(lambda self: self.form.dtype)


class LowRank(NamedTuple):
  """A kernel and what is added to it, in the place of the kernel.

  The kernel has stacked, input and output axes; ``a`` has the stacked and the
  input ones and the rank, ``b`` the stacked ones, the rank and the output ones.
  """

  kernel: Any
  a: Any
  b: Any


def lora(model: Model, adapters: LoRA) -> Model:
  """Adapt a model: A is drawn, B is 0, and the base is as its own ``init``.

  Where the model lists its ``kernels`` (our decoder: the matrices of its
  layers, not experts, routers and embeddings), x W + (x A) B is computed, and
  no gradient of the size of W ever exists. Of any other model each matrix may
  be a target, as [in, out], and W + A B is made for every call.

  Args:
    model: the base.
    adapters: which matrices, and how.

  Returns:
    Model with parameters `postrain.adapted.Adapted`, whose adapters are a tree
    like the base with {'a', 'b'}, in at least float32, for each target.

  Raises:
    ValueError: the targets match nothing, or what cannot be adapted.
  """
  shapes = traverse_util.flatten_dict(model.shapes)
  chosen = _chosen(model, adapters.targets, shapes)

  def init(key: Key[Array, '']) -> Params:
    drawn = {
      path: _draw(key, path, shapes[path], axes, adapters.rank)
      for path, axes in chosen.items()
    }
    return Adapted(model.init(key), traverse_util.unflatten_dict(drawn))

  def logical_axes() -> Params:
    axes: Any = model.logical_axes and model.logical_axes()
    flat: dict[Path, Any] = traverse_util.flatten_dict(axes)
    drawn = {
      # All arrays of a stored kernel have its axes.
      path: _axes(jax.tree.leaves(flat[path], is_leaf=_is_tuple)[0], *numbers)
      for path, numbers in chosen.items()
    }
    return Adapted(axes, traverse_util.unflatten_dict(drawn))

  def adapted(fn: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The same function, of the adapted parameters; served ones are whole."""
    put = merged if model.kernels is None else _beside

    def whole(params: Params) -> Params:
      return put(params, adapters) if isinstance(params, Adapted) else params

    if fn is None:
      return None
    return lambda params, *args, **how: fn(whole(params), *args, **how)

  return dataclasses.replace(
    model,
    init=init,
    hidden=adapted(model.hidden),
    unembed=adapted(model.unembed),
    logical_axes=logical_axes if model.logical_axes else None,
    internals=adapted(model.internals),
    serving=adapted(model.serving),
    normalize=adapted(model.normalize),
    packed=model.packed and lora(model.packed, adapters),
    kernels=None,
  )


def merged(params: Adapted, adapters: LoRA) -> Params:
  """Parameters of the base model that compute what the adapted ones do."""

  def add(low: LowRank) -> Array:
    num_stacked = low.a.ndim + low.b.ndim - 2 - low.kernel.ndim
    stacked, rank = low.a.shape[:num_stacked], low.a.shape[-1]
    change = jnp.matmul(
      low.a.reshape(*stacked, -1, rank), low.b.reshape(*stacked, rank, -1),
      precision='highest',
    ).reshape(low.kernel.shape)  # fmt: skip
    kernel = restored(low.kernel)
    return (kernel.astype(change.dtype) + change).astype(kernel.dtype)

  def restored(kernel: Any) -> Array:
    if isinstance(kernel, Stored):
      return kernel.restore(kernel.form)
    return jnp.asarray(kernel)

  return jax.tree.map(
    lambda node: add(node) if isinstance(node, LowRank) else restored(node),
    _beside(params, adapters),
    is_leaf=lambda node: isinstance(node, LowRank | Stored),
  )


def _beside(params: Adapted, adapters: LoRA) -> Params:
  """The base with a `LowRank` in the place of each adapted kernel."""
  flat = dict(traverse_util.flatten_dict(params.base))
  parts: dict[Path, Any] = traverse_util.flatten_dict(params.adapters)
  for *path, part in parts:
    if part == 'a':
      a, b = parts[*path, 'a'], adapters.scale * parts[*path, 'b']
      flat[*path,] = LowRank(flat[*path,], a, b)
  return traverse_util.unflatten_dict(flat)


def _chosen(
  model: Model, targets: str, shapes: Mapping[Path, Any]
) -> dict[Path, tuple[int, int]]:
  """Path of each target -> its numbers of stacked and of input axes."""
  kernels = (
    {path: (0, 1) for path, leaf in shapes.items() if len(leaf.shape) == 2}
    if model.kernels is None
    else model.kernels()
  )
  found = [p for p in shapes if re.fullmatch(targets, '/'.join(p))]
  wrong = ['/'.join(path) for path in found if path not in kernels]
  if wrong or not found:
    problem = f'has {", ".join(wrong)}' if wrong else 'matches nothing'
    raise ValueError(
      f'targets={targets!r} {problem}: of this model the whole paths that can'
      f' be adapted are {", ".join("/".join(path) for path in kernels)}'
    )
  return {path: kernels[path] for path in found}


def _draw(
  key: Key[Array, ''], path: Path, kernel: Any, axes: tuple[int, int], rank: int
) -> dict[str, Array]:
  """A uniform within 1 / sqrt(inputs), as the authors' code has it; B zero."""
  shape, start, end = kernel.shape, axes[0], sum(axes)
  dtype = widened(kernel.dtype)
  # By path, so that other targets draw the same.
  key = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
  bound = math.prod(shape[start:end]) ** -0.5
  return {
    'a': jax.random.uniform(key, (*shape[:end], rank), dtype, -bound, bound),
    'b': jnp.zeros((*shape[:start], rank, *shape[end:]), dtype),
  }


def _axes(
  kernel: tuple[str | None, ...], num_stacked: int, num_inputs: int
) -> dict[str, tuple[str | None, ...]]:
  """Logical axes of A and B; the rank is never cut."""
  end = num_stacked + num_inputs
  return {
    'a': (*kernel[:end], None),
    'b': (*kernel[:num_stacked], None, *kernel[end:]),
  }


def _is_tuple(node: Any) -> bool:
  return isinstance(node, tuple)
