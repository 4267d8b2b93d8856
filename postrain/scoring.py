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


def read_states(
  model: Model,
  params: Any,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  packing: Packing | None = None,
  capture: tuple[str, ...] = (),
) -> tuple[Float[Array, 'B T D'], dict[str, Float[Array, 'L B T D']]]:
  """Hidden states after each token, and what else that one forward shows.

  ``out[:, t]`` has read ``tokens[:, t]``. Packed rows are scattered back, so
  that no caller ever meets a segment id.

  Args:
    model, params, tokens, valid, packing: as in `score`.
    capture: names of states of the layers, see `postrain.types.InternalsFn`.

  Raises:
    ValueError: the model shows no internals.
  """
  positions, ids = token_positions(valid), valid.astype(jnp.int32)
  if packing is not None:
    tokens = tokens.reshape(-1)[packing.source]
    positions, ids = packing.positions, packing.segment_ids
  captured = {}
  if not capture:
    hidden, _ = model.hidden(
      params, tokens, positions=positions, segment_ids=ids
    )
  elif model.internals is None:
    raise ValueError(
      f'capture={capture} of a model without internals: give it some, see'
      ' postrain.types.Model'
    )
  else:
    hidden, _, captured = model.internals(
      params, tokens, positions=positions, segment_ids=ids, capture=capture
    )
  if packing is None:
    return hidden, captured

  def unpacked(x: Array) -> Array:
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., packing.slot, :]

  return unpacked(hidden), jax.tree.map(unpacked, captured)


def aligned(
  states: Float[Array, '*l B T D'], mask: Bool[Array, 'B T']
) -> Float[Array, '*l B T D']:
  """From states after each token to those that predict it, 0 off the mask."""
  widths = [(0, 0)] * (states.ndim - 2) + [(1, 0), (0, 0)]
  states = jnp.pad(states[..., :-1, :], widths)  # the one shift
  return masked_states(states, mask)


def masked_states(
  states: Float[Array, '*l B T D'], mask: Bool[Array, 'B T']
) -> Float[Array, '*l B T D']:
  """Zeros off the mask: nothing there may poison a gradient."""
  lead = (1,) * (states.ndim - 3)
  return jnp.where(mask.reshape(*lead, *mask.shape, 1), states, 0)


def hidden_states(
  model: Model,
  params: Any,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  packing: Packing | None = None,
) -> Float[Array, 'B T D']:
  """Hidden states aligned with the tokens that they predict.

  ``out[:, t]`` predicts ``tokens[:, t]``; it is 0 off the mask.
  """
  hidden, _ = read_states(model, params, tokens, valid, packing)
  return aligned(hidden, mask)


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
