"""A policy that is a table: every expectation can be enumerated exactly."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from postrain.types import Model, Task

MAX_SEQUENCES = 2**20


class Enumeration(NamedTuple):
  """All completions; ``logprobs`` per token, 0 off the mask.

  A sequence has the probability exp(Σₜ logprobs); these sum to 1.
  """

  tokens: Int[Array, 'N T']
  mask: Bool[Array, 'N T']
  logprobs: Float[Array, 'N T']


def tabular(
  *,
  vocab_size: int = 3,
  length: int = 3,
  stop_id: int | None = None,
  reward_table: Sequence[float] | None = None,
  seed: int = 0,
) -> Task:
  """One prompt, an arbitrary reward ``table`` of the whole completion.

  The completion y has the reward table[Σₜ yₜ Vᵀ⁻¹⁻ᵗ], t = 0 ... T − 1, with 0
  for yₜ off the mask. Training and evaluation share the prompt, the token 0.

  Args:
    vocab_size: number of tokens V, ≥ 2.
    length: tokens of a completion T, ≥ 1.
    stop_id: token that ends a completion early, 1 to V − 1 (0 fills unused
      slots); None for none.
    reward_table: Vᵀ rewards; None draws them from N(0, 1).
    seed: of the draw.

  Raises:
    ValueError: a size, stop_id or the table's length out of range.
  """
  size = _num_sequences(vocab_size, length)
  _check_stop(stop_id, vocab_size)
  rewards = (
    np.random.default_rng(seed).normal(size=size)
    if reward_table is None
    else np.asarray(reward_table, float)
  )
  if rewards.shape != (size,):
    raise ValueError(
      f'reward_table has {len(rewards)} entries: give one for each of the'
      f' {vocab_size}^{length} = {size} completions'
    )
  places = vocab_size ** np.arange(length - 1, -1, -1, dtype=np.int32)

  def prompt(
    key: Key[Array, ''], held_out: bool = False
  ) -> tuple[Int[Array, ' S'], Bool[Array, ' S']]:
    del key, held_out
    return jnp.zeros(1, jnp.int32), jnp.ones(1, bool)

  def table(
    prompts: Int[Array, 'B S'],
    completions: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
  ) -> Float[Array, ' B']:
    del prompts
    if completions.shape[1] != length:
      raise ValueError(
        f'completions of {completions.shape[1]} tokens for a table of sequences'
        f' of {length}: set max_new_tokens={length}'
      )
    index = jnp.where(mask, completions, 0) @ jnp.asarray(places, jnp.int32)
    return jnp.asarray(rewards)[index]

  return Task(
    vocab_size=vocab_size,
    pad_id=0,
    stop_ids=() if stop_id is None else (stop_id,),
    prompt_length=1,
    completion_length=length,
    prompt=prompt,
    rewards={'table': table},
    render=render,
  )


def tabular_policy(*, vocab_size: int = 3, length: int = 3) -> Model:
  """An autoregressive policy with free logits for each prefix.

  The prefixes form a tree: the prompt is node 0, and token v leads from node s
  to node s V + v + 1. Parameters: ``logits [(Vᵀ − 1)/(V − 1), V]``. The hidden
  state is the row of the node, 0 beyond the last; the cache is the node. The
  token at position 0 is the prompt, whatever it is.

  Args:
    vocab_size: number of tokens V, ≥ 2.
    length: tokens of a completion T, ≥ 1.

  Raises:
    ValueError: a size out of range.
  """
  _num_sequences(vocab_size, length)
  num_nodes = sum(vocab_size**t for t in range(length))

  def init(key: Key[Array, '']) -> dict[str, Array]:
    return {'logits': jax.random.normal(key, (num_nodes, vocab_size))}

  def hidden(
    params: dict[str, Array],
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Int[Array, ' B'] | None = None,
  ) -> tuple[Float[Array, 'B N V'], Int[Array, ' B'] | None]:
    def advance(node: Array, slot: tuple) -> tuple[Array, Array]:
      token, position, segment = slot
      child = jnp.minimum(node * vocab_size + token + 1, num_nodes)
      child = jnp.where(position == 0, 0, child)
      node = jnp.where(segment > 0, child, node)
      return node, node

    start = empty_cache(tokens.shape[0], 0) if cache is None else cache
    slots = (tokens.astype(jnp.int32).T, positions.T, segment_ids.T)
    last, nodes = jax.lax.scan(advance, start, slots)
    rows = params['logits'].at[nodes.T].get(mode='fill', fill_value=0)
    return rows, None if cache is None else last

  def empty_cache(
    batch_size: int, length: int, prefix: Int[Array, ' P'] | None = None
  ) -> Int[Array, ' B']:
    del length  # one node stands for all that came before
    if prefix is None:
      return jnp.zeros(batch_size, jnp.int32)
    return jnp.repeat(prefix, batch_size // prefix.shape[0])

  return Model(
    init, hidden, lambda params, hidden: hidden, empty_cache, vocab_size
  )


def enumeration(
  params: dict[str, Array], *, length: int, stop_id: int | None = None
) -> Enumeration:
  """List all completions of the tabular policy with their log-probs.

  Without a stop token these are the Vᵀ sequences in the order of
  ``reward_table``. With one, a sequence ends at its first stop, the slots after
  it are 0 and off the mask, and each such sequence stands once.

  Args:
    params: of `tabular_policy`; float64 is kept, gradients flow.
    length: tokens of a completion T.
    stop_id: token that ends a completion early, None for none.
  """
  vocab_size = params['logits'].shape[-1]
  _check_stop(stop_id, vocab_size)
  index = np.arange(_num_sequences(vocab_size, length))[:, None]
  tokens = index // vocab_size ** np.arange(length - 1, -1, -1) % vocab_size
  stops = tokens == (-1 if stop_id is None else stop_id)
  mask = np.cumsum(stops, axis=-1) - stops == 0
  once = (mask | (tokens == 0)).all(-1)
  tokens, mask = tokens[once], mask[once]

  nodes = np.zeros_like(tokens)
  for t in range(1, length):
    nodes[:, t] = nodes[:, t - 1] * vocab_size + tokens[:, t - 1] + 1
  logprobs = jax.nn.log_softmax(params['logits'])[nodes, tokens]
  return Enumeration(
    jnp.asarray(tokens, jnp.int32),
    jnp.asarray(mask),
    jnp.where(mask, logprobs, 0),
  )


def render(ids: Sequence[int] | np.ndarray | Array) -> str:
  """Write token ids as integers with a space between."""
  return ' '.join(map(str, np.asarray(ids).tolist()))


def _num_sequences(vocab_size: int, length: int) -> int:
  size = vocab_size**length if vocab_size > 1 and length > 0 else 0
  if not 0 < size <= MAX_SEQUENCES:
    raise ValueError(
      f'vocab_size={vocab_size}, length={length}: choose at least 2 and 1, and'
      f' at most {MAX_SEQUENCES} completions vocab_size^length'
    )
  return size


def _check_stop(stop_id: int | None, vocab_size: int) -> None:
  if stop_id is not None and not 0 < stop_id < vocab_size:
    raise ValueError(
      f'stop_id={stop_id}: choose 1 to {vocab_size - 1}; 0 fills unused slots'
    )
