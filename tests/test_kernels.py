"""Fused attention: interpreted beside XLA's, and lowered for what is not here.

The kernels of TPUs run on a CPU as an interpreter reads them. What cuDNN
computes cannot be had without a card: its calls are looked for in the program
that would run there, and what is put into them is attended to by XLA.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from postrain import sharding
from postrain.batches import pack
from postrain.internals import layer_policy
from postrain.models import kernels
from postrain.models.attention import whole_attention
from postrain.models.cache import visibility
from postrain.models.config import Config
from postrain.models.heads import scalar_head
from postrain.models.lora import LoRA, lora
from postrain.models.transformer import transformer
from postrain.scoring import score
from postrain.types import Model

quick_compiler = tiny.quick_compiler

MODEL = Config(
  vocab_size=11, num_layers=2, model_dim=16, mlp_dim=16, num_heads=4,
  num_kv_heads=2, head_dim=64, layer_types=('sliding', 'full'),
  sliding_window=3, attention='splash',
)  # fmt: skip
HALF = dataclasses.replace(
  MODEL, head_dim=8, dtype='bfloat16', attention='cudnn'
)
# Padding on both sides, none, and within a sequence; then several a row.
PADDED = np.array([[0, 0, 1, 1, 1, 1, 1, 0], [1] * 8, [0, 1, 1, 0, 0, 1, 1, 1]])
PACKED = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8, [1, 2, 2, 2, 2, 2, 3, 3]])
BATCH, LENGTH = PADDED.shape


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(kernels, 'accelerator', lambda: ('tpu', 0.0))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
  """A Hopper card, as far as lowering asks for one."""
  monkeypatch.setattr(kernels, 'accelerator', lambda: ('cuda', 9.0))
  monkeypatch.setattr(
    'jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version',
    lambda: 91_000,
  )


def drawn() -> list[jax.Array]:
  """Queries of four heads, keys and values of two."""
  rng = np.random.default_rng(0)
  shapes = [(BATCH, LENGTH, heads, 8) for heads in (4, 2, 2)]
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def plain(
  query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array,
  *, scale: float, window: int | None = None, soft_cap: float | None = None,
  interpret: bool = False,
) -> jax.Array:  # fmt: skip
  """XLA's attention under the mask that the decoder makes."""
  del interpret
  positions = jnp.maximum(jnp.cumsum(segment_ids != 0, 1, jnp.int32) - 1, 0)
  visible = visibility(positions, segment_ids, [], None, window)
  return whole_attention(
    query, key, value, visible, scale=scale, soft_cap=soft_cap
  )


