"""Weights go straight into their shards, and come back out of them."""

import dataclasses
import functools
import tracemalloc

from flax import traverse_util
import jax
import numpy as np
import pytest
import tiny

from postrain import hub, sharding
from postrain.hub import placing
from postrain.models import families
from postrain.models.config import Config
from postrain.models.transformer import transformer

quick_compiler = tiny.quick_compiler

SIZES = dict(
  vocab_size=12, num_layers=2, model_dim=8, mlp_dim=8, num_heads=4,
  num_kv_heads=2, head_dim=4, max_length=8, tie_embeddings=False,
)  # fmt: skip
# Expert tensors, tensors fused along rows and along columns.
KINDS = {
  'mixtral': dict(num_experts=4, experts_per_token=2, param_dtype='bfloat16'),
  'phi3': dict(param_dtype='float16'),
  'gpt2': dict(
    num_kv_heads=4, head_dim=2, position_embedding='learned', norm='layer',
    qkv_bias=True, output_bias=True, mlp_bias=True, gated_mlp=False,
    activation='gelu_tanh',
  ),
}  # fmt: skip
MESHES = {
  'mixtral': [{'fsdp': 2, 'tensor': 2, 'expert': 2}, {'expert': 2}],
  'phi3': [{'data': 2, 'tensor': 2}],
  'gpt2': [{'fsdp': 4, 'tensor': 2}],
}


def parameters(config):
  """All kinds of finite bits, subnormal numbers and minus zero among them."""
  draw = np.random.default_rng(0)
  dtype = np.dtype(config.param_dtype)

  def leaf(shape):
    bits = draw.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    values = bits.view(dtype)[..., 0]
    with np.errstate(invalid='ignore'):
      return np.where(np.isfinite(values), values, -np.zeros((), dtype))

  shapes = families.param_shapes(config)
  return traverse_util.unflatten_dict({k: leaf(s) for k, s in shapes.items()})


def assert_same_bits(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize('kind', KINDS)
def test_any_mesh_holds_the_bits_of_the_file(tmp_path, kind, monkeypatch):
  config = Config(**SIZES | KINDS[kind], family=kind)
  config = dataclasses.replace(config, dtype=config.param_dtype)
  params = parameters(config)
  hub.save(tmp_path / 'a', config, params)
  load = functools.partial(hub.load, tmp_path / 'a', dtype=config.dtype)
  assert_same_bits(load().params, params)
  monkeypatch.setattr(placing, 'BLOCK_BYTES', 60)  # a few rows, some left over
  loaded = load()
  assert_same_bits(loaded.params, params)
  axes = transformer(config).logical_axes()
  for sizes in MESHES[kind]:
    mesh = sharding.make_mesh(**sizes)
    shardings = sharding.shardings(mesh, params, axes)
    loaded = load(shardings=shardings)
    assert_same_bits(loaded.params, params)
    assert jax.tree.map(lambda x: x.sharding, loaded.params) == shardings
  hub.save(tmp_path / 'b', config, loaded.params, max_shard_bytes=500)
  assert_same_bits(hub.load(tmp_path / 'b', dtype=config.dtype).params, params)


def test_one_sharding_serves_all_and_dtypes_are_cast(tmp_path):
  config = Config(**SIZES)
  params = parameters(config)
  hub.save(tmp_path / 'a', config, params)
  place = sharding.replicated(sharding.make_mesh())
  wide = hub.load(tmp_path / 'a', shardings=lambda model: place).params
  assert_same_bits(wide, params)
  with pytest.raises(ValueError, match=r'is no sharding on a mesh: pass'):
    hub.load(
      tmp_path / 'a',
      shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
  with pytest.raises(ValueError, match=r'embed_tokens.* beyond float16: use'):
    hub.load(tmp_path / 'a', dtype='float16', shardings=place)
  small = jax.tree.map(lambda x: x.astype('bfloat16').astype('float32'), params)
  hub.save(tmp_path / 'a', config, small, overwrite=True)
  found = hub.load(tmp_path / 'a', dtype='bfloat16', shardings=place).params
  assert_same_bits(found, jax.tree.map(lambda x: x.astype('bfloat16'), small))


def test_a_window_reads_its_own_rows(tmp_path):
  config = Config(**SIZES)
  hub.save(tmp_path / 'a', config, parameters(config))
  entry = hub.open(tmp_path / 'a').entries['lm_head.weight']
  found = entry.rows(3, 5)
  assert found.nbytes == 2 * entry.row_bytes == 2 * 8 * 4
  whole = parameters(config)['unembedding']
  np.testing.assert_array_equal(found, whole[3:5])
  np.testing.assert_array_equal(entry.rows(3, 5, slice(1, 4)), whole[3:5, 1:4])


def test_beside_the_parameters_a_few_blocks_exist(tmp_path, monkeypatch):
  """NumPy tells tracemalloc of its arrays; those of JAX lie elsewhere."""
  config = Config(**SIZES | {'vocab_size': 2**16, 'mlp_dim': 2**13})
  params = parameters(config)
  largest = 4 * 2**16 * 8
  hub.save(tmp_path / 'a', config, params)
  place = sharding.replicated(sharding.make_mesh())
  monkeypatch.setattr(placing, 'BLOCK_BYTES', largest // 32)

  def peak(fn):
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    kept = fn()
    del kept
    return tracemalloc.get_traced_memory()[1] - before

  opened = hub.open(tmp_path / 'a')
  hub.read(opened, place)  # compiled
  tracemalloc.start()
  try:
    streamed = peak(lambda: hub.read(opened, place))
    held = peak(lambda: hub.read(opened))
    sharded = hub.read(opened, place)
    export = functools.partial(
      hub.save, params=sharded, config=config, max_shard_bytes=largest
    )
    export(tmp_path / 'c')
    exported = peak(lambda: export(tmp_path / 'b'))
  finally:
    tracemalloc.stop()
  resident = sum(x.nbytes for x in jax.tree.leaves(params))
  assert resident > 2 * largest
  assert streamed < largest / 2
  assert held - resident < largest / 2
  assert exported < 1.5 * largest
