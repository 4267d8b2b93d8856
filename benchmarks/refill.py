"""Slots that are refilled beside the plain loop, for completions that end.

  python benchmarks/refill.py --prompts=64

A random model, float32, whose every 1 / mean-th token is a stop token, so that
lengths are geometric with a mean of a quarter of the limit. The plain loop
samples all sequences at once, also with a cache that grows through four sizes,
or as many as there are slots at a time; each lasts until its longest sequence
ends. All sides give the same tokens before
they are timed. One thread, process CPU seconds, sides in turn, least of the
repeats; the ratio is that to the better plain side.
"""

import argparse
import os
import sys
import time

# Read when the libraries are loaded.
os.environ['OMP_NUM_THREADS'] = os.environ['NPROC'] = '1'
sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import jax.numpy as jnp
import numpy as np

from postrain.compilation import make_jit
from postrain.models.config import Config
from postrain.models.transformer import transformer
from postrain.sampling import sample, sample_in_slots

# Config, tokens of a prompt, limit of a completion.
SHAPES = {
  'tiny': (
    Config(
      vocab_size=64, num_layers=4, model_dim=128, mlp_dim=512, num_heads=4,
      num_kv_heads=4, head_dim=32, qkv_bias=True, tie_embeddings=True,
      max_length=512,
    ), 16, 32,
  ),
  'small': (
    Config(
      vocab_size=4096, num_layers=8, model_dim=512, mlp_dim=1408, num_heads=8,
      num_kv_heads=4, head_dim=64, qkv_bias=True, tie_embeddings=True,
      max_length=512,
    ), 64, 128,
  ),
}  # fmt: skip


def sides(shape: str, num_prompts: int, num_samples: int, num_slots: int,
          num_halvings: int) -> dict:  # fmt: skip
  """Functions of no arguments that sample the same completions."""
  config, prompt_length, limit = SHAPES[shape]
  model = transformer(config)
  params = jax.jit(model.init)(jax.random.key(0))
  prompts = jax.random.randint(
    jax.random.key(1), (num_prompts, prompt_length), 1, config.vocab_size
  )
  options = dict(
    num_samples=num_samples, max_new_tokens=limit, pad_id=0,
    stop_ids=tuple(range(config.vocab_size * 4 // limit)),
  )  # fmt: skip

  def jitted(fn, **more):
    def run(params, prompts, prompt_ids):
      return fn(
        model, params, prompts, jnp.ones_like(prompts, bool),
        jax.random.key(2), prompt_ids=prompt_ids, **options, **more,
      )  # fmt: skip

    return make_jit()(run)

  plain, growing = jitted(sample), jitted(sample, num_cache_sizes=4)
  slots = jitted(
    sample_in_slots, num_slots=num_slots, num_halvings=num_halvings
  )
  ids = jnp.arange(num_prompts)
  size = max(num_slots // num_samples, 1)

  def in_batches():
    parts = [
      plain(params, prompts[i : i + size], ids[i : i + size])
      for i in range(0, num_prompts, size)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)

  found = {'slots': lambda: slots(params, prompts, ids)}
  found['plain, all at once'] = lambda: plain(params, prompts, ids)
  found['plain, growing cache'] = lambda: growing(params, prompts, ids)
  if size < num_prompts:
    found[f'plain, {size * num_samples} at a time'] = in_batches
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shape', choices=SHAPES, default='small')
  parser.add_argument('--prompts', type=int, default=8)
  parser.add_argument('--samples', type=int, default=8)
  parser.add_argument('--slots', type=int, default=64)
  parser.add_argument('--halvings', type=int, default=3)
  parser.add_argument('--repeats', type=int, default=3)
  args = parser.parse_args()
  runs = sides(
    args.shape, args.prompts, args.samples, args.slots, args.halvings
  )
  first = {name: jax.device_get(run()) for name, run in runs.items()}
  slots = first['slots']
  for name, other in first.items():
    same = (other.tokens == slots.tokens).all(1).mean()
    if same < 0.99:  # all but sequences with a tie within rounding
      raise ValueError(f'{name}: {same:.1%} of the sequences are the same')
  times = {name: [] for name in runs}
  for _ in range(args.repeats):
    for name, run in runs.items():
      start = time.process_time()
      jax.block_until_ready(run())
      times[name].append(time.process_time() - start)
  best = {name: min(found) for name, found in times.items()}
  plain = min(seconds for name, seconds in best.items() if name != 'slots')
  lengths = slots.mask.sum(1)
  print(
    f'{args.shape}, {args.prompts} x {args.samples} sequences, {args.slots}'
    f' slots, {args.halvings} halvings; tokens: {lengths.mean():.1f} on'
    f' average, {slots.truncated.mean():.1%} cut\n'
  )
  print(
    '| side | CPU s | tokens / s | times slots |\n| --- | --- | --- | --- |'
  )
  for name, seconds in best.items():
    print(
      f'| {name} | {seconds:.2f} | {lengths.sum() / seconds:.0f} |'
      f' {seconds / best["slots"]:.2f} |'
    )
  print(f'\nslots: x {plain / best["slots"]:.2f} of the better plain loop')


if __name__ == '__main__':
  main()
