"""Blocks of a decoder: norms, rotary attention, MLP or experts.

Logical axes of parameters: ``layers``, ``vocab``, ``width`` (the residual
stream), ``heads``, ``kv_heads``, ``head_dim``, ``mlp``, ``experts``; of
activations: ``batch``, ``time``, ``embed``, ``heads``, ``kv_heads``,
``head_dim``, ``mlp``.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from postrain.models import moe
from postrain.models.config import Config


class View(NamedTuple):
  """Where a kind of layer looks, and how it turns queries and keys.

  ``visible[b, n, s]`` tells whether new token ``n`` sees slot ``s``, where the
  slots are those of the past, level by level, and then the new tokens. The
  views of several kinds of layers are stacked on a leading axis.
  """

  cos: Float[Array, '*K B N 1 half']
  sin: Float[Array, '*K B N 1 half']
  visible: Bool[Array, '*K B N S']


class Level(NamedTuple):
  """Keys and values of ``P`` sequences, each shared by ``B // P`` rows."""

  keys: Float[Array, 'P K S d']
  values: Float[Array, 'P K S d']


def widened(dtype: Any) -> Any:
  """At least float32: the precision of sums."""
  return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def rms_norm(x: Array, scale: Array, *, eps: float, kind: str = 'rms') -> Array:
  """Scale by the root mean square: x / sqrt(mean(x²) + eps) * scale.

  The families differ in the last step: 'rms' multiplies in the precision of
  ``x``, 'rms_wide' before rounding to it, 'rms_one_plus' also, by 1 + scale.

  References:
    Zhang and Sennrich, 2019, Root Mean Square Layer Normalization,
    arXiv:1910.07467
  """
  wide = x.astype(widened(x.dtype))
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean_square + eps)
  if kind == 'rms':
    normed = normed.astype(x.dtype)
  scale = scale.astype(normed.dtype)
  if kind == 'rms_one_plus':
    scale = 1 + scale
  return (normed * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float) -> Array:
  """(x - mean) / sqrt(variance + eps) * scale + bias.

  References:
    Ba et al., 2016, Layer Normalization, arXiv:1607.06450
  """
  wide = x.astype(widened(x.dtype))
  centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
  normed = centered * jax.lax.rsqrt(variance + eps)
  scale, bias = (
    jnp.broadcast_to(v.astype(wide.dtype), x.shape) for v in (scale, bias)
  )
  return (normed * scale + bias).astype(x.dtype)


def rotation(
  positions: Int[Array, 'B N'],
  frequencies: Float[Array, ' half'],
  scale: float = 1.0,
) -> tuple[Float[Array, 'B N 1 half'], Float[Array, 'B N 1 half']]:
  """Cosine and sine of the angles position * frequency."""
  angles = jnp.einsum(
    'bn,i->bni', positions.astype(frequencies.dtype), frequencies
  )
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if scale != 1:
    cos, sin = cos * scale, sin * scale
  return cos[:, :, None], sin[:, :, None]


