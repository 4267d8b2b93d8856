"""Sampling and training of decoders of Qwen2.5's shapes on one accelerator.

  python benchmarks/gpu.py

Random weights; bfloat16 in sampling and scoring, float32 parameters with
bfloat16 activations in training. Each model gives a table and a JSON file under
`benchmarks/results`. A phase that fails, for want of memory say, is reported
with its error, and the others go on. On a CPU it runs `--shapes=miniature`, for
a look at the program and not for its figures.

- Peaks are measured (a product, a copy) and stand beside the datasheet's.
- Decoding is a long sampling less one of a single token, over its steps. Bytes
  of a step are all weights once and the cache at its mean length.
- FLOPs of an update are 6 for each weight of a product and token, and those of
  causal attention; what is computed again for its gradient is not counted.
- Completions have full length: no token stops, so that every token computed is
  a useful one. Times are wall seconds, the least of the rounds.
- Compiling is measured with an empty cache and again with the files of the
  first time.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from benchmarks.gpu_shapes import (
  DATASHEET,
  MINIATURE,
  SHAPES,
  Sizes,
  num_params,
  shares,
  step_bytes,
  update_flops,
)
from postrain import aggregation, losses, objectives, optimizers
from postrain.models.config import Config
from postrain.models.transformer import transformer
from postrain.sampling import sample
from postrain.scoring import score
from postrain.train_step import make_train_step
from postrain.types import Batch, TrainState

RESULTS = pathlib.Path(__file__).parent / 'results'


def seconds(fn: Callable[[], Any], rounds: int) -> float:
  """Wall time, the least of the rounds after one."""
  found = []
  for _ in range(rounds + 1):
    start = time.perf_counter()
    jax.block_until_ready(fn())
    found.append(time.perf_counter() - start)
  return min(found[1:])


def compiled(lower: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
  """A program, and what it took and takes: seconds and bytes."""
  taken = []
  for _ in range(2):  # the second finds the files of the first
    jax.clear_caches()
    lowered = lower()
    start = time.perf_counter()
    program = lowered.compile()
    taken.append(time.perf_counter() - start)
  memory = program.memory_analysis()
  return program, {
    'compile_cold_s': taken[0],
    'compile_warm_s': taken[1],
    'arguments_gib': memory.argument_size_in_bytes / 2**30,
    'temporaries_gib': memory.temp_size_in_bytes / 2**30,
  }


def peaks(sizes: Sizes) -> dict[str, float]:
  """Measured peaks, and those of the datasheet where the device is known."""
  side = sizes.product
  a = jnp.ones((side, side), jnp.bfloat16)
  multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
  out = {
    'product_tflops': 2 * side**3 / seconds(lambda: multiply(a, a), 5) / 1e12,
    'copy_tbs': 2 * 16 * a.nbytes
    / seconds(functools.partial(copy, jnp.ones((16, side, side), a.dtype)), 5)
    / 1e12,
  }  # fmt: skip
  for name, (tflops, bandwidth) in DATASHEET.items():
    if name in jax.devices()[0].device_kind:
      out |= {'datasheet_tflops': tflops, 'datasheet_tbs': bandwidth}
  return out


def sampling(
  config: Config, sizes: Sizes, rates: dict[str, float]
) -> dict[str, Any]:
  """Prefill and decode with the sampler, bfloat16 throughout."""
  config = dataclasses.replace(config, dtype='bfloat16', param_dtype='bfloat16')
  model = transformer(config)
  params = jax.jit(model.init)(jax.random.key(0))
  num_prompts = sizes.batch // sizes.samples
  prompts = jnp.ones((num_prompts, sizes.prompt), jnp.int32)
  args = (params, prompts, jnp.ones(prompts.shape, bool), jax.random.key(1))

  def program(length: int) -> tuple[Any, dict[str, float]]:
    fn = functools.partial(
      sample, model, num_samples=sizes.samples, max_new_tokens=length,
      stop_ids=(), pad_id=0,
    )  # fmt: skip
    return compiled(lambda: jax.jit(fn).lower(*args))

  (one, _), (many, figures) = program(1), program(sizes.completion)
  prefill = seconds(lambda: one(*args), sizes.rounds)
  whole = seconds(lambda: many(*args), sizes.rounds)
  step = max(whole - prefill, 1e-9) / (sizes.completion - 1)
  rate = step_bytes(config, sizes) / step / 1e12
  return figures | shares('decode_of_', rate, rates, 'tbs') | {
    'batch': sizes.batch,
    'sample_s': whole,
    'prefill_tok_s': num_prompts * sizes.prompt / prefill,
    'decode_tok_s': sizes.batch / step,
    'decode_step_ms': 1e3 * step,
    'step_gb': step_bytes(config, sizes) / 1e9,
    'decode_tbs': rate,
  }  # fmt: skip


def a_batch(config: Config, sizes: Sizes) -> Batch:
  rows, length = sizes.update_batch, sizes.prompt + sizes.completion
  draw = np.random.default_rng(0)
  tokens = jnp.asarray(draw.integers(config.vocab_size, size=(rows, length)))
  mask = jnp.broadcast_to(jnp.arange(length) >= sizes.prompt, tokens.shape)
  old = jnp.full(tokens.shape, -np.log(config.vocab_size), jnp.float32)
  advantages = jnp.asarray(draw.standard_normal((rows, 1), np.float32))
  return Batch(
    tokens=tokens.astype(jnp.int32),
    valid=jnp.ones(tokens.shape, bool),
    mask=mask,
    weights={'policy': aggregation.token_mean(mask)},
    arrays={
      'old_logprobs': old,
      'advantages': jnp.where(mask, advantages, 0),
    },
  )


def scoring(config: Config, sizes: Sizes) -> dict[str, Any]:
  """Log-probs of the reference, bfloat16 throughout."""
  config = dataclasses.replace(config, dtype='bfloat16', param_dtype='bfloat16')
  model = transformer(config)
  params = jax.jit(model.init)(jax.random.key(0))
  batch = a_batch(config, sizes)
  fn = functools.partial(score, model, chunk_size=sizes.chunk)
  args = (params, batch.tokens, batch.valid, batch.mask)
  program, figures = compiled(lambda: jax.jit(fn).lower(*args))
  taken = seconds(lambda: program(*args), sizes.rounds)
  rate = batch.tokens.size / taken
  return figures | {'reference_s': taken, 'reference_tok_s': rate}


def updating(
  config: Config, sizes: Sizes, rates: dict[str, float]
) -> dict[str, Any]:
  """The train step of PPO's clip with AdamW; float32 parameters."""
  config = dataclasses.replace(
    config, dtype='bfloat16', remat='nothing_saveable'
  )
  _check_memory(config)
  model = transformer(config)
  objective = objectives.policy_gradient(
    model, loss=losses.ppo_clip, chunk_size=sizes.chunk
  )
  optimizer = optimizers.adamw(learning_rate=1e-6)
  params = {'actor': jax.jit(model.init)(jax.random.key(0))}
  opt_state = jax.jit(optimizer.init)(params)
  state = TrainState(jnp.int32(0), params, opt_state)
  batch = a_batch(config, sizes)
  step = jax.jit(make_train_step(objective, optimizer), donate_argnums=0)
  program, figures = compiled(lambda: step.lower(state, {}, batch))
  held = [state]
  del state, params, opt_state  # the step takes their memory

  def run() -> Any:
    held[0], metrics = program(held[0], {}, batch)
    return metrics

  taken = seconds(run, sizes.rounds)
  flops = update_flops(config, *batch.tokens.shape)
  rate = flops / taken / 1e12
  return figures | shares('update_of_', rate, rates, 'tflops') | {
    'rows': len(batch.tokens),
    'update_s': taken,
    'update_tok_s': batch.tokens.size / taken,
    'update_tflop': flops / 1e12,
    'update_tflops': rate,
  }  # fmt: skip


