"""Blocks of a decoder: norms, rotary attention, MLP or experts.

Logical axes of parameters: ``layers``, ``vocab``, ``width`` (the residual
stream), ``heads``, ``kv_heads``, ``head_dim``, ``mlp``, ``experts``; of
activations: ``batch``, ``time``, ``embed``, ``heads``, ``kv_heads``,
``head_dim``, ``mlp``.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from postrain import sharding
from postrain.models import moe
from postrain.models.attention import (
  Level,
  View,
  attention,
  new_level,
  rotate,
  whole_attention,
  written,
)
from postrain.models.config import Config
from postrain.models.kernels import fused_attention, kernel
from postrain.models.lora import LowRank, Stored
from postrain.models.norms import layer_norm, rms_norm


def used(param: Any, axes: tuple[str | None, ...], dtype: Any) -> Any:
  """A parameter as a layer multiplies it: whole along the residual stream.

  Without this the partitioner of a sharded ``width`` moves activations around
  instead of gathering the parameter.
  """
  if isinstance(param, LowRank):
    num_inputs = param.a.ndim - 1
    return LowRank(
      used(param.kernel, axes, dtype),
      used(param.a, (*axes[:num_inputs], None), dtype),
      used(param.b, (None, *axes[num_inputs:]), dtype),
    )
  if isinstance(param, Stored):
    return param
  return _gathered(jnp.asarray(param, dtype), axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(param: Array, axes: tuple[str | None, ...]) -> Array:
  whole = tuple('embed' if axis == 'width' else axis for axis in axes)
  return sharding.constrained(sharding.halfway(param, axes), whole)


def _gathered_forward(
  param: Array, axes: tuple[str | None, ...]
) -> tuple[Array, None]:
  return _gathered(param, axes), None


def _gathered_backward(
  axes: tuple[str | None, ...], residual: None, gradient: Array
) -> tuple[Array]:
  # Lies as the parameter does, so that it is scattered as it is summed. The
  # transpose of the constraint would ask for all of it on every device.
  del residual
  return (sharding.constrained(sharding.halfway(gradient, axes), axes),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def product(
  x: Array, kernel: Array | LowRank | Stored, *, num_inputs: int = 1
) -> Array:
  """Sum over the last ``num_inputs`` axes of x and the first of the kernel.

  Batch and time are merged for it: the gradient of a kernel that sums over two
  axes takes three times as long on XLA's CPU backend.
  """
  if isinstance(kernel, LowRank):
    low = product(x, kernel.a, num_inputs=num_inputs)
    whole = product(x, kernel.kernel, num_inputs=num_inputs)
    return whole + product(low, kernel.b)
  if isinstance(kernel, Stored):
    # Checkpointed as one, or the restored kernels of all layers would be kept.
    return jax.checkpoint(
      lambda x, form: product(
        x, kernel.restore(form).astype(x.dtype), num_inputs=num_inputs
      )
    )(x, kernel.form)
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

  ``past`` is read; new tokens are put into ``own``, or see each other and the
  past alone. ``kind`` counts its view where there are several. ``experts`` are
  those that its tokens must visit; where they are negative the router chooses.
  """

  past: tuple[Level, ...] = ()
  own: Level | None = None
  kind: Any = None  # a number, Int[Array, ''] in a scan
  experts: Int[Array, 'B N K'] | None = None


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  ``capture`` names what it returns beside: 'residual' (the stream after it),
  'attention' and 'mlp' (what they added), 'attention_input' and 'mlp_input'
  (what they read), and of experts 'experts' (ids) and 'router_logits'.
  """

  config: Config
  capture: tuple[str, ...] = ()

  def weight(
    self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...],
    init: Any = None, num_inputs: int = 1, scale: float = 1.0,
    num_stacked: int = 0,
  ) -> Any:  # fmt: skip
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
    return sharding.constrained(out, ('batch', 'time', axis, 'head_dim'))

  def attend(self, h: Array, view: View, layer: Layer) -> tuple[Array, Level]:
    """Attention over the past and the new tokens; what the cache holds then."""
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
    # Of all tokens of a row, wherever its devices are; rotated by then.
    key, value = (
      sharding.constrained(x, ('batch', 'keys', 'kv_heads', 'head_dim'))
      for x in (key, value)
    )
    level = new_level(key, value)
    if layer.own is not None:
      level = written(layer.own, level, view.at)
    how: Any = dict(
      scale=c.attention_scale or c.head_dim**-0.5, soft_cap=c.attention_soft_cap
    )
    if layer.past or layer.own is not None:
      h = attention(query, (*layer.past, level), view.visible, **how)
    elif view.visible is not None:
      h = whole_attention(query, key, value, view.visible, **how)
    else:
      fused = functools.partial(
        fused_attention, kernel(c), segment_ids=view.segment_ids, **how
      )
      branches = [functools.partial(fused, window=w) for w in c.windows]
      h = jax.lax.switch(view.window, branches, query, key, value)
    output = self.weight(
      'output', (c.num_heads, c.head_dim, c.model_dim),
      ('heads', 'head_dim', 'width'), num_inputs=2, scale=residual_scale(c),
    )  # fmt: skip
    h = product(h, output, num_inputs=2)
    return (self.bias('output', h, 'width') if c.output_bias else h), level

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
    inner = sharding.constrained(inner, ('batch', 'time', 'mlp'))
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
    """Returns the new activations; the cache's level if ``keep``; captures."""
    c = self.config
    if layer.kind is not None:
      view = jax.tree.map(lambda v: v[layer.kind], view)
    before, after = c.norm_order != 'post', c.norm_order != 'pre'
    h = self.norm('attention_norm', x, 'width') if before else x
    captured = {'attention_input': h}
    h, level = self.attend(h, view, layer)
    if after:
      h = self.norm('attention_post_norm', h, 'width')
    x += h
    captured['attention'] = h
    h = self.norm('mlp_norm', x, 'width') if before else x
    captured['mlp_input'] = h
    if c.num_experts:
      h, routing = mixture(self, h, layer.experts)
      captured |= routing
    else:
      h = self.dense_mlp(h, '', c.mlp_dim)
    if after:
      h = self.norm('mlp_post_norm', h, 'width')
    x += h
    captured |= {'mlp': h, 'residual': x}
    x = sharding.constrained(x, ('batch', 'time', 'embed'))
    kept = level if keep else None
    return x, (kept, {name: captured[name] for name in self.capture})


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
