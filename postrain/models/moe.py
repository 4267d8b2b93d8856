"""A mixture of experts: routing, and gated MLPs that each see their tokens.

No token is dropped. Three forms of one function: dense (every expert on every
token), grouped (`jax.lax.ragged_dot`) and blocked (a batched product over
blocks of tokens that share an expert). `experts_mlp` chooses one and cuts the
experts over the devices of a mesh.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Int

from postrain import sharding
from postrain.dtypes import promoted

# Beyond this many tokens a longer block is no faster, only emptier.
BLOCK = 128
# With fewer tokens per expert, gathering weights costs more than it saves.
MIN_LOAD = 16


class Routing(NamedTuple):
  """Which experts see a token, and how much each counts.

  Attributes:
    experts: indices, the most probable first.
    gates: factors of their outputs, at least float32; the gradient flows here.
    logits: of the router, from which a loss of balance is made.
  """

  experts: Int[Array, 'N K']
  gates: Float[Array, 'N K']
  logits: Float[Array, 'N E']


def route(
  logits: Float[Array, 'N E'],
  *,
  num_selected: int,
  normalize: bool,
  experts: Int[Array, 'N K'] | None = None,
) -> Routing:
  """Select the most probable experts, or replay a recorded selection.

      g_k = exp(z_k − log Σ_j exp(z_j)), j over the selected or over all experts

  Args:
    logits: z, of the router.
    num_selected: K.
    normalize: whether the gates of a token sum to 1 (Mixtral, Qwen3-MoE), or
      are probabilities among all experts (Qwen2-MoE).
    experts: recorded indices to be used instead of those of ``logits``, whose
      gates are live all the same; below 0 none was recorded, and the natural
      one is taken. An index beyond the experts gives NaN.

  Returns:
    Routing, for recorded indices the same function of the logits.

  Raises:
    ValueError: there are fewer experts than are to be selected, or the
      recorded indices are not K for each token.

  References:
    Jiang et al., 2024, Mixtral of Experts, arXiv:2401.04088.
    Ma et al., 2025, Stabilizing MoE Reinforcement Learning by Aligning
    Training and Inference Routers, arXiv:2510.11370.
  """
  num_tokens, num_experts = logits.shape
  if not 1 <= num_selected <= num_experts:
    raise ValueError(
      f'num_selected={num_selected} of {num_experts} experts: choose 1 to'
      f' {num_experts}'
    )
  (wide,) = promoted(logits)
  _, natural = jax.lax.top_k(wide, num_selected)
  if experts is None:
    experts = natural
  elif experts.shape != natural.shape:
    raise ValueError(
      f'recorded experts of shape {experts.shape} for {num_tokens} tokens:'
      f' give {num_selected} for each, {natural.shape}'
    )
  experts = jnp.where(experts < 0, natural, experts.astype(natural.dtype))
  selected = jnp.take_along_axis(wide, experts, axis=-1)
  # By logits, for the probabilities of stale experts may all be 0.
  total = jax.nn.logsumexp(
    selected if normalize else wide, axis=-1, keepdims=True
  )
  return Routing(experts, jnp.exp(selected - total), logits)


Form = Callable[..., Float[Array, 'N D']]


def experts_mlp(
  x: Float[Array, 'N D'],
  routing: Routing,
  gate: Float[Array, 'E D F'],
  up: Float[Array, 'E D F'],
  down: Float[Array, 'E F D'],
  *,
  activation: Callable[[Array], Array],
  form: Form | None = None,
) -> Float[Array, 'N D']:
  """Sum the outputs of each token's experts, times their gates.

      y = Σ_k g_k W_down (activation(W_gate x) ⊙ W_up x), of expert k

  On a mesh each device multiplies its tokens with the experts that it holds,
  and the outputs are summed: weights do not move.

  Args:
    x: tokens of all sequences, sequence by sequence.
    routing: of these tokens.
    gate: first half of the gated MLP, of each expert.
    up: second half.
    down: back to the width of the stream.
    activation: of the gate, elementwise.
    form: `dense_mlp`, `grouped_mlp` or `blocked_mlp`; None takes what is
      fastest on the backend and for the shapes (``benchmarks/moe.py``).

  Returns:
    The output in the type of ``x``, summed in that of the gates.
  """

  def local(x, experts, gates, held, gate, up, down):
    run = form or fastest(experts, num_experts=len(held))
    here = experts - held[0]
    return run(x, here, gates, gate, up, down, activation=activation)

  held = jnp.arange(len(gate), dtype=routing.experts.dtype)
  token, wide = ('tokens', 'embed'), ('experts', 'embed', 'mlp')
  choice, narrow = ('tokens', None), ('experts', 'mlp', 'embed')
  out = sharding.sum_over_shards(
    local,
    (x, routing.experts, routing.gates, held, gate, up, down),
    (token, choice, choice, ('experts',), wide, wide, narrow),
  )
  return out.astype(x.dtype)


def fastest(experts: Int[Array, 'N K'], *, num_experts: int) -> Form:
  """The form for a backend and a shape, by measurement.

  On CPU XLA expands a ragged product to one over all experts, and on GPU it
  does so unless told otherwise (jax 0.10.2).
  """
  if sharding.platform() == 'tpu':
    return grouped_mlp
  light = num_experts < experts.size < MIN_LOAD * num_experts
  few = num_experts <= experts.shape[1]
  return dense_mlp if light or few else blocked_mlp


# The forms. An expert below 0 or beyond the weights adds nothing.


def dense_mlp(
  x: Float[Array, 'N D'],
  experts: Int[Array, 'N K'],
  gates: Float[Array, 'N K'],
  gate: Float[Array, 'E D F'],
  up: Float[Array, 'E D F'],
  down: Float[Array, 'E F D'],
  *,
  activation: Callable[[Array], Array],
) -> Float[Array, 'N D']:
  """Run every expert on every token: the plainest form.

  Args:
    x: tokens.
    experts: of each token.
    gates: their factors.
    gate: of the MLP, as `experts_mlp` has it.
    up: the same.
    down: the same.
    activation: the same.

  Returns:
    The output in the type of the gates.
  """
  hidden = activation(jnp.einsum('nd,edf->enf', x, gate))
  hidden *= jnp.einsum('nd,edf->enf', x, up)
  out = jnp.einsum('enf,efd->end', hidden, down).astype(gates.dtype)
  chosen = jax.nn.one_hot(experts, len(gate), dtype=gates.dtype)
  return jnp.einsum('end,nk,nke->nd', out, gates, chosen)


def grouped_mlp(
  x: Float[Array, 'N D'],
  experts: Int[Array, 'N K'],
  gates: Float[Array, 'N K'],
  gate: Float[Array, 'E D F'],
  up: Float[Array, 'E D F'],
  down: Float[Array, 'E F D'],
  *,
  activation: Callable[[Array], Array],
) -> Float[Array, 'N D']:
  """Sort tokens by expert and multiply group by group.

  Args:
    x: tokens.
    experts: of each token.
    gates: their factors.
    gate: of the MLP, as `experts_mlp` has it.
    up: the same.
    down: the same.
    activation: the same.

  Returns:
    The output in the type of the gates.
  """
  order, owners, ends = _sorted(experts, len(gate))
  sizes = jnp.diff(ends, prepend=0)
  present = (owners < len(gate))[:, None]
  # Rows outside of all groups may hold anything, their gradient too.
  rows = jnp.where(present, x[order // experts.shape[1]], 0)
  dot = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
  out = dot(activation(dot(rows, gate)) * dot(rows, up), down)
  places = jnp.argsort(order)
  return _combined(jnp.where(present, out, 0), places, gates)


def blocked_mlp(
  x: Float[Array, 'N D'],
  experts: Int[Array, 'N K'],
  gates: Float[Array, 'N K'],
  gate: Float[Array, 'E D F'],
  up: Float[Array, 'E D F'],
  down: Float[Array, 'E F D'],
  *,
  activation: Callable[[Array], Array],
) -> Float[Array, 'N D']:
  """Fill blocks with tokens of one expert and multiply them as a batch.

  The last block of an expert is padded, so that shapes are fixed whatever the
  load: at most one block per expert is wasted, and weights are gathered once
  per block.

  Args:
    x: tokens.
    experts: of each token.
    gates: their factors.
    gate: of the MLP, as `experts_mlp` has it.
    up: the same.
    down: the same.
    activation: the same.

  Returns:
    The output in the type of the gates.

  References:
    Gale et al., 2022, MegaBlocks, arXiv:2211.15841.
  """
  num_pairs, num_experts = experts.size, len(gate)
  size = min(BLOCK, max(1, num_pairs // num_experts))
  most = min(num_experts, num_pairs)  # experts that have any token
  num_blocks = most + (num_pairs - most) // size

  order, owners, ends = _sorted(experts, num_experts)
  sizes = jnp.diff(ends, prepend=0)
  block_ends = jnp.cumsum(-(-sizes // size), dtype=ends.dtype)
  # Each expert moves back by the padding of those before it.
  shift = size * block_ends - ends
  shift = jnp.concatenate([jnp.zeros_like(shift[:1]), shift[:-1]])
  place = jnp.arange(num_pairs, dtype=ends.dtype) + shift.at[owners].get(
    mode='fill', fill_value=num_blocks * size
  )
  source = jnp.full(num_blocks * size, len(x), ends.dtype)
  source = source.at[place].set(order // experts.shape[1], mode='drop')
  rows = x.at[source].get(mode='fill', fill_value=0)
  rows = rows.reshape(num_blocks, size, -1)
  numbers = jnp.arange(num_blocks, dtype=ends.dtype)
  block = jnp.searchsorted(block_ends, numbers, side='right')
  block = jnp.minimum(block, num_experts - 1)  # behind the last are empty ones

  def dot(rows: Array, weights: Array) -> Array:
    return jnp.einsum('mbd,mdf->mbf', rows, weights[block])

  out = dot(activation(dot(rows, gate)) * dot(rows, up), down)
  places = jnp.zeros_like(place).at[order].set(place)
  return _combined(out.reshape(num_blocks * size, -1), places, gates)


def _sorted(
  experts: Int[Array, 'N K'], num_experts: int
) -> tuple[Int[Array, 'NK'], Int[Array, 'NK'], Int[Array, 'E']]:
  """Pairs by expert: their order, their experts, the end of each group.

  Experts that are not here count as one behind the last.
  """
  flat = experts.reshape(-1)
  here = (flat >= 0) & (flat < num_experts)
  flat = jnp.where(here, flat, num_experts)
  pairs = jnp.arange(flat.size, dtype=flat.dtype)
  # `sort_key_val` would take the order for one that all devices share, and the
  # gradient on a mesh would be wrong (jax 0.10.2).
  owners, order = jax.lax.sort((flat, pairs), num_keys=1)
  indices = jnp.arange(num_experts, dtype=flat.dtype)
  ends = jnp.searchsorted(owners, indices, side='right')
  return order, owners, ends.astype(flat.dtype)


def _combined(
  out: Float[Array, 'R D'],
  places: Int[Array, 'NK'],
  gates: Float[Array, 'N K'],
) -> Float[Array, 'N D']:
  """Σ_k g_k out[place of pair k], 0 for a place beyond the rows."""
  pairs = out.at[places].get(mode='fill', fill_value=0)
  pairs = pairs.reshape(*gates.shape, -1).astype(gates.dtype)
  return jnp.einsum('nkd,nk->nd', pairs, gates)
