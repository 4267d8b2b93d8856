"""Temperature, top-k, top-p and min-p: from logits to one drawn token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from postrain.dtypes import Scalar, promoted


class Draw(NamedTuple):
  """A token of each row and its log-prob where it was drawn from.

  ``kept`` holds the ids that the filters kept, filled up with -1.
  """

  tokens: Int[Array, ' B']
  logprobs: Float[Array, ' B']
  kept: Int[Array, 'B K'] | None


def kept_candidates(
  logits: Float[Array, 'B K'],
  *,
  top_p: Scalar | None = None,
  min_p: Scalar | None = None,
) -> Bool[Array, 'B K']:
  """Which of the candidates, sorted from likely to unlikely, filters keep.

  top-p keeps the shortest prefix whose probability reaches ``top_p``; min-p
  keeps what has at least ``min_p`` of the best candidate's probability. The
  best candidate always stays. With both, a candidate must pass both.

  References:
    Holtzman et al. 2019, The Curious Case of Neural Text Degeneration,
    arXiv:1904.09751 (top-p). Nguyen et al. 2024, Turning Up the Heat: Min-p
    Sampling, arXiv:2407.01082.
  """
  probs = jax.nn.softmax(logits, axis=-1)
  keep = jnp.ones(logits.shape, bool)
  if top_p is not None:
    keep &= jnp.cumsum(probs, axis=-1) - probs < top_p
  if min_p is not None:
    keep &= probs >= min_p * probs[:, :1]
  return keep.at[:, 0].set(True)


def draw(
  logits: Float[Array, 'B V'],
  keys: Key[Array, ' B'],
  *,
  temperature: Scalar = 1.0,
  top_k: int | None = None,
  top_p: Scalar | None = None,
  min_p: Scalar | None = None,
) -> Draw:
  """Draw a token of each row, with a key of its own (Gumbel-max).

  Temperature first, then top-k, then top-p and min-p. Temperature 0 takes the
  most likely token, whose log-prob is then 0.
  """
  (logits,) = promoted(logits)
  if isinstance(temperature, int | float) and temperature == 0:
    best = _argmax(logits)
    return Draw(best, jnp.zeros(best.shape, logits.dtype), best[:, None])
  logits = logits / temperature
  if top_k is None and top_p is None and min_p is None:
    tokens = _gumbel_argmax(logits, keys)
    return Draw(tokens, _logprob(logits, tokens), None)
  size = logits.shape[-1]
  logits, ids = jax.lax.top_k(logits, min(top_k or size, size))
  keep = kept_candidates(logits, top_p=top_p, min_p=min_p)
  logits = jnp.where(keep, logits, -jnp.inf)
  chosen = _gumbel_argmax(logits, keys)
  tokens = jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0]
  return Draw(tokens, _logprob(logits, chosen), jnp.where(keep, ids, -1))


def _gumbel_argmax(logits: Array, keys: Array) -> Array:
  size = logits.shape[1:]
  noise = jax.vmap(lambda key: jax.random.gumbel(key, size, logits.dtype))(keys)
  return _argmax(logits + noise)


def _argmax(x: Array) -> Array:
  """The first of the largest: two plain reductions, vectorised on a CPU where
  `jnp.argmax`, a reduction of pairs, is not (x 4 of the whole draw)."""
  size = x.shape[-1]
  smaller = x < x.max(axis=-1, keepdims=True)
  return jnp.where(smaller, size, jnp.arange(size)).min(axis=-1)


def _logprob(logits: Array, tokens: Array) -> Array:
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)