def rotate(
  x: Float[Array, 'B N H d'],
  cos: Float[Array, 'B N 1 half'],
  sin: Float[Array, 'B N 1 half'],
) -> Float[Array, 'B N H d']:
  """Turn the pairs (x[i], x[i + half]), the layout of Hugging Face weights.

  Dimensions from 2 * half on stay as they are.
  """
  turned = 2 * cos.shape[-1]
  first, second = jnp.split(x[..., :turned].astype(cos.dtype), 2, axis=-1)
  parts = [first * cos - second * sin, second * cos + first * sin]
  if turned < x.shape[-1]:
    parts.append(x[..., turned:].astype(cos.dtype))
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def attention(
  query: Float[Array, 'B N H d'],
  levels: Sequence[Level],
  visible: Bool[Array, 'B N S'],
  *,
  scale: float,
  soft_cap: float | None = None,
) -> Float[Array, 'B N H d']:
  """Attend over levels of shared keys with one softmax over all their slots.

  softmax(cap(scale q·kᵀ)) v, with cap(x) = c tanh(x / c). A level of ``P``
  sequences is read where it lies: its keys are multiplied with the queries of
  all rows that share them, so that the cache of a prompt is never copied to
  its samples.
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
  logits *= scale
  if soft_cap is not None:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  logits = jnp.where(visible[:, None], logits, -jnp.inf)
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
  *,
  scale: float,
  soft_cap: float | None = None,
) -> Float[Array, 'B N H d']:
  """Attend within whole sequences, in `jax.nn.dot_product_attention`."""
  # It knows no cap, and its softmax is in float32 whatever comes in.
  if soft_cap is not None or query.dtype == jnp.float64:
    level = Level(key.swapaxes(1, 2), value.swapaxes(1, 2))
    return attention(query, (level,), visible, scale=scale, soft_cap=soft_cap)
  with jax.numpy_dtype_promotion('standard'):  # it mixes types inside
    return jax.nn.dot_product_attention(
      query, key, value, mask=visible[:, None], scale=scale
    )


def used(param: Any, axes: tuple[str | None, ...], dtype: Any) -> Array:
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


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


class Layer(NamedTuple):
  """What a scan hands to one layer.

  ``kind`` counts its view where there are several. ``experts`` are those that
  its tokens must visit; where they are negative the router chooses.
  """

  past: tuple[Level, ...] = ()
  kind: Int[Array, ''] | None = None
  experts: Int[Array, 'B N K'] | None = None


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  ``capture`` names what it returns beside: 'residual' (the stream after it),
  'attention' and 'mlp' (what they added), and of experts 'experts' (ids) and
  'router_logits'.
  """

  config: Config
  capture: tuple[str, ...] = ()

  def weight(
    self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...],
    init: Any = None, num_inputs: int = 1, scale: float = 1.0,
    num_stacked: int = 0,
  ) -> Array:  # fmt: skip
    """A parameter in the compute dtype; variance scale² / inputs."""
    config = self.config
    if init is None:
      fan_in = math.prod(shape[num_stacked : num_stacked + num_inputs])
      init = nn.initializers.normal(scale * fan_in**-0.5)
    boxed = nn.with_logical_partitioning(init, axes)
    return used(self.param(name, boxed, shape, config.param_dtype), axes,
                config.dtype)  # fmt: skip

  def norm(self, name: str, x: Array, *axes: str) -> Array:
    """Normalise over the named trailing axes, with parameters of this name."""
    shape = x.shape[-len(axes) :]
    weight = functools.partial(self.weight, shape=shape, axes=axes)
    return normalized(self.config, weight, name, x, len(axes))

  def bias(self, name: str, x: Array, *axes: str) -> Array:
    """Add the bias of this name."""
    shape = x.shape[-len(axes) :]
    bias = self.weight(f'{name}_bias', shape, axes, nn.initializers.zeros)
    return x + jnp.broadcast_to(bias, x.shape)

  def heads(self, name: str, x: Array, num: int, axis: str) -> Array:
    """Project to heads, with the bias where the family has one."""
    c = self.config
    kernel = self.weight(
      name, (c.model_dim, num, c.head_dim), ('width', axis, 'head_dim')
    )
    out = product(x, kernel)
    if c.qkv_bias:
      out = self.bias(name, out, axis, 'head_dim')
    return with_logical_constraint(out, ('batch', 'time', axis, 'head_dim'))

  def attend(
    self, h: Array, view: View, past: tuple[Level, ...], keep: bool
  ) -> tuple[Array, Level | None]:
    """Attention over the past and the new tokens."""
    c = self.config
    query = self.heads('query', h, c.num_heads, 'heads')
    key = self.heads('key', h, c.num_kv_heads, 'kv_heads')
    value = self.heads('value', h, c.num_kv_heads, 'kv_heads')
    if c.qk_norm:
      skipped = 1 if c.qk_norm_over == 'head' else 0
      query = self.norm('query_norm', query, *('heads', 'head_dim')[skipped:])
      key = self.norm('key_norm', key, *('kv_heads', 'head_dim')[skipped:])
    if c.position_embedding == 'rotary':
      query = rotate(query, view.cos, view.sin)
      key = rotate(key, view.cos, view.sin)
    new = None
    if keep:
      new = Level(key.swapaxes(1, 2), value.swapaxes(1, 2))
    how: Any = dict(
      scale=c.attention_scale or c.head_dim**-0.5, soft_cap=c.attention_soft_cap
    )
    if past and new is not None:
      h = attention(query, (*past, new), view.visible, **how)
    else:
      h = whole_attention(query, key, value, view.visible, **how)
    output = self.weight(
      'output', (c.num_heads, c.head_dim, c.model_dim),
      ('heads', 'head_dim', 'width'), num_inputs=2, scale=residual_scale(c),
    )  # fmt: skip
    h = product(h, output, num_inputs=2)
    return (self.bias('output', h, 'width') if c.output_bias else h), new

  def dense_mlp(self, h: Array, prefix: str, width: int) -> Array:
    """down(act(gate) * up), or down(act(up))."""
    c = self.config
    shape, axes = (c.model_dim, width), ('width', 'mlp')
    act = ACTIVATIONS[c.activation]

    def projected(name: str) -> Array:
      out = product(h, self.weight(prefix + name, shape, axes))
      return self.bias(prefix + name, out, 'mlp') if c.mlp_bias else out

    if c.gated_mlp:
      inner = act(projected('gate')) * projected('up')
    else:
      inner = act(projected('up'))
    inner = with_logical_constraint(inner, ('batch', 'time', 'mlp'))
    down = self.weight(
      prefix + 'down', shape[::-1], axes[::-1], scale=residual_scale(c)
    )
    out = product(inner, down)
    return self.bias(prefix + 'down', out, 'width') if c.mlp_bias else out

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B N D'],
    view: View,
    layer: Layer,
    keep: bool,
  ) -> tuple[Float[Array, 'B N D'], tuple[Level | None, dict[str, Array]]]:
    """Returns the new activations; keys and values if ``keep``; captures."""
    c = self.config
    if layer.kind is not None:
      view = jax.tree.map(lambda v: v[layer.kind], view)
    before, after = c.norm_order != 'post', c.norm_order != 'pre'
    h = self.norm('attention_norm', x, 'width') if before else x
    h, new = self.attend(h, view, layer.past, keep)
    if after:
      h = self.norm('attention_post_norm', h, 'width')
    x += h
    captured = {'attention': h}
    h = self.norm('mlp_norm', x, 'width') if before else x
    if c.num_experts:
      h, routing = mixture(self, h, layer.experts)
      captured |= routing
    else:
      h = self.dense_mlp(h, '', c.mlp_dim)
    if after:
      h = self.norm('mlp_post_norm', h, 'width')
    x += h
    captured |= {'mlp': h, 'residual': x}
    x = with_logical_constraint(x, ('batch', 'time', 'embed'))
    return x, (new, {name: captured[name] for name in self.capture})


