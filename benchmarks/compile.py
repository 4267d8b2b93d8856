"""Time to compile a deep decoder beside a shallow one.

  python benchmarks/compile.py

Value and gradient of the likelihood of [2, 64] tokens, models 64 wide. With
layers in a scan the program does not grow with their number; unrolled it does.
The sides take turns; times are medians of the compiler alone, without tracing
and without its caches.
"""

import argparse
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp

from postrain.logprobs import token_logprobs
from postrain.models.config import Config
from postrain.models.transformer import transformer

SHAPE = dict(
  vocab_size=256, model_dim=64, mlp_dim=160, num_heads=4, num_kv_heads=2,
  head_dim=16,
)  # fmt: skip


def compile_time(num_layers: int, scan_layers: bool) -> tuple[float, float]:
  """Seconds to trace and lower, and to compile."""
  config = Config(num_layers=num_layers, scan_layers=scan_layers, **SHAPE)
  model = transformer(config)
  tokens = jnp.zeros((2, 64), jnp.int32)

  def loss(params, tokens):
    places = jnp.broadcast_to(jnp.arange(64), tokens.shape)
    hidden, _ = model.hidden(
      params, tokens, positions=places, segment_ids=jnp.ones_like(tokens)
    )
    return -token_logprobs(model.unembed(params, hidden), tokens).sum()

  params = jax.eval_shape(model.init, jax.random.key(0))
  jax.clear_caches()
  start = time.perf_counter()
  lowered = jax.jit(jax.value_and_grad(loss)).lower(params, tokens)
  middle = time.perf_counter()
  lowered.compile()
  return middle - start, time.perf_counter() - middle


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=3)
  rounds = parser.parse_args().rounds
  jax.config.update('jax_enable_compilation_cache', False)
  sides = [(4, True), (32, True), (4, False), (32, False)]
  times = {side: [] for side in sides}
  for _ in range(rounds):
    for side in sides:
      times[side].append(compile_time(*side))
  print('| layers | form | trace | compile | both, times 4 scanned |')
  print('| --- | --- | --- | --- | --- |')
  base = None
  for (layers, scan), found in times.items():
    trace, compiled = (
      statistics.median(column) for column in zip(*found, strict=True)
    )
    base = base or trace + compiled
    form = 'scanned' if scan else 'unrolled'
    print(
      f'| {layers} | {form} | {trace:.2f} s | {compiled:.2f} s |'
      f' x {(trace + compiled) / base:.2f} |'
    )


if __name__ == '__main__':
  main()
