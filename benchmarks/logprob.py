"""Temporaries and time of the gradient of log-probs, whole and in chunks.

  python benchmarks/logprob.py

2048 tokens as [8, 256], hidden states of 512, 32,768 words, float32. 'Whole' is
log-sum-exp and gather on all logits; the chunks are those of `map_time_chunks`,
with `token_logprobs` and, as the objectives use it, `token_entropy` without a
gradient. All must agree with the first, value and gradients, to 2e-6 of its
largest entry.

Temporaries are XLA's own figure of the program; the gradient of the head, 64
MiB that every way makes, is taken off. Times are CPU seconds on one thread, the
least of the turns that the sides take.
"""

import argparse
import functools
import os
import sys
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import least, one_thread
from postrain.logprobs import map_time_chunks, token_entropy, token_logprobs

SHAPE = (8, 256, 512, 32_768)
MIB = 2**20


def whole(logits: Any, tokens: Any, entropy: bool) -> tuple[Any, Any]:
  total = jax.nn.logsumexp(logits, axis=-1)
  at = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  if not entropy:
    return at - total, total
  logp = jax.lax.stop_gradient(logits - total[..., None])
  return at - total, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def chunked(logits: Any, tokens: Any, entropy: bool) -> tuple[Any, Any]:
  chosen = token_logprobs(logits, tokens)
  fixed = jax.lax.stop_gradient(logits)
  return chosen, token_entropy(fixed) if entropy else chosen


def program(chunk_size: int | None, entropy: bool, shape: tuple = SHAPE) -> Any:
  """The compiled (head, hidden, tokens, weights) -> values and gradients."""
  batch, length, width, vocab = shape

  def loss(head: Any, hidden: Any, tokens: Any, weights: Any) -> Any:
    unembed = functools.partial(jnp.einsum, 'vd,btd->btv', head)
    if chunk_size is None:
      logp, extra = whole(unembed(hidden), tokens, entropy)
    else:
      fn = functools.partial(chunked, entropy=entropy)
      logp, extra = map_time_chunks(
        fn, unembed, hidden, tokens, chunk_size=chunk_size
      )
    return jnp.sum(weights * logp), jnp.sum(extra) if entropy else ()

  tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  fn = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  return fn.lower(
    of(vocab, width), of(batch, length, width), tokens, of(batch, length)
  ).compile()


def temporaries(compiled: Any, shape: tuple = SHAPE) -> float:
  """MiB beside arguments and results, without the gradient of the head."""
  head = 4 * shape[-2] * shape[-1]
  return (compiled.memory_analysis().temp_size_in_bytes - head) / MIB


def arguments(shape: tuple = SHAPE) -> tuple:
  batch, length, width, vocab = shape
  draw = np.random.default_rng(0)
  normal = functools.partial(draw.standard_normal, dtype=np.float32)
  return jax.device_put((
    normal((vocab, width)) / np.float32(np.sqrt(width)),
    normal((batch, length, width)),
    draw.integers(vocab, size=(batch, length), dtype=np.int32),
    normal((batch, length)),
  ))  # fmt: skip


def gap(found: Any, wanted: Any) -> float:
  """The largest difference, over the largest entry of each array."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
  return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--chunks', type=int, nargs='*', default=[128, 32, 16, 8])
  flags = parser.parse_args()
  one_thread()
  args = arguments()
  for entropy in (False, True):
    programs = {c: program(c, entropy) for c in (None, *flags.chunks)}
    wanted = programs[None](*args)
    gaps = {c: gap(run(*args), wanted) for c, run in programs.items()}
    if not max(gaps.values()) <= 2e-6:
      raise ValueError(f'gradients differ, by chunk: {gaps}')
    sides = {c: functools.partial(p, *args) for c, p in programs.items()}
    times = least(sides, flags.rounds)
    full = temporaries(programs[None])
    print(f'\nwith{"" if entropy else "out"} entropy\n')
    print('| positions of a chunk | temporaries | of whole | time | gap |')
    print('|' + ' --- |' * 5)
    for chunk, compiled in programs.items():
      size = temporaries(compiled)
      print(
        f'| {chunk or "whole"} | {size:.1f} MiB | {100 * size / full:.1f} % |'
        f' x {times[chunk] / times[None]:.2f} | {gaps[chunk]:.0e} |'
      )


if __name__ == '__main__':
  main()
