"""Policies and probes of the layers inside a model, from one forward.

``L`` layers count from 0. A state of the residual stream after layer l gives
the policy softmax(H_l W_U), what attention or the MLP added to it one of its
own. The last layer's stream is read through the final norm, as the model does.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain.batches import check_packing
from postrain.dtypes import promoted
from postrain.logprobs import token_entropy, token_logprobs
from postrain.scoring import (
  aligned,
  in_slices,
  map_logits,
  masked_states,
  read_states,
)
from postrain.types import Cache, Model, Packing, Params, Scalar

__all__ = [
  'LayerScores',
  'Probe',
  'entropy_flow',
  'layer_policy',
  'layer_scores',
  'layer_states',
  'linear_probe',
  'probe_accuracy',
]

STATES = ('residual', 'attention', 'mlp')


class LayerScores(NamedTuple):
  """Figures of each layer's policy at each token, 0 off the mask."""

  logprobs: Float[Array, 'L B T']
  entropy: Float[Array, 'L B T']


def layer_states(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  capture: tuple[str, ...] = ('residual',),
  packing: Packing | None = None,
) -> dict[str, Float[Array, 'L B T D']]:
  """States of all layers after each token under the mask, 0 elsewhere.

  Args:
    model, params, tokens, valid, packing: as in `postrain.scoring.score`.
    mask: True where states are wanted.
    capture: of 'residual' (the stream after a layer), 'attention' and 'mlp'
      (what they added to it).

  Raises:
    ValueError: another name, or a model that shows no internals.
  """
  _check_capture(capture)
  _, captured = read_states(model, params, tokens, valid, packing, capture)
  return {k: masked_states(v, mask) for k, v in captured.items()}


def _check_capture(capture: tuple[str, ...]) -> None:
  if not capture or set(capture) - set(STATES):
    raise ValueError(f'capture={capture}: name some of {", ".join(STATES)}')


def _read_final(
  model: Model, params: Params, stream: Array, hidden: Array, norm: bool
) -> Array:
  """The stream as it is unembedded; its last layer is the model's own."""
  return jnp.concatenate(
    [_normalized(model, params, stream[:-1], norm), hidden[None]]
  )


def _normalized(
  model: Model, params: Params, states: Array, norm: bool
) -> Array:
  if not norm:
    return states
  if model.normalize is None:
    raise ValueError(
      'apply_final_norm=True of a model without normalize: give it one, see'
      ' postrain.types.Model, or leave the norm out'
    )
  return model.normalize(params, states)


def layer_scores(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  capture: tuple[str, ...] = ('residual',),
  layers: Sequence[int] | None = None,
  apply_final_norm: bool = False,
  temperature: Scalar = 1.0,
  chunk_size: int = 128,
  num_slices: int = 1,
  packing: Packing | None = None,
) -> dict[str, LayerScores]:
  """Score tokens under the policies of layers and of their modules.

      π_l = softmax(W_U H_l)

  'residual' of the last layer is the model's policy.

  Args:
    model, params, tokens, valid, chunk_size, num_slices, packing: as in
      `postrain.scoring.score`.
    mask: True where figures are wanted.
    capture: see `layer_states`.
    layers: numbers of layers, in the order that is wanted; None for all.
    apply_final_norm: normalise states of inner layers and of modules too (the
      logit lens); the paper's authors do not.
    temperature: divides the logits.

  Returns:
    Name -> figures.

  Raises:
    ValueError: an unknown name or layer, or a model that lacks what is asked.

  References:
    Tan et al., 2025, Bottom-up Policy Optimization: Your Language Model Policy
    Secretly Contains Internal Policies, arXiv:2512.19673.
  """
  _check_capture(capture)
  check_packing(packing, num_slices, 1)

  def of_slice(piece: tuple) -> dict[str, LayerScores]:
    tokens, valid, mask, packing = piece
    hidden, states = read_states(model, params, tokens, valid, packing, capture)

    def readable(name: str) -> Array:
      if name == 'residual':
        out = _read_final(model, params, states[name], hidden, apply_final_norm)
      else:
        out = _normalized(model, params, states[name], apply_final_norm)
      return out if layers is None else out[_numbers(layers, len(out))]

    def figures(logits: Array, tokens: Array) -> LayerScores:
      return LayerScores(
        token_logprobs(logits, tokens, temperature=temperature),
        token_entropy(logits, temperature=temperature),
      )

    def of_layer(states: Array) -> LayerScores:
      found = map_logits(
        figures, model, params, states, tokens, chunk_size=chunk_size
      )
      return jax.tree.map(lambda x: jnp.where(mask, x, 0), found)

    return {
      name: _rows_first(jax.lax.map(of_layer, aligned(readable(name), mask)))
      for name in capture
    }

  found = in_slices(of_slice, (tokens, valid, mask, packing), num_slices)
  return {k: LayerScores(*_rows_first(v)) for k, v in found.items()}


def _rows_first(tree: Any) -> Any:
  """Swap layers and rows: slices are of rows."""
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)


def _numbers(layers: Sequence[int], num_layers: int) -> Int[Array, ' K']:
  if wrong := [n for n in layers if not 0 <= n < num_layers]:
    raise ValueError(f'layers {wrong} of {num_layers}: count from 0')
  return jnp.asarray(layers, jnp.int32)


