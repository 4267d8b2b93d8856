"""What is saved comes back bit for bit, or not at all."""

from collections.abc import Iterator
import contextlib
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from postrain.checkpoints import Checkpoints
from postrain.types import TrainState


def state(scale: float = 1.0, width: int = 3, dtype: Any = jnp.float32) -> Any:
  """Parameters with moments of Adam, in the mixed structure of a run."""
  params = {'actor': {'kernel': jnp.full((2, width), scale / 3, dtype)}}
  optimizer = optax.chain(optax.clip(1.0), optax.scale_by_adam())
  return TrainState(
    jnp.int32(7), params, optimizer.init(params), params['actor']
  )


def abstract(tree: Any) -> Any:
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaves, structure = jax.tree.flatten(tree)
  leaves = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in leaves
  ]
  with structure_unchecked():
    return jax.tree.unflatten(structure, leaves)


@contextlib.contextmanager
def structure_unchecked() -> Iterator[None]:
  """Shapes stand where arrays do, as in every restore."""
  import jaxtyping

  jaxtyping.config.update('jaxtyping_disable', True)
  try:
    yield
  finally:
    jaxtyping.config.update('jaxtyping_disable', False)


@pytest.fixture
def checkpoints(tmp_path: pathlib.Path) -> Iterator[Checkpoints]:
  with contextlib.closing(Checkpoints(str(tmp_path), keep=2)) as opened:
    yield opened


def test_restored_bits_are_the_saved_ones(checkpoints: Checkpoints) -> None:
  assert checkpoints.latest() is None
  saved = state()
  checkpoints.save(3, saved)
  assert checkpoints.latest() == 3
  restored = checkpoints.restore(3, abstract(saved))
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  for left, right in zip(
    jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True
  ):
    assert left.dtype == right.dtype
    assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_the_newest_stay(checkpoints: Checkpoints, tmp_path: Any) -> None:
  for step in (1, 2, 4, 6):
    checkpoints.save(step, state(step))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['4', '6']
  assert checkpoints.latest() == 6


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    (dict(width=4), r'kernel is float32\[2,3\], not float32\[2,4\]'),
    (dict(dtype=jnp.bfloat16), r'kernel is float32\[2,3\], not bfloat16'),
  ],
)
def test_another_shape_or_dtype_is_refused(
  other: dict, message: str, checkpoints: Checkpoints
) -> None:
  checkpoints.save(1, state())
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(1, abstract(state(**other)))


def test_another_structure_is_refused(checkpoints: Checkpoints) -> None:
  checkpoints.save(1, state())
  other = state().replace(ref_params=None)
  with pytest.raises(
    ValueError, match=r'ref_params/kernel is float32.* absent'
  ):
    checkpoints.restore(1, abstract(other))


def test_what_a_kill_leaves_is_passed_over(tmp_path: pathlib.Path) -> None:
  with contextlib.closing(Checkpoints(str(tmp_path), keep=2)) as first:
    first.save(1, state())
  # A write that was not committed, and a removal that was not finished.
  shutil.copytree(tmp_path / '1', tmp_path / '2.orbax-checkpoint-tmp')
  with contextlib.closing(Checkpoints(str(tmp_path), keep=2)) as second:
    assert second.latest() == 1
    for step in (2, 3):
      second.save(step, state(step))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['2', '3']


def test_saving_a_step_twice_is_an_error(checkpoints: Checkpoints) -> None:
  checkpoints.save(5, state())
  with pytest.raises(ValueError, match='checkpoint 4 was not written'):
    checkpoints.save(4, state())


def test_a_flipped_bit_is_refused(
  checkpoints: Checkpoints, tmp_path: pathlib.Path
) -> None:
  # At random, for then they are not compressed.
  bits = np.random.default_rng(0).integers(2**32, size=5000, dtype=np.uint32)
  saved = {'odd': jnp.array(bits), 'even': jnp.zeros(3)}
  checkpoints.save(1, saved)
  checkpoints.save(2, saved)
  assert checkpoints.digests(1) == checkpoints.digests(2)
  for path in (tmp_path / '2').rglob('*'):
    content = path.read_bytes() if path.is_file() else b''
    if (start := content.find(bits.tobytes()[4000:4100])) >= 0:
      flipped = bytearray(content)
      flipped[start] ^= 1
      path.write_bytes(flipped)
  with pytest.raises(ValueError, match='other bits than were saved: odd'):
    checkpoints.restore(2, abstract(saved))
  checkpoints.restore(1, abstract(saved))


def test_only_arrays_are_saved(checkpoints: Checkpoints) -> None:
  with pytest.raises(ValueError, match=r"leaf \['name'\] is <class 'str'>"):
    checkpoints.save(1, {'name': 'actor', 'x': jnp.zeros(2)})
  assert checkpoints.latest() is None
