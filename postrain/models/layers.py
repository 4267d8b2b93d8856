"""Blocks of a dense decoder: RMSNorm, rotary attention, gated MLP.

Logical axes of parameters: ``layers``, ``vocab``, ``width`` (the residual
stream), ``heads``, ``kv_heads``, ``head_dim``, ``mlp``; of activations:
``batch``, ``time``, ``embed``, ``heads``, ``kv_heads``, ``head_dim``, ``mlp``.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain.models.config import Config


class Context(NamedTuple):
  """What all layers share.

  ``visible[b, n, s]`` tells whether new token ``n`` sees slot ``s``, where the
  slots are those of the past, level by level, and then the new tokens.
  """

  cos: Float[Array, 'B N 1 half']
  sin: Float[Array, 'B N 1 half']
  visible: Bool[Array, 'B N S']


class Level(NamedTuple):
  """Keys and values of ``P`` sequences, each shared by ``B // P`` rows."""

  keys: Float[Array, 'P K S d']
  values: Float[Array, 'P K S d']


def widened(dtype: Any) -> Any:
  """At least float32: the precision of sums."""
  return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
  """Scale by the root mean square: x / sqrt(mean(x²) + eps) * scale.

  References:
    Zhang and Sennrich, 2019, Root Mean Square Layer Normalization,
    arXiv:1910.07467
  """
  wide = x.astype(widened(x.dtype))
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normed = (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
  return normed * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


def rotation(
  positions: Int[Array, 'B N'], *, head_dim: int, theta: float, dtype: Any
) -> tuple[Float[Array, 'B N 1 half'], Float[Array, 'B N 1 half']]:
  """Cosine and sine of the angles position * theta^(-2i / head_dim).

  References:
    Su et al., 2021, RoFormer, arXiv:2104.09864
  """
  dtype = widened(dtype)
  exponents = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
  frequencies = jnp.asarray(theta, dtype) ** -exponents
  angles = jnp.einsum('bn,i->bni', positions.astype(dtype), frequencies)
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(
  x: Float[Array, 'B N H d'],
  cos: Float[Array, 'B N 1 half'],
  sin: Float[Array, 'B N 1 half'],
) -> Float[Array, 'B N H d']:
  """Turn the pairs (x[i], x[i + d/2]), the layout of Hugging Face weights."""
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attention(
  query: Float[Array, 'B N H d'],
  levels: Sequence[Level],
  visible: Bool[Array, 'B N S'],
) -> Float[Array, 'B N H d']:
  """Attend over levels of shared keys with one softmax over all their slots.

  softmax(q·kᵀ / sqrt(d)) v. A level of ``P`` sequences is read where it lies:
  its keys are multiplied with the queries of all rows that share them, so that
  the cache of a prompt is never copied to its samples.
  """
  batch, num_new, num_heads, head_dim = query.shape
  wide = widened(query.dtype)

  def scores(level: Level) -> Array:
    num_rows, num_kv, num_slots, _ = level.keys.shape
    grouped = query.reshape(num_rows, -1, num_new, num_kv,
                            num_heads // num_kv, head_dim)  # fmt: skip
    out = jnp.einsum('pgnkrd,pksd->pgkrns', grouped, level.keys,
                     preferred_element_type=wide)  # fmt: skip
    return out.reshape(batch, num_heads, num_new, num_slots)

  def mix(weights: Array, level: Level) -> Array:
    num_rows, num_kv, num_slots, _ = level.values.shape
    grouped = weights.reshape(num_rows, -1, num_kv, num_heads // num_kv,
                              num_new, num_slots)  # fmt: skip
    out = jnp.einsum('pgkrns,pksd->pgnkrd', grouped, level.values,
                     preferred_element_type=wide)  # fmt: skip
    return out.reshape(query.shape)

  logits = jnp.concatenate([scores(level) for level in levels], axis=-1)
  logits = jnp.where(visible[:, None], logits * head_dim**-0.5, -jnp.inf)
  weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  start, out = 0, jnp.zeros(query.shape, wide)
  for level in levels:
    end = start + level.keys.shape[2]
    out += mix(weights[..., start:end], level)
    start = end
  return out.astype(query.dtype)


def whole_attention(
  query: Float[Array, 'B N H d'],
  key: Float[Array, 'B N K d'],
  value: Float[Array, 'B N K d'],
  visible: Bool[Array, 'B N N'],
) -> Float[Array, 'B N H d']:
  """Attend within whole sequences, in `jax.nn.dot_product_attention`."""
  if query.dtype == jnp.float64:  # its softmax is in float32 whatever comes in
    level = Level(key.swapaxes(1, 2), value.swapaxes(1, 2))
    return attention(query, (level,), visible)
  with jax.numpy_dtype_promotion('standard'):  # it mixes types inside
    return jax.nn.dot_product_attention(
      query, key, value, mask=visible[:, None]
    )


def used(param: Any, axes: tuple[str, ...], dtype: Any) -> Array:
  """A parameter as a layer multiplies it: whole along the residual stream.

  Without this the partitioner of a sharded ``width`` moves activations around
  instead of gathering the parameter.
  """
  axes = tuple('embed' if axis == 'width' else axis for axis in axes)
  return with_logical_constraint(jnp.asarray(param, dtype), axes)


def product(x: Array, kernel: Array, *, num_inputs: int = 1) -> Array:
  """Sum over the last ``num_inputs`` axes of x and the first of the kernel.

  Batch and time are merged for it: the gradient of a kernel that sums over two
  axes takes three times as long on XLA's CPU backend.
  """
  lead, outputs = x.shape[:-num_inputs], kernel.shape[num_inputs:]
  size = math.prod(outputs)
  out = x.reshape(-1, kernel.size // size) @ kernel.reshape(-1, size)
  return out.reshape(*lead, *outputs)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  config: Config

  def weight(
    self, name: str, shape: tuple[int, ...], axes: tuple[str, ...],
    init: Any = None, num_inputs: int = 1, scale: float = 1.0,
  ) -> Array:  # fmt: skip
    """A parameter in the compute dtype; variance scale² / inputs."""
    config = self.config
    if init is None:
      fan_in = 1
      for size in shape[:num_inputs]:
        fan_in *= size
      init = nn.initializers.normal(scale * fan_in**-0.5)
    boxed = nn.with_logical_partitioning(init, axes)
    return used(self.param(name, boxed, shape, config.param_dtype), axes,
                config.dtype)  # fmt: skip

  def norm(self, name: str, x: Array, axis: str) -> Array:
    """RMSNorm of the last axis with a scale of this name."""
    scale = self.weight(name, x.shape[-1:], (axis,), nn.initializers.ones)
    return rms_norm(x, scale, eps=self.config.norm_eps)

  def heads(self, name: str, x: Array, num: int, axis: str) -> Array:
    """Project to heads, with the bias where the family has one."""
    c = self.config
    kernel = self.weight(
      name, (c.model_dim, num, c.head_dim), ('width', axis, 'head_dim')
    )
    out = product(x, kernel)
    if c.qkv_bias:
      bias = self.weight(
        f'{name}_bias', (num, c.head_dim), (axis, 'head_dim'),
        nn.initializers.zeros,
      )  # fmt: skip
      out += jnp.broadcast_to(bias, out.shape)
    return with_logical_constraint(out, ('batch', 'time', axis, 'head_dim'))

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B N D'],
    context: Context,
    past: tuple[Level, ...] | None,
    keep: bool,
  ) -> tuple[Float[Array, 'B N D'], Level | None]:
    """Returns the new activations and, if ``keep``, the new keys and values."""
    c = self.config
    residual = (2 * c.num_layers) ** -0.5  # the stream's variance stays near 1
    h = self.norm('attention_norm', x, 'width')
    query = self.heads('query', h, c.num_heads, 'heads')
    key = self.heads('key', h, c.num_kv_heads, 'kv_heads')
    value = self.heads('value', h, c.num_kv_heads, 'kv_heads')
    if c.qk_norm:
      query = self.norm('query_norm', query, 'head_dim')
      key = self.norm('key_norm', key, 'head_dim')
    query = rotate(query, context.cos, context.sin)
    key = rotate(key, context.cos, context.sin)
    new = None
    if keep:
      new = Level(key.swapaxes(1, 2), value.swapaxes(1, 2))
    if past and new is not None:
      h = attention(query, (*past, new), context.visible)
    else:
      h = whole_attention(query, key, value, context.visible)
    output = self.weight(
      'output', (c.num_heads, c.head_dim, c.model_dim),
      ('heads', 'head_dim', 'width'), num_inputs=2, scale=residual,
    )  # fmt: skip
    x += product(h, output, num_inputs=2)

    h = self.norm('mlp_norm', x, 'width')
    wide, axes = (c.model_dim, c.mlp_dim), ('width', 'mlp')
    gate = product(h, self.weight('gate', wide, axes))
    up = product(h, self.weight('up', wide, axes))
    h = with_logical_constraint(
      jax.nn.silu(gate) * up, ('batch', 'time', 'mlp')
    )
    down = self.weight('down', wide[::-1], axes[::-1], scale=residual)
    x += product(h, down)
    return with_logical_constraint(x, ('batch', 'time', 'embed')), new
