"""Sorting, after a lecture's toy: rewards that can be hacked, a tiny policy."""

from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from postrain.types import Model, Task


def sort(
  *, vocab_size: int = 10, length: int = 4, hold_out: bool = True
) -> Task:
  """Sort ``length`` integers of [0, vocab_size), drawn with replacement.

  A prompt x is held out iff Σ x ≡ 0 (mod vocab_size): one prompt in
  vocab_size, and with it all its permutations. Both sides are drawn uniformly.
  There is no stop token: a completion ends when it is full.

  The reward of the lecture's code, ``inclusion_ordering``, ships two hacks: it
  counts the tokens of the prompt that are present, so that one 4 answers three;
  and it pays the ordering of any string. ``multiset_ordering``, the lecture's
  formula, closes the first. ``exact`` is what was meant.

  Args:
    vocab_size: number of integers, ≥ 2.
    length: integers of a prompt and of a completion, ≥ 1.
    hold_out: False draws training and evaluation alike from all prompts, as
      the lecture does.

  Raises:
    ValueError: a size out of range.

  References:
    Hashimoto and Liang, Stanford CS336 Language Modeling from Scratch,
    lecture 17 (2025).
  """
  _check_sizes(vocab_size=vocab_size, length=length)
  residues = {False: (1, vocab_size), True: (0, 1)}  # of training, evaluation
  if not hold_out:
    residues = dict.fromkeys(residues, (0, vocab_size))

  def prompt(
    key: Key[Array, ''], held_out: bool = False
  ) -> tuple[Int[Array, ' S'], Bool[Array, ' S']]:
    low, high = residues[held_out]
    lows = jnp.array([0] * (length - 1) + [low])
    highs = jnp.array([vocab_size] * (length - 1) + [high])
    draws = jax.random.randint(key, (length,), lows, highs, dtype=jnp.int32)
    # The last draw is the residue that the sum shall have.
    tokens = draws.at[-1].add(-draws[:-1].sum(dtype=jnp.int32)) % vocab_size
    return tokens, jnp.ones(length, bool)

  def solution(
    prompts: Int[Array | np.ndarray, 'B S'],
  ) -> tuple[Int[Array, 'B T'], Bool[Array, 'B T']]:
    completions = jnp.sort(jnp.asarray(prompts), axis=-1)
    return completions, jnp.ones(prompts.shape, bool)

  return Task(
    vocab_size=vocab_size,
    pad_id=0,
    stop_ids=(),
    prompt_length=length,
    completion_length=length,
    prompt=prompt,
    rewards={
      'inclusion_ordering': inclusion_ordering,
      'multiset_ordering': multiset_ordering,
      'distance': distance,
      'exact': exact,
    },
    render=render,
    solution=solution,
  )


