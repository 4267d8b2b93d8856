"""Shapes of `benchmarks/gpu.py`, and what a device does for them on paper."""

import dataclasses
from typing import Any

import jax

from postrain.models.config import Config
from postrain.models.transformer import transformer

# Dense bfloat16 TFLOP/s, and TB/s, by the datasheet.
DATASHEET = {'H100': (989, 3.35), 'H200': (989, 4.8), 'A100': (312, 2.04)}


def shape(
  layers: int, width: int, inner: int, heads: int, kv: int, **more: Any
):
  return Config(
    num_layers=layers, model_dim=width, mlp_dim=inner, num_heads=heads,
    num_kv_heads=kv, head_dim=width // heads, qkv_bias=True, rope_theta=1e6,
    **{'vocab_size': 151_936, 'max_length': 32_768, **more},
  )  # fmt: skip


SHAPES = {
  'qwen2.5-0.5b': shape(24, 896, 4864, 14, 2),
  'qwen2.5-1.5b': shape(28, 1536, 8960, 12, 2),
  'qwen2.5-7b': shape(
    28, 3584, 18_944, 28, 4, vocab_size=152_064, tie_embeddings=False
  ),
}
MINIATURE = {'miniature': shape(2, 32, 64, 4, 2, vocab_size=64, max_length=64)}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of one measurement; ``product`` is the side of the peak's matrices."""

  batch: int
  update_batch: int
  samples: int
  prompt: int
  completion: int
  chunk: int
  rounds: int
  product: int = 8192


def num_params(config: Config) -> int:
  shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
  return sum(x.size for x in jax.tree.leaves(shapes))


def update_flops(config: Config, rows: int, length: int) -> float:
  """Of forward and backward: products of weights, causal attention."""
  weights = num_params(config)
  if not config.tie_embeddings:
    weights -= config.vocab_size * config.model_dim  # a row is looked up
  attention = config.num_layers * config.num_heads * config.head_dim * length
  return 6.0 * rows * length * (weights + attention)


def step_bytes(config: Config, sizes: Sizes) -> float:
  """Read by a decode step: weights, and the cache at its mean length."""
  weights = num_params(config)
  if not config.tie_embeddings:
    weights -= config.vocab_size * config.model_dim
  token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
  length = sizes.prompt + sizes.completion / 2
  return 2.0 * (weights + sizes.batch * length * token)


def shares(
  name: str, found: float, rates: dict[str, float], unit: str
) -> dict[str, float]:
  """Of the measured and of the datasheet's peak, in percent."""
  return {
    f'{name}{k}_percent': 100 * found / rates[k]
    for k in rates if k.endswith(unit)
  }  # fmt: skip
