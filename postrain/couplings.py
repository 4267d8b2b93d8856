"""What a loss takes from the whole minibatch: a pass before it is cut.

A mask by covariance, the reference point of KTO or the load of experts is a
statistic of the minibatch and of the current parameters. They score all of it
once, without a gradient; the result stands in the batch as an array, and
micro-batches, padding and devices change nothing.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from postrain.aggregation import token_mean
from postrain.batches import call_by_name, check_packing, together
from postrain.losses import expert_shares, kto_reference_point
from postrain.scoring import in_slices, routed_states, score
from postrain.types import Batch, Model, Params, Scalar


def with_selection(
  model: Model,
  params: Params,
  batch: Batch,
  *,
  selection: Callable[..., Array],
  key: Key[Array, ''] | None = None,
  temperature: Scalar = 1.0,
  chunk_size: int = 128,
  num_slices: int = 1,
) -> Batch:
  """Add ``selected`` [B T]: the tokens that a mask chooses of all of them.

  Args:
    model: of the policy.
    params: its current parameters.
    batch: a whole minibatch, see `postrain.batches.assemble`.
    selection: of `postrain.masks`; it may ask for ``logprobs`` and ``entropy``
      of the current policy, the ``key``, and whatever the batch holds. Its
      ``mask`` are the trained tokens.
    key: of masks that draw, another for each update.
    temperature: at which the policy was sampled.
    chunk_size: time positions whose logits exist at once.
    num_slices: slices that are scored one after the other.
  """
  scores = score(
    model, params, batch.tokens, batch.valid, batch.mask,
    temperature=temperature, chunk_size=chunk_size, num_slices=num_slices,
    packing=batch.packing, experts=batch.arrays.get('experts'),
  )  # fmt: skip
  arrays: dict[str, Any] = {
    **batch.arrays,
    'mask': batch.arrays['trained'],
    'logprobs': scores.logprobs,
    'entropy': scores.entropy,
    'key': key,
  }
  return with_array(batch, 'selected', call_by_name(selection, arrays))


def with_reference_point(
  model: Model,
  params: Params,
  batch: Batch,
  other: Batch,
  *,
  chunk_size: int = 128,
  num_slices: int = 1,
) -> Batch:
  """Add ``reference_point`` [B] of KTO, the same for every row.

  Args:
    model: of the policy.
    params: its current parameters.
    batch: a whole minibatch of single completions.
    other: its prompts with completions of others, see
      `postrain.batches.mismatched`; its arrays hold their ``ref_logprobs``.
    chunk_size: time positions whose logits exist at once.
    num_slices: slices that are scored one after the other.

  Raises:
    ValueError: a minibatch of one, which has no completions of others.
  """
  scores = score(
    model, params, other.tokens, other.valid, other.mask,
    chunk_size=chunk_size, num_slices=num_slices, packing=other.packing,
  )  # fmt: skip
  ref_logprobs = jnp.where(other.mask, other.arrays['ref_logprobs'], 0)
  point = kto_reference_point(
    scores.logprobs.sum(-1), ref_logprobs.sum(-1), other.mask.any(-1)
  )
  return with_array(
    batch, 'reference_point', jnp.full(len(batch.mask), point, point.dtype)
  )


def with_expert_shares(
  model: Model, params: Params, batch: Batch, *, num_slices: int = 1
) -> Batch:
  """Add ``expert_shares`` [B L E], the load of all real tokens.

  The same for every row. With them the loss of balance is that of the whole
  minibatch, and not of each sequence.

  Args:
    model: a mixture of experts.
    params: its current parameters.
    batch: a whole minibatch; ``experts`` that it holds are replayed.
    num_slices: slices that run one after the other.
  """
  check_packing(batch.packing, num_slices, 1)

  def shares_of_rows(piece: tuple) -> Array:
    tokens, valid, packing, experts = piece
    _, routing = routed_states(
      model, params, tokens, valid, valid, packing, experts=experts, record=True
    )
    of_layers = jax.vmap(_shares(model.num_experts), in_axes=(1, None))
    return jax.vmap(of_layers)(routing['experts'], valid)

  arrays = batch.tokens, batch.valid, batch.packing, batch.arrays.get('experts')
  unit = together(batch.packing)
  rows = in_slices(shares_of_rows, arrays, num_slices, unit)
  weights = token_mean(batch.valid).sum(-1)
  shares = jnp.einsum('b,ble->le', weights, rows)
  return with_array(
    batch, 'expert_shares', jnp.broadcast_to(shares, rows.shape)
  )


def _shares(num_experts: int) -> Callable[[Array, Array], Array]:
  """Shares of one layer [E] of one row's experts [T K]."""
  return lambda experts, valid: expert_shares(
    experts[None], valid[None], num_experts=num_experts
  )


def with_array(batch: Batch, name: str, values: Array) -> Batch:
  """Add an array, or replace it."""
  return dataclasses.replace(batch, arrays={**batch.arrays, name: values})