def inclusion_ordering(
  prompts: Int[Array, 'B S'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, ' B']:
  """Σᵢ 1[xᵢ ∈ y] + Σₜ 1[yₜ ≤ yₜ₊₁], in [0, 2L − 1]."""
  counts = _occurrences(prompts, completions, mask)
  return _total(counts > 0) + _ordered_pairs(completions, mask)


def multiset_ordering(
  prompts: Int[Array, 'B S'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, ' B']:
  """Σᵥ min(#ᵥ x, #ᵥ y) + Σₜ 1[yₜ ≤ yₜ₊₁], in [0, 2L − 1]."""
  counts = _occurrences(prompts, completions, mask)
  same = prompts[:, :, None] == prompts[:, None, :]
  # A prompt token is answered if y has more copies than came before it in x.
  earlier = jnp.tril(same, -1).sum(-1, dtype=jnp.int32)
  return _total(counts > earlier) + _ordered_pairs(completions, mask)


def distance(
  prompts: Int[Array, 'B S'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, ' B']:
  """Σₜ 1[yₜ = sort(x)ₜ], in [0, L]."""
  _check_shapes(prompts, completions)
  return _total((completions == jnp.sort(prompts, axis=-1)) & mask)


def exact(
  prompts: Int[Array, 'B S'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, ' B']:
  """1[y = sort(x)]."""
  right = multiset_ordering(prompts, completions, mask)
  return (right == 2 * prompts.shape[1] - 1).astype(jnp.float32)


def render(ids: Sequence[int] | np.ndarray | Array) -> str:
  """Write token ids as integers with a space between."""
  return ' '.join(map(str, np.asarray(ids).tolist()))


def toy_policy(
  *, vocab_size: int = 10, length: int = 4, embed_dim: int = 4
) -> Model:
  """The lecture's policy: all positions at once, independent given the prompt.

    h = Σₗ emb(xₗ) Eₗ,  zₗ = h Dₗ,  logitsₗ = zₗ W + b,  l ∈ [0, length)

  The position ``length - 1 + l`` of a sequence carries zₗ, others 0, so the
  completion's own tokens change nothing. The cache is h, one sequence a row.
  With the lecture's width of 4 for 10 integers, h is a bottleneck.

  Initialised as PyTorch does: emb ~ N(0, 1); E, D ~ N(0, 1/d); W, b ~
  U(−1/√d, 1/√d).

  Args:
    vocab_size: number of integers, ≥ 2.
    length: integers of a prompt and of a completion, ≥ 1.
    embed_dim: width d of emb, h and z, ≥ 1.

  Raises:
    ValueError: a size out of range.
  """
  _check_sizes(vocab_size=vocab_size, length=length, embed_dim=embed_dim)
  scale = 1 / math.sqrt(embed_dim)

  def init(key: Key[Array, '']) -> dict[str, Array]:
    keys = jax.random.split(key, 5)
    square = (length, embed_dim, embed_dim)
    head = (embed_dim, vocab_size)
    uniform = jax.random.uniform
    return {
      'embedding': jax.random.normal(keys[0], (vocab_size, embed_dim)),
      'encoder': jax.random.normal(keys[1], square) * scale,
      'decoder': jax.random.normal(keys[2], square) * scale,
      'kernel': uniform(keys[3], head, minval=-scale, maxval=scale),
      'bias': uniform(keys[4], (vocab_size,), minval=-scale, maxval=scale),
    }

  def hidden(
    params: dict[str, Array],
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: Float[Array, 'B D'] | None = None,
  ) -> tuple[Float[Array, 'B N D'], Float[Array, 'B D'] | None]:
    # Products of all rows at once: batches of 4 x 4 ones are slow on a CPU.
    table = jnp.einsum('vd,lde->lve', params['embedding'], params['encoder'])
    table = table.reshape(-1, embed_dim)
    reads = (positions < length) & (segment_ids > 0)
    place = jnp.where(reads, positions * vocab_size + tokens, -1)
    read = jax.nn.one_hot(place, len(table), dtype=bool)
    if cache is None:
      seen = segment_ids[:, :, None] == segment_ids[:, None, :]
      h = jnp.einsum(
        'bmn,bne->bme',
        seen.astype(table.dtype),
        read.astype(table.dtype) @ table,
      )
    else:
      cache = (
        cache.astype(table.dtype) + read.any(1).astype(table.dtype) @ table
      )
      h = cache[:, None]
    written = jax.nn.one_hot(positions - (length - 1), length, dtype=bool)
    z = jnp.einsum('bme,led->bmld', h, params['decoder'])
    # Selected, not multiplied: XLA's CPU kernel for sums of products is slow.
    parts = [
      jnp.where(written[..., l, None], z[:, :, l], 0) for l in range(length)
    ]
    return functools.reduce(jnp.add, parts), cache

  def unembed(params: dict[str, Array], hidden: Array) -> Array:
    logits = hidden @ params['kernel']
    return logits + jnp.broadcast_to(params['bias'], logits.shape)

  def empty_cache(
    batch_size: int, length: int, prefix: Float[Array, 'P D'] | None = None
  ) -> Float[Array, 'B D']:
    del length  # h has the size of one prompt, however many slots follow
    if prefix is None:
      return jnp.zeros((batch_size, embed_dim))
    return jnp.repeat(prefix, batch_size // prefix.shape[0], axis=0)

  return Model(
    init, hidden, unembed, empty_cache, vocab_size, reads_prefix=True
  )


def _occurrences(prompts: Array, completions: Array, mask: Array) -> Array:
  """How often each prompt token occurs in the completion."""
  _check_shapes(prompts, completions)
  same = prompts[:, :, None] == completions[:, None, :]
  return (same & mask[:, None, :]).sum(-1, dtype=jnp.int32)


def _ordered_pairs(completions: Array, mask: Array) -> Array:
  ordered = completions[:, :-1] <= completions[:, 1:]
  return _total(ordered & mask[:, :-1] & mask[:, 1:])


def _total(true: Array) -> Array:
  return true.sum(-1, dtype=jnp.float32)


def _check_shapes(prompts: Array, completions: Array) -> None:
  if prompts.shape != completions.shape:
    raise ValueError(
      f'completions of shape {completions.shape} for prompts of shape'
      f' {prompts.shape}: sample as many tokens as a prompt has'
      f' (max_new_tokens={prompts.shape[1]})'
    )


def _check_sizes(*, vocab_size: int, length: int, embed_dim: int = 1) -> None:
  if vocab_size < 2 or length < 1 or embed_dim < 1:
    raise ValueError(
      f'vocab_size={vocab_size}, length={length}, embed_dim={embed_dim}:'
      ' choose at least 2, 1 and 1'
    )
