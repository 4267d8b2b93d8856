"""What a row of the benchmark consists of, and the operations of formulas.

A formula is written once, over a record of operations: with PyTorch's it is
what a trainer runs, with those of jax.numpy the naive version in JAX.
"""

from collections.abc import Callable
import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

try:
  import torch
except ImportError:
  torch: Any = None

Formula = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Row:
  """A loss, its inputs by name, and the formula that others have for it."""

  inputs: str
  formula: Formula
  origin: str = 'textbook'  # the trainer whose formula it is, and its name
  gradients: int = 1  # how many of the first inputs have one
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


def jax_operations() -> SimpleNamespace:
  return SimpleNamespace(
    abs=jnp.abs,
    bce=lambda s, c: (
      jnp.maximum(s, 0) - s * c + jnp.log1p(jnp.exp(-jnp.abs(s)))
    ),
    clip=jnp.clip,
    detach=jax.lax.stop_gradient,
    exp=jnp.exp,
    kl_div=lambda log_q, log_p: jnp.exp(log_p) * (log_p - log_q),
    log1p=jnp.log1p,
    log_sigmoid=jax.nn.log_sigmoid,
    log_softmax=jax.nn.log_softmax,
    logaddexp=jnp.logaddexp,
    logsumexp=lambda v: jax.nn.logsumexp(v, axis=-1),
    maximum=jnp.maximum,
    minimum=jnp.minimum,
    relu=jax.nn.relu,
    sigmoid=jax.nn.sigmoid,
    sign=jnp.sign,
    softplus=jax.nn.softplus,
    sort=jnp.sort,
    where=jnp.where,
  )


def torch_operations() -> SimpleNamespace:
  F = torch.nn.functional
  return SimpleNamespace(
    abs=torch.abs,
    bce=lambda s, c: F.binary_cross_entropy_with_logits(s, c, reduction='none'),
    clip=torch.clamp,
    detach=torch.Tensor.detach,
    exp=torch.exp,
    kl_div=lambda log_q, log_p: F.kl_div(
      log_q, log_p, reduction='none', log_target=True
    ),
    log1p=torch.log1p,
    log_sigmoid=F.logsigmoid,
    log_softmax=lambda v: F.log_softmax(v, dim=-1),
    logaddexp=torch.logaddexp,
    logsumexp=lambda v: torch.logsumexp(v, dim=-1),
    maximum=torch.maximum,
    minimum=torch.minimum,
    relu=torch.relu,
    sigmoid=torch.sigmoid,
    sign=torch.sign,
    softplus=F.softplus,
    sort=lambda v: torch.sort(v, stable=True).values,
    where=torch.where,
  )
