"""Log-probs of given tokens under any parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain.batches import check_packing, cut, join
from postrain.logprobs import map_time_chunks, token_entropy, token_logprobs
from postrain.types import Model, Packing, Scalar


class Scores(NamedTuple):
  """Per-token figures, 0 off the mask.

  ``logprobs`` and ``entropy`` are at the given temperature,
  ``model_logprobs`` at temperature 1, comparable with the sampler's.
  """

  logprobs: Float[Array, 'B T']
  entropy: Float[Array, 'B T']
  model_logprobs: Float[Array, 'B T']


def token_positions(valid: Bool[Array, 'B T']) -> Int[Array, 'B T']:
  """Count real tokens from 0, so that left padding moves nothing."""
  return jnp.maximum(jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)


def hidden_states(
  model: Model,
  params: Any,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  packing: Packing | None = None,
) -> Float[Array, 'B T D']:
  """Hidden states aligned with the tokens that they predict.

  ``out[:, t]`` predicts ``tokens[:, t]``; it is 0 off the mask, so that
  nothing there can poison the gradient of the unembedding. Packed rows are
  scattered back, so that no caller ever meets a segment id.
  """
  if packing is None:
    hidden, _ = model.hidden(
      params,
      tokens,
      positions=token_positions(valid),
      segment_ids=valid.astype(jnp.int32),
    )
  else:
    rows, _ = model.hidden(
      params,
      tokens.reshape(-1)[packing.source],
      positions=packing.positions,
      segment_ids=packing.segment_ids,
    )
    hidden = rows.reshape(-1, rows.shape[-1])[packing.slot]
  hidden = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))  # the one shift
  return jnp.where(mask[..., None], hidden, 0)


def map_logits(
  fn: Callable[..., Any],
  model: Model,
  params: Any,
  hidden: Float[Array, 'B T D'],
  *arrays: Array,
  chunk_size: int,
) -> Any:
  """Map a per-token function of logits over chunks of time."""
  return map_time_chunks(
    fn,
    lambda h: model.unembed(params, h),
    hidden,
    *arrays,
    chunk_size=chunk_size,
  )


def score(
  model: Model,
  params: Any,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  temperature: Scalar = 1.0,
  chunk_size: int = 128,
  num_slices: int = 1,
  packing: Packing | None = None,
) -> Scores:
  """Score tokens: log-prob and entropy of each position under the mask.

  Args:
    model: see `postrain.types.Model`.
    params: its parameters.
    tokens: prompt and completion.
    valid: True on real tokens.
    mask: True where figures are wanted.
    temperature: divides the logits.
    chunk_size: time positions whose logits exist at once.
    num_slices: slices of the batch that run one after the other; it must
      divide B.
    packing: layout made for the same ``num_slices`` and units of one row.

  Raises:
    ValueError: the packing was made for other slices.
  """
  check_packing(packing, num_slices, 1)

  def score_slice(piece: tuple) -> Scores:
    tokens, valid, mask, packing = piece
    hidden = hidden_states(model, params, tokens, valid, mask, packing)

    def figures(logits: Array, tokens: Array) -> Scores:
      plain = token_logprobs(logits, tokens)
      same = isinstance(temperature, int | float) and temperature == 1
      return Scores(
        plain if same else token_logprobs(
          logits, tokens, temperature=temperature
        ),
        token_entropy(logits, temperature=temperature),
        plain,
      )  # fmt: skip

    scores = map_logits(
      figures, model, params, hidden, tokens, chunk_size=chunk_size
    )
    return jax.tree.map(lambda x: jnp.where(mask, x, 0), scores)

  return in_slices(score_slice, (tokens, valid, mask, packing), num_slices)


def in_slices(fn: Callable[[Any], Any], tree: Any, num_slices: int) -> Any:
  """Map over strided slices of the leading axis, one after the other."""
  if num_slices == 1:
    return fn(tree)
  leaves, structure = jax.tree.flatten(tree)
  return join(
    jax.lax.map(
      lambda piece: fn(jax.tree.unflatten(structure, piece)),
      cut(leaves, num_slices),
    )
  )
