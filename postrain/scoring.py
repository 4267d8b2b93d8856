"""Log-probs of given tokens under any parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from postrain import sharding
from postrain.batches import check_packing, cut, join, together
from postrain.dtypes import promoted
from postrain.logprobs import map_time_chunks, token_entropy, token_logprobs
from postrain.types import (
  Cache,
  Model,
  Packing,
  Params,
  Scalar,
  SharedPrompts,
)

ROUTING = ('experts', 'router_logits')  # captures of a mixture of experts


class Scores(NamedTuple):
  """Per-token figures, 0 off the mask.

  ``logprobs`` and ``entropy`` are at the given temperature,
  ``model_logprobs`` at temperature 1, comparable with the sampler's.
  ``experts`` are those that the routers select for each real token, -1 on
  padding: the visited ones, unless others were given.
  """

  logprobs: Float[Array, 'B T']
  entropy: Float[Array, 'B T']
  model_logprobs: Float[Array, 'B T']
  experts: Int[Array, 'B T L K'] | None = None


def token_positions(valid: Bool[Array, 'B T']) -> Int[Array, 'B T']:
  """Count real tokens from 0, so that left padding moves nothing."""
  return jnp.maximum(jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)


def forward(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B N'],
  *,
  positions: Int[Array, 'B N'],
  segment_ids: Int[Array, 'B N'],
  cache: Cache | None = None,
  experts: Int[Array, 'B N L K'] | None = None,
  capture: tuple[str, ...] = (),
) -> tuple[Float[Array, 'B N D'], Cache | None, dict[str, Array]]:
  """Call `Model.hidden`, or `Model.internals` where more is asked of it.

  Raises:
    ValueError: the model shows no internals, or has no experts.
  """
  where: Any = dict(positions=positions, segment_ids=segment_ids, cache=cache)
  if experts is None and not capture:
    return *model.hidden(params, tokens, **where), {}
  if not model.num_experts and (experts is not None or {*capture} & {*ROUTING}):
    raise ValueError(
      'routing is recorded, replayed or balanced, but the model has no experts:'
      ' take a mixture of experts, or ask for none of the three'
    )
  if model.internals is None:
    raise ValueError(
      f'capture={capture} of a model without internals: give it some, see'
      ' postrain.types.Model'
    )
  return model.internals(
    params, tokens, **where, capture=capture, experts=experts
  )


def read_states(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  packing: Packing | SharedPrompts | None = None,
  capture: tuple[str, ...] = (),
  experts: Int[Array, 'B T L K'] | None = None,
) -> tuple[Float[Array, 'B T D'], dict[str, Array]]:
  """Hidden states after each token, and what else that one forward shows.

  ``out[:, t]`` has read ``tokens[:, t]``. Packed rows are scattered back, so
  that no caller ever meets a segment id.

  Args:
    model: see `postrain.types.Model`.
    params: its parameters.
    tokens: prompt and completion.
    valid: True on real tokens.
    packing: layout of the call; a model that reads no prefix reads shared
      prompts with each row.
    capture: names of states of the layers, see `postrain.types.InternalsFn`.
    experts: that each token visits; where negative the router chooses.

  Raises:
    ValueError: see `forward`.
  """
  if experts is not None:
    experts = jnp.where(valid[..., None, None], experts, -1)
  positions, segment_ids = token_positions(valid), valid.astype(jnp.int32)
  if isinstance(packing, SharedPrompts) and model.reads_prefix:
    return _behind_prompts(
      model, params, packing, capture,
      (tokens, positions, segment_ids, experts),
    )  # fmt: skip
  if isinstance(packing, Packing):
    model = model.packed or model
    positions, segment_ids = packing.positions, packing.segment_ids
    tokens, experts = jax.tree.map(
      lambda x: relaid(x, packing.source), (tokens, experts)
    )
  hidden, _, captured = forward(
    model, params, tokens, positions=positions, segment_ids=segment_ids,
    experts=experts, capture=capture,
  )  # fmt: skip
  if not isinstance(packing, Packing):
    return hidden, captured

  def unpacked(x: Array) -> Array:
    return relaid(x, packing.slot)

  return unpacked(hidden), {
    name: unpacked(x) if name == 'experts' else jax.vmap(unpacked)(x)
    for name, x in captured.items()
  }


def relaid(
  x: Shaped[Array, 'R N ...'], places: Int[Array, 'B T']
) -> Shaped[Array, 'B T ...']:
  """Pick by flat places: from rows to packed rows, or back."""
  return x.reshape(-1, *x.shape[2:])[places]


def _behind_prompts(
  model: Model, params: Params, shared: SharedPrompts,
  capture: tuple[str, ...], rows: tuple,
) -> tuple[Array, dict[str, Array]]:  # fmt: skip
  """`read_states` of completions that read the cache of their prompt."""

  def run(rows: tuple, cache: Cache) -> tuple[Any, ...]:
    tokens, positions, segment_ids, experts = rows
    return forward(
      model, params, tokens, positions=positions, segment_ids=segment_ids,
      cache=cache, experts=experts, capture=capture,
    )  # fmt: skip

  def first_of_group(x: Array) -> Array:
    groups = x.reshape(-1, shared.num_samples, *x.shape[1:])
    return groups[:, 0, : shared.length]

  def joined(prompt: Array, completion: Array, axis: int = 0) -> Array:
    prompt = jnp.repeat(prompt, shared.num_samples, axis=axis)
    return jnp.concatenate([prompt, completion], axis=axis + 1)

  prompts = jax.tree.map(first_of_group, rows)
  states, prefix, shown = run(prompts, model.empty_cache(*prompts[0].shape))
  completions = jax.tree.map(lambda x: x[:, shared.length :], rows)
  hidden, _, captured = run(
    completions, model.empty_cache(len(completions[0]), 0, prefix)
  )
  return joined(states, hidden), {
    name: joined(shown[name], x, 0 if name == 'experts' else 1)
    for name, x in captured.items()
  }


def routed_states(
  model: Model,
  params: Params,
  tokens: Int[Array, 'B T'],
  valid: Bool[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  packing: Packing | SharedPrompts | None = None,
  *,
  experts: Int[Array, 'B T L K'] | None = None,
  record: bool = False,
) -> tuple[Float[Array, 'B T D'], dict[str, Array]]:
  """`hidden_states`, and how tokens were routed.

  Args:
    model: see `postrain.types.Model`.
    params: its parameters.
    tokens: prompt and completion.
    valid: True on real tokens.
    mask: True where hidden states are wanted.
    packing: layout of the call.
    experts: that each token visits; where negative the router chooses.
    record: whether the second result holds 'experts' [B T L K], those that
      each token visited, and 'router_logits' [B T L E]. They stand at the token
      that was routed, not at the one that it predicts; on padding is anything.
  """
  hidden, routing = read_states(
    model, params, tokens, valid, packing, ROUTING if record else (), experts
  )
  if record:
    logits = jnp.moveaxis(routing['router_logits'], 0, 2)
    routing = {'experts': routing['experts'], 'router_logits': logits}
  return aligned(hidden, mask), routing


def selected(routing: dict[str, Array]) -> Int[Array, 'B T L K']:
  """The experts that routers select by themselves, others visited or not."""
  (logits,) = promoted(routing['router_logits'])
  return jax.lax.top_k(logits, routing['experts'].shape[-1])[1]


def rerouted(
  experts: Int[Array, 'B T L K'], others: Int[Array, 'B T L K']
) -> Float[Array, 'B T']:
  """1 on tokens that two routings send to unlike sets in some layer, else 0.

  Where one of them is not known, negative, the token counts as unmoved.
  """
  same = jnp.sort(experts, axis=-1) == jnp.sort(others, axis=-1)
  known = (experts >= 0) & (others >= 0)
  return jnp.any(known & ~same, axis=(-2, -1)).astype(jnp.float32)


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
  packing: Packing | SharedPrompts | None = None,
) -> Float[Array, 'B T D']:
  """Hidden states aligned with the tokens that they predict.

  ``out[:, t]`` predicts ``tokens[:, t]``; it is 0 off the mask.
  """
  return routed_states(model, params, tokens, valid, mask, packing)[0]


def map_logits(
  fn: Callable[..., Any],
  model: Model,
  params: Any,
  hidden: Float[Array, 'B T D'],
  *arrays: Array,
  chunk_size: int,
  packing: Packing | SharedPrompts | None = None,
) -> Any:
  """Map a per-token function of logits over chunks of time.

  Where ``packing`` tells slots of prompts, nothing is asked for there: 0. Of
  packed rows only what they hold is unembedded; padding takes any figure.
  """
  start = packing.length if isinstance(packing, SharedPrompts) else 0
  inputs = [x[:, start:] for x in (hidden, *arrays)]
  if isinstance(packing, Packing):
    inputs = [relaid(x, packing.source) for x in inputs]
  apart, whole = sharding.by_parts(inputs[0].shape[1])
  inputs = [apart(x) for x in inputs]

  def figures_of(params: Any, *inputs: Array) -> Any:
    return map_time_chunks(
      fn, lambda h: model.unembed(params, h), *inputs, chunk_size=chunk_size
    )

  figures = sharding.over_rows(figures_of, params, inputs, of_parts=True)
  figures = jax.tree.map(whole, figures)
  if isinstance(packing, Packing):
    return jax.tree.map(lambda x: relaid(x, packing.slot), figures)

  def behind_prompt(x: Array) -> Array:
    return jnp.pad(x, [(0, 0), (start, 0)] + [(0, 0)] * (x.ndim - 2))

  return jax.tree.map(behind_prompt, figures)


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
  packing: Packing | SharedPrompts | None = None,
  experts: Int[Array, 'B T L K'] | None = None,
  record_routing: bool = False,
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
    packing: layout made for the same ``num_slices`` and units of one row, or
      that of prompts which groups share; no figures of prompts are wanted then.
    experts: that each token visits; where negative the router chooses.
    record_routing: also return the experts that the routers select.

  Raises:
    ValueError: the packing was made for other slices, or routing is given to or
      asked of a dense model.
  """
  check_packing(packing, num_slices, 1)

  def score_slice(piece: tuple) -> Scores:
    tokens, valid, mask, packing, experts = piece
    hidden, routing = routed_states(
      model, params, tokens, valid, mask, packing, experts=experts,
      record=record_routing,
    )  # fmt: skip

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
      figures, model, params, hidden, tokens, chunk_size=chunk_size,
      packing=packing,
    )  # fmt: skip
    scores = jax.tree.map(lambda x: jnp.where(mask, x, 0), scores)
    if not record_routing:
      return scores
    found = jnp.where(valid[..., None, None], selected(routing), -1)
    return scores._replace(experts=found)

  return in_slices(
    score_slice,
    (tokens, valid, mask, packing, experts),
    num_slices,
    together(packing),
  )


def in_slices(
  fn: Callable[[Any], Any], tree: Any, num_slices: int, unit_size: int = 1
) -> Any:
  """Map over strided slices of whole units, one after the other."""
  if num_slices == 1:
    return fn(tree)
  leaves, structure = jax.tree.flatten(tree)
  return join(
    jax.lax.map(
      lambda piece: fn(jax.tree.unflatten(structure, piece)),
      cut(leaves, num_slices, unit_size),
    ),
    unit_size,
  )