def _check_memory(config: Config) -> None:
  """Before an allocation that cannot succeed."""
  needed = 16 * num_params(config) / 2**30
  there = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
  if there is not None and needed > there / 2**30:
    raise ValueError(
      f'float32 parameters, gradients and moments take {needed:.0f} GiB, the'
      f' device has {there / 2**30:.0f}: full training does not fit'
    )


def rewarding(config: Config, sizes: Sizes) -> dict[str, float]:
  """A reward of the host on completions of this size."""
  draw = np.random.default_rng(0)
  tokens = draw.integers(
    config.vocab_size, size=(sizes.batch, sizes.completion)
  )
  return {
    'reward_s': seconds(
      lambda: [float(len(set(row.tolist()))) for row in tokens], 3
    )
  }


def guarded(phase: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """Figures of a phase, or the error that ended it."""
  try:
    found = phase()
  except Exception as error:  # out of memory has many types
    found = {'error': f'{type(error).__name__}: {error}'.splitlines()[0]}
  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use')  # of the process so far
  return found if peak is None else found | {'peak_gib': peak / 2**30}


def step_split(phases: dict[str, dict[str, Any]], sizes: Sizes) -> dict:
  """A step of ``batch`` sequences: each phase scaled to it."""
  scale = sizes.batch / sizes.update_batch
  parts = {
    'sample': phases['sampling'].get('sample_s'),
    'reward': phases['rewarding'].get('reward_s'),
    'reference': phases['scoring'].get('reference_s'),
    'update': phases['updating'].get('update_s'),
  }
  for name in ('reference', 'update'):
    if parts[name] is not None:
      parts[name] *= scale
  return parts


def measure(name: str, config: Config, sizes: Sizes) -> dict[str, Any]:
  rates = guarded(lambda: peaks(sizes))
  rates = {k: v for k, v in rates.items() if k.endswith(('tflops', 'tbs'))}
  phases = {
    'sampling': guarded(lambda: sampling(config, sizes, rates)),
    'rewarding': guarded(lambda: rewarding(config, sizes)),
    'scoring': guarded(lambda: scoring(config, sizes)),
    'updating': guarded(lambda: updating(config, sizes, rates)),
  }
  return {
    'model': name,
    'parameters': num_params(config),
    'device': jax.devices()[0].device_kind,
    'versions': {
      'python': sys.version.split()[0],
      'jax': jax.__version__,
      'jaxlib': jaxlib.__version__,
    },
    'sizes': dataclasses.asdict(sizes),
    'peaks': rates,
    **phases,
    'step_s': step_split(phases, sizes),
  }


def show(result: dict[str, Any]) -> None:
  print(f'\n{result["model"]} on {result["device"]}\n')
  print('| phase | figure | value |')
  print('| --- | --- | --- |')
  for phase, figures in result.items():
    for name, value in figures.items() if isinstance(figures, dict) else ():
      shown = f'{value:.4g}' if isinstance(value, float) else value
      print(f'| {phase} | {name} | {shown} |')


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shapes', nargs='*', help='of the models')
  parser.add_argument('--batch', type=int, default=256, help='when sampling')
  parser.add_argument('--update_batch', type=int, default=16)
  parser.add_argument('--samples', type=int, default=8, help='of each prompt')
  parser.add_argument('--prompt', type=int, default=256)
  parser.add_argument('--completion', type=int, default=512)
  parser.add_argument('--chunk', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  flags = parser.parse_args(argv)
  known = {**SHAPES, **MINIATURE}
  unknown = sorted(set(flags.shapes or ()) - set(known))
  if unknown:
    parser.error(f'no shapes {unknown}; choose of {sorted(known)}')
  if flags.batch % flags.samples:
    parser.error(
      f'--batch={flags.batch} is no multiple of --samples={flags.samples}'
    )
  names = [f.name for f in dataclasses.fields(Sizes) if f.name != 'product']
  sizes = Sizes(**{name: getattr(flags, name) for name in names})
  flags.results.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    cache = {
      'jax_compilation_cache_dir': folder,
      'jax_persistent_cache_min_compile_time_secs': 0.0,
      'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    for name, value in cache.items():
      jax.config.update(name, value)
    default = MINIATURE if jax.default_backend() == 'cpu' else SHAPES
    for name in flags.shapes or default:
      small = name in MINIATURE
      used = Sizes(4, 2, 2, 6, 5, 4, 1, product=64) if small else sizes
      result = measure(name, known[name], used)
      show(result)
      path = flags.results / f'gpu-{name}.json'
      path.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
