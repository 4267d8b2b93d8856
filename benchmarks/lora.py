"""Time and memory of a gradient, of all weights and of adapters.

  python benchmarks/lora.py

A decoder of 8 layers, 512 wide, in float32, on 4 sequences of 64 tokens.
'Beside' is x W + (x A) B, 'merged' a gradient through W + A B. The programs
take turns; times are medians. Beside its parameters a program holds what it
gives back (the gradients) and the memory to work in.
"""

import argparse
from collections.abc import Callable
import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp
import numpy as np

from postrain.adapted import bases, rejoined, trainable
from postrain.models.lora import LoRA, lora, merged
from postrain.models.transformer import Config, transformer
from postrain.quantization import quantized
from postrain.types import Model

SPEC = LoRA(
  rank=8, alpha=16, targets='layers/(query|key|value|output|gate|up|down)'
)


def config(quick: bool, remat: str | None) -> Config:
  """A decoder whose layers weigh 128 MiB, or 1."""
  width = 64 if quick else 512
  return Config(
    vocab_size=64, num_layers=4 if quick else 8, model_dim=width,
    mlp_dim=4 * width, num_heads=8, num_kv_heads=8, head_dim=width // 8,
    max_length=64, remat=remat,
  )  # fmt: skip


def loss(model: Model, tokens: Any) -> Callable[[Any], Any]:
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

  def fn(params: Any) -> Any:
    hidden, _ = model.hidden(
      params, tokens, positions=positions, segment_ids=jnp.ones_like(tokens)
    )
    return jnp.mean(jnp.square(model.unembed(params, hidden)))

  return fn


def programs(base: Model, tokens: Any) -> dict[str, tuple[Callable, Any]]:
  """Name -> a loss of parameters, and parameters."""
  key = jax.random.key(0)
  adapted = lora(base, SPEC)
  params = jax.jit(adapted.init)(key)
  out = {
    'all weights': (loss(base, tokens), params.base),
    'LoRA, beside': (loss(adapted, tokens), params),
    'LoRA, merged': (lambda p: loss(base, tokens)(merged(p, SPEC)), params),
  }
  for qtype in ('int8', 'nf4'):
    model = lora(quantized(base, qtype), SPEC)
    out[f'LoRA on {qtype}'] = (loss(model, tokens), jax.jit(model.init)(key))
  return out


def gradient(fn: Callable, params: Any) -> tuple[Any, tuple]:
  """The compiled gradient of what is trained, and its arguments."""
  args = trainable(params), bases(params)
  program = jax.jit(jax.grad(lambda t, f: fn(rejoined(t, f))))
  return program.lower(*args).compile(), args


def mebibytes(tree: Any) -> float:
  """Of arrays; two of 4 bits share a byte."""
  sizes = [
    x.size * (0.5 if x.dtype == jnp.uint4 else x.dtype.itemsize)
    for x in jax.tree.leaves(tree)
  ]
  return sum(sizes) / 2**20


def medians(runs: list[tuple[Any, tuple]], rounds: int) -> list[float]:
  times: list[list[float]] = [[] for _ in runs]
  for _ in range(rounds + 1):
    for (program, args), taken in zip(runs, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(program(*args))
      taken.append(time.perf_counter() - start)
  return [1e3 * float(np.median(t[1:])) for t in times]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--quick', action='store_true', help='small and few')
  flags = parser.parse_args()
  print('| gradient of | parameters | gradients | memory | time |')
  print('|' + ' --- |' * 5)
  tokens = jnp.ones((4, 16 if flags.quick else 64), jnp.int32)
  for remat in (None, 'nothing_saveable'):
    base = transformer(config(flags.quick, remat))
    named = programs(base, tokens)
    runs = [gradient(*parts) for parts in named.values()]
    times = medians(runs, 1 if flags.quick else 5)
    for name, (run, args), taken in zip(named, runs, times, strict=True):
      memory = run.memory_analysis().temp_size_in_bytes / 2**20
      where = name if remat is None else f'{name}; remat'
      print(
        f'| {where} | {mebibytes(args):.1f} MiB | {mebibytes(args[0]):.1f} MiB'
        f' | {memory:.1f} MiB | {taken:.0f} ms |',
        flush=True,
      )


if __name__ == '__main__':
  main()
