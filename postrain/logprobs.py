"""From logits, or hidden states, to what a loss needs of each token."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.nn import logsumexp
import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree, Shaped

from postrain.dtypes import Scalar, promoted

__all__ = [
  'kept_token_logprobs',
  'map_time_chunks',
  'token_entropy',
  'token_logprobs',
]


def token_logprobs(
  logits: Float[Array, '*n V'],
  tokens: Int[Array, '*n'],
  *,
  temperature: Scalar = 1.0,
) -> Float[Array, '*n']:
  """Log-probability of each token.

      log π(a) = z_a / τ − log Σ_v exp(z_v / τ)

  The trainer must use the temperature that the sampler used, or every
  importance ratio is off (a known defect of several trainers).

  Args:
    logits: unnormalised scores z; bfloat16 is summed in float32.
    tokens: ids a in [0, V).
    temperature: τ > 0.

  Returns:
    Log-probabilities, at most 0.
  """
  return _log_softmax_at(_scaled(logits, temperature), tokens)


def token_entropy(
  logits: Float[Array, '*n V'], *, temperature: Scalar = 1.0
) -> Float[Array, '*n']:
  """Entropy of each token's distribution, in nats.

      H = −Σ_v π_v log π_v

  From all logits, hence without variance; −log π(a) of the sampled token is
  its one-sample estimate. Excluded candidates (logit −inf) add 0.

  Args:
    logits: unnormalised scores z; bfloat16 is summed in float32.
    temperature: τ > 0.

  Returns:
    Entropies in [0, log V].
  """
  logits = _scaled(logits, temperature)
  normalizer = _normalizer(logits)
  probs = jnp.exp(logits - normalizer[..., None])
  scores = jnp.maximum(logits, jnp.finfo(logits.dtype).min)  # 0 x inf is nan
  # The select is for XLA's CPU, whose kernel for a sum of products is slow
  # on the short rows of a small vocabulary (benchmarks/device_loop.py).
  terms = jnp.where(probs > 0, probs * scores, 0)
  return normalizer - jnp.sum(terms, axis=-1)


def kept_token_logprobs(
  logits: Float[Array, '*n V'],
  tokens: Int[Array, '*n'],
  kept: Int[Array, '*n K'],
  *,
  temperature: Scalar = 1.0,
) -> Float[Array, '*n']:
  """Log-probability among the candidates that the sampler's filters kept.

      log π_S(a) = z_a / τ − log Σ_{v∈S} exp(z_v / τ)

  Without it the ratio to a top-p or top-k sampler is the kept mass instead of
  1 at equal parameters. A token outside S has log-probability −inf. Where no
  candidate is recorded (prompt, padding, no filter) S is the whole vocabulary.

  Args:
    logits: unnormalised scores z.
    tokens: ids a, members of S.
    kept: ids of S in any order, filled up with −1.
    temperature: τ > 0.

  Returns:
    Log-probabilities, at most 0.

  References:
    DeepSeek-AI, 2025, DeepSeek-V3.2: Pushing the Frontier of Open Large
    Language Models, arXiv:2512.02556 ("keep sampling mask").
  """
  logits = _scaled(logits, temperature)
  recorded = kept >= 0
  scores = jnp.take_along_axis(logits, jnp.maximum(kept, 0), axis=-1)
  unfiltered = ~jnp.any(recorded, axis=-1)
  member = jnp.any(kept == tokens[..., None], axis=-1) | unfiltered
  # An empty set would put a NaN into the gradient of its log-sum-exp.
  shown = recorded | unfiltered[..., None]
  among = logsumexp(jnp.where(shown, scores, -jnp.inf), axis=-1)
  normalizer = jnp.where(unfiltered, logsumexp(logits, axis=-1), among)
  return jnp.where(member, _at(logits, tokens) - normalizer, -jnp.inf)


def map_time_chunks(
  fn: Callable[..., PyTree],
  unembed: Callable[[Array], Array],
  hidden: Float[Array, 'B T D'],
  *arrays: Shaped[Array, 'B T ...'],
  chunk_size: int,
) -> PyTree[Any]:
  """Maps a function of logits over chunks of time.

      out[:, t] = fn(unembed(hidden[:, t]), arrays[:, t])

  The ``[B T V]`` logits never exist, forward or backward: each chunk is
  computed again for its gradient. Only time is cut, so that a batch sharded
  over devices stays where it is and no communication is added.

  Args:
    fn: ``(logits [B C V], *array_chunks [B C ...])`` to a tree of
      ``[B C ...]``, each position for itself.
    unembed: hidden states to logits; parameters that it closes over receive
      their gradient.
    hidden: last hidden states.
    *arrays: what fn needs beside the logits (tokens, kept ids, ...).
    chunk_size: positions C per chunk, at least 1.

  Returns:
    The tree of fn with leading axes ``[B T]``.

  Raises:
    ValueError: chunk_size below 1.
  """
  if chunk_size < 1:
    raise ValueError(
      f'chunk_size is {chunk_size}; give the number of positions whose logits'
      ' may exist at once, 1 or more (512 suits most models)'
    )
  batch, length = hidden.shape[:2]
  size = -(-length // max(-(-length // chunk_size), 1))  # of equal chunks
  padding = -length % max(size, 1)

  def cut(array: Array) -> Array:
    widths = [(0, 0), (0, padding)] + [(0, 0)] * (array.ndim - 2)
    array = jnp.pad(array, widths)
    array = array.reshape(batch, -1, size, *array.shape[2:])
    return jnp.moveaxis(array, 1, 0)

  def join(array: Array) -> Array:
    array = jnp.moveaxis(array, 0, 1)
    array = array.reshape(batch, length + padding, *array.shape[3:])
    return array[:, :length]

  def chunk(inputs: tuple[Array, ...]) -> PyTree:
    return fn(unembed(inputs[0]), *inputs[1:])

  if length <= chunk_size:  # nothing to save by computing anything twice
    return chunk((hidden, *arrays))
  chunks = jax.tree.map(cut, (hidden, *arrays))
  # The scan already keeps the two computations of a chunk apart.
  policy = jax.checkpoint_policies.save_only_these_names('normalizer')
  chunk = jax.checkpoint(chunk, prevent_cse=False, policy=policy)
  return jax.tree.map(join, jax.lax.map(chunk, chunks))


def _scaled(logits: Array, temperature: Scalar) -> Array:
  # With the largest at 0, a likely token keeps its digits under large logits.
  (logits,) = promoted(logits)
  logits = logits / temperature
  largest = jnp.max(logits, axis=-1, keepdims=True)
  return logits - jax.lax.stop_gradient(largest)


@jax.custom_jvp
def _log_softmax_at(logits: Array, tokens: Array) -> Array:
  return _at(logits, tokens) - _normalizer(logits)


@_log_softmax_at.defjvp
def _log_softmax_at_jvp(primals: tuple, tangents: tuple) -> tuple:
  # Transposed this is one product, where a gather's is a scatter into zeros of
  # the size of the logits: a copy that nobody needs.
  logits, tokens = primals
  normalizer = _normalizer(logits)
  chosen = jax.nn.one_hot(tokens, logits.shape[-1], dtype=logits.dtype)
  slope = chosen - jnp.exp(logits - normalizer[..., None])
  value = _at(logits, tokens) - normalizer
  return value, jnp.sum(slope * tangents[0], axis=-1)


def _normalizer(logits: Array) -> Array:
  """log Σ exp of scaled logits, kept by `map_time_chunks`."""
  total = jnp.sum(jnp.exp(logits), axis=-1)
  return checkpoint_name(jnp.log(total), 'normalizer')


def _at(logits: Array, tokens: Array) -> Array:
  return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