def outcomes(fn: Callable, layouts: list[np.ndarray], **how: Any) -> list:
  """Of each layout, the output on real tokens and a gradient through it."""

  def loss(arrays: list, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    out = fn(*arrays, ids, scale=0.4, **how)
    out = jnp.where((ids != 0)[:, :, None, None], out, 0)
    return jnp.sin(out).sum(), out

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  return [gradient(drawn(), jnp.asarray(x, jnp.int32)) for x in layouts]


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
  jax.tree.map(
    functools.partial(
      np.testing.assert_allclose, atol=tolerance, rtol=tolerance
    ),
    found,
    expected,
  )


@pytest.mark.parametrize('how', [{}, {'window': 3, 'soft_cap': 2.0}])
def test_splash_is_attention(how: dict) -> None:
  layouts = [PADDED, PACKED] if not how else [PADDED[:2].repeat(2, 0)[:3]]
  close(
    outcomes(kernels.splash_attention, layouts, interpret=True, **how),
    outcomes(plain, layouts, **how),
  )


@pytest.fixture
def by_xla(monkeypatch: pytest.MonkeyPatch) -> None:
  """What cuDNN is asked for, computed by XLA."""
  ours = jax.nn.dot_product_attention

  def attend(*arrays: jax.Array, implementation: Any = None, **how: Any) -> Any:
    del implementation
    with (
      jax.numpy_dtype_promotion('standard'),
      jax.numpy_rank_promotion('allow'),
    ):
      return ours(*arrays, implementation='xla', **how)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', attend)


@pytest.mark.usefixtures('by_xla')
@pytest.mark.parametrize('how', [{}, {'window': 3}])
def test_cudnn_has_rows_of_one_length(how: dict) -> None:
  """Wherever their padding is; never those of several segments."""
  layouts = [PADDED, 2 * PADDED]
  *found, mixed = outcomes(kernels.cudnn_attention, [*layouts, PACKED], **how)
  close(found, outcomes(plain, layouts, **how))
  assert np.isnan(mixed[1][PACKED != 0]).all()


@functools.cache
def params(model: Model) -> Any:
  """Small numbers, of the host: an initialisation takes long to compile."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(
    lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype), shapes
  )


def read(config: Config, cached: bool = False) -> jax.Array:
  """Hidden states of the real tokens of packed rows."""
  model, ids = transformer(config), jnp.asarray(PACKED, jnp.int32)
  slots = jnp.arange(LENGTH, dtype=jnp.int32)
  slots = jnp.broadcast_to(slots, ids.shape)
  cache = model.empty_cache(*ids.shape) if cached else None
  out, _ = jax.jit(model.hidden)(
    params(model), slots, positions=slots, segment_ids=ids, cache=cache
  )
  return jnp.where((ids != 0)[:, :, None], out, 0)


@functools.cache
def read_by_xla() -> jax.Array:
  return read(dataclasses.replace(MODEL, attention='xla'))


@pytest.mark.usefixtures('tpu')
@pytest.mark.parametrize(
  ('cached', 'mesh'), [(True, {}), (False, {'data': 3, 'tensor': 2})]
)
def test_decoder_hands_on_segments_and_windows(
  cached: bool, mesh: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
  """In its scan over layers of two kinds, in prefill, and cut over devices."""
  monkeypatch.setattr(kernels, 'splash_attention', plain)
  with sharding.on(sharding.make_mesh(**mesh)):
    found = read(MODEL, cached)
  close(found, read_by_xla())


@pytest.mark.usefixtures('cuda', 'by_xla')
def test_packed_rows_take_xla() -> None:
  """Where the kernel knows one segment a row; the scores are the same."""
  adapters = LoRA(rank=2, alpha=2, targets='.*/query')
  model = lora(transformer(HALF), adapters)
  valid = jnp.asarray(PADDED[:2] != 0)
  tokens = jnp.arange(valid.size, dtype=jnp.int32).reshape(valid.shape) % 11
  mask = valid.at[:, :4].set(False)

  def logprobs(packing: Any) -> jax.Array:
    return jax.jit(
      lambda params: (
        score(model, params, tokens, valid, mask, packing=packing).logprobs
      )
    )(params(model))

  packed = logprobs(pack(np.asarray(valid), width=2 * LENGTH))
  assert np.isfinite(packed).all()
  close(packed, logprobs(None), 3e-2)


@pytest.mark.usefixtures('cuda')
@pytest.mark.parametrize(
  'wrapped', [scalar_head, functools.partial(layer_policy, layer=0)]
)
def test_what_wraps_a_decoder_wraps_both(wrapped: Callable) -> None:
  model = wrapped(transformer(HALF))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  ids = jnp.asarray(PADDED, jnp.int32)
  for each, calls in ((model, True), (model.packed, False)):
    read = functools.partial(each.hidden, positions=ids, segment_ids=ids)
    text = str(jax.make_jaxpr(read)(shapes, ids))
    assert ('dot_product_attention_fwd' in text) == calls


def lowered(config: Config, platform: str) -> str:
  """The program of the gradient, for a platform that is not here."""
  model = transformer(config)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)

  def loss(params: Any, ids: jax.Array) -> jax.Array:
    out, _ = model.hidden(params, ids, positions=ids, segment_ids=ids)
    return out.astype(jnp.float32).sum()

  traced = jax.jit(jax.grad(loss)).trace(shapes, ids)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures('cuda')
def test_cudnn_is_called() -> None:
  with sharding.on(sharding.make_mesh(data=2, tensor=2)):
    text = lowered(HALF, 'cuda')
  assert '__cudnn$fmhaSoftmax(' in text
  assert '__cudnn$fmhaSoftmaxBackward(' in text
  assert 'PADDING_CAUSAL' in text


@pytest.mark.usefixtures('tpu')
def test_splash_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  with sharding.on(sharding.make_mesh(data=2, tensor=2)):
    text = lowered(MODEL, 'tpu')
  for phase in ('fwd', 'dq', 'dkv'):
    assert f'splash_mha_{phase}_segmented' in text


@pytest.mark.parametrize(
  ('platform', 'changes', 'expected'),
  [
    (('cpu', 0.0), {}, 'xla'),
    (('cuda', 9.0), {}, 'cudnn'),
    (('cuda', 9.0), {'attention_soft_cap': 5.0}, 'xla'),
    (('cuda', 9.0), {'dtype': 'float32'}, 'xla'),
    (('cuda', 9.0), {'head_dim': 256}, 'cudnn'),
    (('cuda', 8.0), {'head_dim': 256}, 'xla'),
    (('cuda', 7.5), {}, 'xla'),
    (('rocm', 0.0), {}, 'xla'),
    (('tpu', 0.0), {}, 'xla'),
    (('tpu', 0.0), {'head_dim': 64, 'attention_soft_cap': 5.0}, 'splash'),
  ],
)
def test_auto_takes_what_there_is(
  platform: tuple, changes: dict, expected: str,
  monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
  monkeypatch.setattr(kernels, 'accelerator', lambda: platform)
  config = dataclasses.replace(HALF, attention='auto', **changes)
  assert kernels.kernel(config) == expected


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('cudnn', {}, "attention='cudnn' needs an NVIDIA GPU .*, not cpu"),
    ('splash', {'head_dim': 48}, 'needs a TPU, not cpu, and .* head_dim=48:'),
    ('cudnn', {'dtype': 'float32'}, "not dtype='float32': change that, or"),
  ],
)
def test_what_cannot_be_met_is_refused(
  name: str, changes: dict, message: str
) -> None:
  config = dataclasses.replace(HALF, attention=name, **changes)
  with pytest.raises(ValueError, match=message):
    transformer(config)


@pytest.mark.usefixtures('tpu')
def test_rows_cut_over_devices_have_no_kernel() -> None:
  """A token attends to those of all parts, and a kernel meets one of them."""
  auto = dataclasses.replace(MODEL, attention='auto')
  assert kernels.kernel(auto) == 'splash'
  with sharding.on(sharding.make_mesh(context=2)):
    assert kernels.kernel(auto) == 'xla'
    with pytest.raises(ValueError, match=r'so mesh\.context=1:'):
      transformer(MODEL)