def entropy_flow(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  apply_final_norm: bool = False,
  chunk_size: int = 128,
  packing: Packing | None = None,
) -> dict[str, Float[Array, 'L B T']]:
  """The entropy of what a layer or a module gives, less that of what it reads.

      ΔH = H(softmax(W_U output)) − H(softmax(W_U input))

  A layer reads and gives the residual stream: its changes sum to the entropy of
  the model's policy less that of the embedding's. Attention and MLP read the
  stream through their norm, and give what they add to it.

  Args:
    model, params, tokens, valid, chunk_size, packing: as in `layer_scores`.
    mask: True where figures are wanted.
    apply_final_norm: see `layer_scores`.

  Returns:
    'layer', 'attention' and 'mlp', 0 off the mask.

  Raises:
    ValueError: the model does not show its states and what its modules read.

  References:
    Tan et al., 2025, Bottom-up Policy Optimization, arXiv:2512.19673, and its
    authors' plots, whose last layer is without the final norm.
  """
  names = (*STATES, 'attention_input', 'mlp_input')
  hidden, states = read_states(model, params, tokens, valid, packing, names)
  stream, attention, mlp, *read = (states[name] for name in names)
  embedded = stream[0] - mlp[0] - attention[0]
  others = jnp.concatenate([embedded[None], attention, mlp, *read])
  others = _normalized(model, params, others, apply_final_norm)
  stream = _read_final(model, params, stream, hidden, apply_final_norm)

  def entropy(states: Array) -> Array:
    found = map_logits(
      token_entropy, model, params, states, chunk_size=chunk_size
    )
    return jnp.where(mask, found, 0)

  found = jax.lax.map(entropy, aligned(jnp.concatenate([others, stream]), mask))
  embedded, parts = found[:1], found[1:].reshape(5, -1, *mask.shape)
  attention, mlp, attention_input, mlp_input, stream = parts
  return {
    'layer': jnp.diff(jnp.concatenate([embedded, stream]), axis=0),
    'attention': attention - attention_input,
    'mlp': mlp - mlp_input,
  }


def layer_policy(
  model: Model, layer: int, *, apply_final_norm: bool = False
) -> Model:
  """The policy of a layer as a model, to score, to sample or to train.

  Its gradient reaches the layers up to this one, the embedding and the
  unembedding, and is exactly 0 beyond. The samples of bottom-up policy
  optimization come from the whole model, so that its ratio of layer policies
  weighs likelihood and corrects nothing.

  Args:
    model: shows its 'residual'.
    layer: from 0; the last one is the model itself.
    apply_final_norm: see `layer_scores`.

  Raises:
    ValueError: the model shows no internals; when it is called, no such layer.

  References:
    Tan et al., 2025, Bottom-up Policy Optimization, arXiv:2512.19673.
  """
  internals = model.internals
  if internals is None:
    raise ValueError(
      f'layer={layer} of a model without internals: give it some, see'
      ' postrain.types.Model'
    )

  def hidden(
    params: Params,
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'B N D'], Cache | None]:
    out, cache, captured = internals(
      params, tokens, positions=positions, segment_ids=segment_ids,
      cache=cache, capture=('residual',),
    )  # fmt: skip
    stream = captured['residual']
    _numbers([layer], len(stream))
    if layer < len(stream) - 1:
      out = _normalized(model, params, stream[layer], apply_final_norm)
    return out, cache

  packed = model.packed and layer_policy(
    model.packed, layer, apply_final_norm=apply_final_norm
  )
  return dataclasses.replace(model, hidden=hidden, packed=packed)


class Probe(NamedTuple):
  """A linear map from standardised states to scores of classes."""

  mean: Float[Array, '*l D']
  scale: Float[Array, '*l D']
  kernel: Float[Array, '*l D C']
  bias: Float[Array, '*l C']


def linear_probe(
  states: Float[Array, 'N D'],
  labels: Int[Array, ' N'],
  where: Bool[Array, ' N'] | None = None,
  *,
  num_classes: int,
  ridge: float = 1e-2,
) -> Probe:
  """Fit classes to states by ridge regression on their indicators.

      min_W mean_n ‖W x_n − (1[y_n] − mean)‖² + λ ‖W‖²

  In closed form, hence without a step size, and for all layers by ``vmap``. Its
  control is a fit to labels in another order, whose accuracy is chance.

  Args:
    states: of one layer, see `layer_states`.
    labels: classes in [0, num_classes).
    where: which states count; None for all.
    num_classes: C.
    ridge: λ, of states of unit variance.

  References:
    Alain and Bengio, 2016, Understanding intermediate layers using linear
    classifier probes, arXiv:1610.01644.
  """
  (states,) = promoted(states)
  where = jnp.ones(labels.shape, bool) if where is None else where
  weight = where.astype(states.dtype)[:, None]
  weight /= jnp.maximum(jnp.sum(weight), 1)
  states = jnp.where(where[:, None], states, 0)
  target = jax.nn.one_hot(labels, num_classes, dtype=states.dtype)
  mean, bias = (jnp.sum(weight * x, axis=0) for x in (states, target))
  spread = jnp.sum(weight * jnp.square(states - mean[None]), axis=0)
  scale = jnp.where(spread > 0, jnp.sqrt(spread), 1)
  x = (states - mean[None]) / scale[None]
  gram = x.T @ (weight * x) + ridge * jnp.eye(x.shape[1], dtype=x.dtype)
  kernel = jnp.linalg.solve(gram, x.T @ (weight * (target - bias[None])))
  return Probe(mean, scale, kernel, bias)


def probe_accuracy(
  probe: Probe,
  states: Float[Array, 'N D'],
  labels: Int[Array, ' N'],
  where: Bool[Array, ' N'] | None = None,
) -> Float[Array, '']:
  """The share of states whose class has the largest score; 0 of none."""
  (states,) = promoted(states)
  where = jnp.ones(labels.shape, bool) if where is None else where
  x = (states - probe.mean[None]) / probe.scale[None]
  right = jnp.argmax(x @ probe.kernel + probe.bias[None], axis=1) == labels
  count = jnp.maximum(jnp.sum(where), 1).astype(states.dtype)
  return jnp.sum(right & where).astype(states.dtype) / count