def residual_scale(config: Config) -> float:
  """Keeps the variance of the initial residual stream near 1."""
  return (2 * config.num_layers) ** -0.5


def normalized(
  config: Config, weight: Callable, name: str, x: Array, num_axes: int = 1
) -> Array:
  """The family's norm over trailing axes; ``weight`` makes its parameters."""
  zeros, ones = nn.initializers.zeros, nn.initializers.ones
  kind, shape = config.norm, x.shape
  scale = weight(name, init=zeros if kind == 'rms_one_plus' else ones)
  flat = x.reshape(*shape[: len(shape) - num_axes], -1)
  scale = scale.reshape(-1)
  if kind == 'layer':
    bias = weight(f'{name}_bias', init=zeros).reshape(-1)
    out = layer_norm(flat, scale, bias, eps=config.norm_eps)
  else:
    out = rms_norm(flat, scale, eps=config.norm_eps, kind=kind)
  return out.reshape(shape)


def mixture(
  block: Block, h: Array, experts: Array | None
) -> tuple[Array, dict[str, Array]]:
  """The MLP of experts, and the one of all tokens where there is one."""
  c = block.config
  shape = (c.num_experts, c.model_dim, c.mlp_dim)
  axes = ('experts', 'width', 'mlp')
  router = block.weight('router', shape[1::-1], ('width', 'experts'))
  stacked = functools.partial(block.weight, num_stacked=1)
  gate = stacked('gate', shape, axes)
  up = stacked('up', shape, axes)
  down = stacked(
    'down', (shape[0], *shape[:0:-1]), (axes[0], *axes[:0:-1]),
    scale=residual_scale(c),
  )  # fmt: skip
  flat = h.reshape(-1, h.shape[-1])
  logits = product(flat, router)
  routing = moe.route(
    logits, num_selected=c.experts_per_token, normalize=c.normalize_gates,
    experts=None if experts is None else experts.reshape(flat.shape[0], -1),
  )  # fmt: skip
  out = moe.experts_mlp(
    flat, routing, gate, up, down, activation=ACTIVATIONS[c.activation]
  ).reshape(h.shape)
  if c.shared_mlp_dim:
    shared = block.dense_mlp(h, 'shared_', c.shared_mlp_dim)
    opener = block.weight('shared_router', (c.model_dim, 1), ('width', None))
    out += jax.nn.sigmoid(product(h, opener)) * shared
  lead = h.shape[:-1]
  return out, {
    'experts': routing.experts.reshape(*lead, -1),
    'router_logits': routing.logits.reshape(*lead, -1),
  }
