"""Frozen bases in few bits, by Qwix."""

import dataclasses
import functools
import importlib
import math
from typing import Any, Literal

from flax import traverse_util
import jax

from postrain.models.lora import Stored
from postrain.types import Model, Params, Path

BLOCK = 64  # weights that share a scale, as in QLoRA


def quantized(model: Model, qtype: Literal['int8', 'nf4']) -> Model:
  """Store the kernels of a model in 8 or 4 bits; they are no longer trained.

  Blocks of 64 weights along the inputs share a scale. Each product restores
  its kernel, in the backward pass again, so that one layer of it exists at a
  time. Norms, biases, embeddings and experts stay as they are.

  The scales are not quantised a second time, as in the paper.

  Args:
    model: with ``kernels``.
    qtype: 'int8', or 'nf4', whose levels are the quantiles of a normal.

  Returns:
    Model whose ``init`` stores its kernels so; `stored` does with others.

  Raises:
    ValueError: the model lists no kernels, or Qwix is not installed.

  References:
    Dettmers et al., 2023, QLoRA: Efficient Finetuning of Quantized LLMs,
    arXiv:2305.14314.
  """
  _qwix()
  if model.kernels is None:
    raise ValueError(
      'this model lists no kernels that could be quantised: quantise a decoder'
      ' of postrain.models.transformer, before it is adapted'
    )

  def logical_axes() -> Params:
    axes = traverse_util.flatten_dict((model.logical_axes or dict)())
    shapes = traverse_util.flatten_dict(
      jax.eval_shape(lambda: init(jax.random.key(0)))
    )
    # Values and scales have the same axes: blocks are cut as weights are.
    return traverse_util.unflatten_dict({
      path: jax.tree.map(lambda _, path=path: axes[path], shapes[path])
      for path in axes
    })  # fmt: skip

  def init(key: Any) -> Params:
    return stored(model, model.init(key), qtype)

  return dataclasses.replace(
    model,
    init=init,
    logical_axes=logical_axes if model.logical_axes else None,
  )


def stored(
  model: Model, params: Params, qtype: Literal['int8', 'nf4']
) -> Params:
  """Parameters of a model with its kernels quantised."""
  qwix = _qwix()
  kernels: dict[Path, Any] = (model.kernels or dict)()

  def store(path: Any, leaf: Any) -> Any:
    if path not in kernels:
      return leaf
    last = sum(kernels[path]) - 1  # of the inputs
    block = math.gcd(BLOCK, leaf.shape[last])
    with jax.numpy_dtype_promotion('standard'):
      array = qwix.quantize(
        leaf, qtype, tiled_axes={last: block},
        channelwise_axes=[i for i in range(leaf.ndim) if i != last],
      )  # fmt: skip
    return Stored(array, qwix.dequantize)

  return traverse_util.path_aware_map(store, params)


@functools.cache
def _qwix() -> Any:
  try:
    return importlib.import_module('qwix')
  except ModuleNotFoundError as error:
    raise ValueError(
      f"{error.name} is not installed: pip install 'postrain[quantization]'"
    ) from error
