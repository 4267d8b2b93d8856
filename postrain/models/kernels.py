"""Fused attention within whole sequences: which kernel, and how it is called.

No [T, T] array ever exists in these, and blocks that no token sees are skipped.
They know causal rows and windows; what reads a cache or a shared prompt, and
what they lack, is `postrain.models.attention`.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from postrain import sharding
from postrain.models.config import Config

WHOLE = 'rows that lie on one device each, so mesh.context=1'
LANES = 128  # slots of a splash block are a multiple of them


def accelerator() -> tuple[str, float]:
  """What programs are lowered for, and the compute capability of 'cuda'."""
  backend = sharding.platform()
  device: Any = jax.devices()[0]
  if backend == 'gpu' and 'cuda' in device.client.platform_version:
    return 'cuda', float(device.compute_capability)
  return backend, 0.0


def kernel(config: Config) -> str:
  """The implementation for whole sequences: 'xla', 'cudnn' or 'splash'.

  'auto' takes what the accelerator has, and 'xla' where that cannot be.

  Raises:
    ValueError: another choice cannot be met; says why.
  """
  name = config.attention
  if name == 'auto':
    own = {'cuda': 'cudnn', 'tpu': 'splash'}.get(accelerator()[0], 'xla')
    return 'xla' if obstacles(config, own) else own
  if found := obstacles(config, name):
    raise ValueError(
      f'attention={name!r} needs {", and ".join(found)}: change that, or take'
      " attention='auto', which chooses among what there is"
    )
  return name


def obstacles(config: Config, name: str) -> list[str]:
  """What a kernel needs and does not find, in a model or here."""
  platform, capability = accelerator()
  card = f'{platform} {capability}' if capability else platform
  whole = sharding.num_parts() == 1
  dim, cap, dtype = config.head_dim, config.attention_soft_cap, config.dtype
  widest = 256 if capability >= 9 else 128
  needs = {
    'xla': {},
    'cudnn': {
      f'an NVIDIA GPU from Ampere on, not {card}': capability >= 8,
      f'bfloat16 or float16, not dtype={dtype!r}': dtype.endswith('16'),
      f'heads of a multiple of 8, at most {widest}, not head_dim={dim}': (
        dim <= widest and dim % 8 == 0
      ),
      f'plain logits, not attention_soft_cap={cap}': cap is None,
      WHOLE: whole,
    },
    'splash': {
      f'a TPU, not {card}': platform == 'tpu',
      f'bfloat16 or float32, not dtype={dtype!r}': (
        dtype in ('bfloat16', 'float32')
      ),
      f'heads of a multiple of 64, not head_dim={dim}': dim % 64 == 0,
      WHOLE: whole,
    },
  }
  return [need for need, met in needs[name].items() if not met]


def fused_attention(
  name: str,
  query: Float[Array, 'B T H d'],
  key: Float[Array, 'B T K d'],
  value: Float[Array, 'B T K d'],
  segment_ids: Int[Array, 'B T'],
  *,
  scale: float,
  window: int | None = None,
  soft_cap: float | None = None,
) -> Float[Array, 'B T H d']:
  """Attend within whole sequences in the kernel of this name.

  A token sees those at and before its slot that carry its segment id. Heads
  and rows are cut over the devices as they lie.

  Args:
    name: 'cudnn' or 'splash'.
    query: of all tokens.
    key: likewise; each head serves ``H // K`` query heads.
    value: likewise.
    segment_ids: 0 on padding.
    scale: multiplies q·k.
    window: tokens that a token sees, itself included; None for all. A segment
      stands in one piece.
    soft_cap: c·tanh(x/c) of the logits; 'splash' alone knows it.

  References:
    Dao, 2023, FlashAttention-2: Faster Attention with Better Parallelism and
    Work Partitioning, arXiv:2307.08691.
  """
  num_kv = key.shape[2]
  if name == 'cudnn':
    fn: Callable[..., Array] = cudnn_attention
  else:
    fn = functools.partial(
      splash_attention, soft_cap=soft_cap,
      interpret=sharding.platform() == 'cpu',
    )  # fmt: skip

  def part(query: Array, *others: Array) -> Array:
    flat = query.reshape(*query.shape[:2], -1, query.shape[-1])
    return fn(flat, *others, scale=scale, window=window).reshape(query.shape)

  # Cut by heads of keys: query heads must lie where theirs does.
  heads = ('batch', 'time', 'kv_heads', 'head_dim')
  grouped = query.reshape(*query.shape[:2], num_kv, -1, query.shape[-1])
  return sharding.sum_over_shards(
    part,
    (grouped, key, value, segment_ids),
    ((*heads[:3], None, heads[3]), heads, heads, heads[:2]),
    check_vma=False,  # kernels do not say how their outputs vary
  ).reshape(query.shape)


def cudnn_attention(
  query: Float[Array, 'B T H d'],
  key: Float[Array, 'B T K d'],
  value: Float[Array, 'B T K d'],
  segment_ids: Int[Array, 'B T'],
  *,
  scale: float,
  window: int | None = None,
) -> Float[Array, 'B T H d']:
  """Flash attention of cuDNN, over rows of one sequence each.

  It knows a length for each row, so that real tokens are moved to the front of
  their row and back. A mask would be a [B, 1, T, T] bias with a gradient of its
  own. Rows of several segments give NaN, never a neighbour; padding gives 0.
  """
  batch, length = segment_ids.shape
  real = segment_ids != 0
  slots = jnp.arange(length, dtype=jnp.int32)
  behind = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
  rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
  # Each its own place, those of padding outside: unique, so no atomic adds.
  places = rows, jnp.where(real, behind, length + slots)

  def in_front(x: Array) -> Array:
    put = jnp.zeros_like(x).at[places]
    return put.set(x, mode='drop', unique_indices=True)

  lengths = jnp.maximum(behind[:, -1] + 1, 1)  # a softmax over nothing is NaN
  out = jax.nn.dot_product_attention(
    in_front(query),
    in_front(key),
    in_front(value),
    scale=scale,
    is_causal=True,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    local_window_size=None if window is None else (window - 1, 0),
    implementation='cudnn',
  )
  out = out.at[places].get(mode='fill', fill_value=0, unique_indices=True)
  single = jnp.all(~real | (segment_ids == segment_ids.max(1, keepdims=True)))
  return jnp.where(single, out, jnp.nan)


def splash_attention(
  query: Float[Array, 'B T H d'],
  key: Float[Array, 'B T K d'],
  value: Float[Array, 'B T K d'],
  segment_ids: Int[Array, 'B T'],
  *,
  scale: float,
  window: int | None = None,
  soft_cap: float | None = None,
  interpret: bool = False,
) -> Float[Array, 'B T H d']:
  """Splash attention of JAX, a Pallas kernel for TPUs, over packed rows too.

  Rows are filled up to a multiple of its blocks. Padding sees padding.
  """
  # Pallas takes a while to load, and only this needs it.
  from jax.experimental.pallas.ops.tpu import splash_attention

  splash: Any = splash_attention
  length, num_heads = query.shape[1:3]
  slots = math.ceil(length / LANES) * LANES
  block = math.gcd(slots, 4 * LANES)
  mask: Any = splash.CausalMask((slots, slots))
  if window is not None:
    mask = splash.LocalMask((slots, slots), (window - 1, 0), 0)
  parts = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute',
           'q_dq', 'kv_dq')  # fmt: skip
  attend = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * num_heads),
    block_sizes=splash.BlockSizes(**{f'block_{name}': block for name in parts}),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=soft_cap,
    interpret=interpret,
  )

  def heads_first(x: Array) -> Array:
    x = jnp.pad(x, ((0, 0), (0, slots - length), (0, 0), (0, 0)))
    return x.swapaxes(1, 2)

  ids = jnp.pad(segment_ids, ((0, 0), (0, slots - length)))
  # Scaled in float32: in bfloat16 the scale itself would be rounded.
  scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
  out = jax.vmap(attend)(
    *map(heads_first, (scaled, key, value)), splash.SegmentIds(ids, ids)
  )
  return out.swapaxes(1, 2)[:, :length]
