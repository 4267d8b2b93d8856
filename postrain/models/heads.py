"""Heads on a language model's hidden states."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from postrain.models.norms import widened
from postrain.types import Cache, Model, Params


def scalar_head(model: Model) -> Model:
  """Replace the unembedding by one number a position: a value or a reward.

  unembed(hidden) = hidden · w, with w = 0 at first: values start at 0, and the
  loss of a pairwise reward model at log 2. The head computes in at least
  float32.

  Args:
    model: the backbone. Start from trained parameters with
      ``{**head_params, 'backbone': trained}``.

  Returns:
    Model with parameters ``{'backbone': ..., 'head': [D, 1]}``.
  """

  def init(key: Key[Array, '']) -> Params:
    backbone = model.init(key)
    blank = jnp.zeros((1, 1), jnp.int32)
    states, _ = jax.eval_shape(
      lambda params: model.hidden(
        params, blank, positions=blank, segment_ids=blank + 1
      ),
      backbone,
    )
    dtype = widened(states.dtype)
    return {
      'backbone': backbone,
      'head': jnp.zeros((states.shape[-1], 1), dtype),
    }

  def hidden(
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None]:
    return model.hidden(
      params['backbone'],
      tokens,
      positions=positions,
      segment_ids=segment_ids,
      cache=cache,
    )

  def of_backbone(fn: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The same function, of the parameters with a head."""
    if fn is None:
      return None
    return lambda params, *args, **how: fn(params['backbone'], *args, **how)

  def unembed(params: Params, hidden: Array) -> Array:
    head = params['head']
    dtype = widened(hidden.dtype)
    return jnp.einsum('...d,do->...o', hidden.astype(dtype), head.astype(dtype))

  def logical_axes() -> Params:
    return {
      'backbone': model.logical_axes() if model.logical_axes else None,
      'head': ('width', None),
    }

  return dataclasses.replace(
    model,
    init=init,
    hidden=hidden,
    unembed=unembed,
    logical_axes=logical_axes if model.logical_axes else None,
    internals=of_backbone(model.internals),
    normalize=of_backbone(model.normalize),
    kernels=None,  # adapt the backbone before it gets a head
  )
