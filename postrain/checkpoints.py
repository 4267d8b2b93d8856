"""Save and restore a run's state with Orbax."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import sharding
from postrain.adapted import bases, rejoined, trainable
from postrain.digests import digest
from postrain.workdir import die_at

# A leaf at a time: moments are of the shapes of parameters, and share programs.
_digest = jax.jit(lambda leaf: digest(sharding.fetched(leaf)))


class Checkpoints:
  """The checkpoints of a run: atomic, complete or absent.

  A step is committed by a rename; what a kill leaves half-written is never
  listed and is replaced when the step is saved again. A frozen base (see
  `postrain.adapted`) is saved once, beside the steps. A step has the digest of
  every leaf, by which a restore onto any devices knows its bits.
  """

  def __init__(
    self, directory: str, *, keep: int | None, read_only: bool = False
  ):
    import orbax.checkpoint as ocp

    # A reader must not tidy up what the run beside it is writing.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      cleanup_tmp_directories=not read_only,
      create=not read_only,
      read_only=read_only,
    )
    self._base = os.path.join(os.path.abspath(directory), 'base')
    self._manager = ocp.CheckpointManager(
      os.path.abspath(directory),
      options=options,
      item_handlers=ocp.StandardCheckpointHandler(),
    )

  def latest(self) -> int | None:
    """The newest committed step."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """All committed steps, in order."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, *, wait: bool = True) -> None:
    """Save ``state`` under ``step``.

    Args:
      step: later than all that were saved.
      state: read before this returns, and free to be donated.
      wait: until the step is committed; else that is done beside what follows,
        and waited for by the next `save` or `close`.
    """
    import orbax.checkpoint as ocp

    check_leaves(state)
    frozen = bases(state)
    if frozen and not os.path.exists(self._base):
      with ocp.StandardCheckpointer() as once:
        once.save(self._base, jax.tree.map(_wide, frozen))
    saved = self._manager.save(
      step,
      args=ocp.args.StandardSave(trainable(state)),
      custom_metadata={'digests': _digests(state)},
    )
    die_at('in_checkpoint', step)
    if wait:
      self._manager.wait_until_finished()
    if not saved:
      raise ValueError(
        f'checkpoint {step} was not written: a checkpoint of that step or a'
        f' later one stands in {self._manager.directory}'
      )

  def restore(self, step: int, like: Any) -> Any:
    """Restore ``step`` into the structure, dtypes and shardings of ``like``.

    Raises:
      ValueError: the checkpoint holds other leaves, shapes or dtypes (Orbax
        would cast in silence), or other bits than were saved; names them.
    """
    import orbax.checkpoint as ocp

    trained, frozen = trainable(like), bases(like)
    where = f'checkpoint {step} in {self._manager.directory}'
    _check(where, self._manager.item_metadata(step).tree, trained)
    state = self._manager.restore(step, args=ocp.args.StandardRestore(trained))
    if not frozen:
      return self._verified(step, state)
    wide = jax.tree.map(_wide, frozen)
    with ocp.StandardCheckpointer() as once:
      stored: Any = once.metadata(self._base).item_metadata
      _check(f'the base of {where}', stored.tree, wide)
      base = once.restore(self._base, wide)
    base = jax.tree.map(lambda x, like: x.astype(like.dtype), base, frozen)
    return self._verified(step, rejoined(state, base))

  def digests(self, step: int) -> dict[str, str]:
    """Path of each leaf -> the digest it was saved with; {} of old steps."""
    told: Any = self._manager.metadata(step)
    return (told.custom_metadata or {}).get('digests', {})

  def _verified(self, step: int, state: Any) -> Any:
    """The state, if it has the digests that it was saved with."""
    saved, found = self.digests(step), _digests(state)
    if saved and found != saved:
      wrong = [path for path in found if found[path] != saved.get(path)]
      named = ', '.join(wrong[:4]) + (', ...' if wrong[4:] else '')
      raise ValueError(
        f'checkpoint {step} in {self._manager.directory} has other bits than'
        f' were saved: {named}. The storage has changed them: take a copy, or'
        f' remove its folder {step} to go on from the step before'
      )
    return state

  def compile(self, shapes: Any) -> None:
    """Compile what saving leaves of these shapes, with shardings, will call."""
    for leaf in {
      (x.shape, x.dtype, x.sharding): x for x in jax.tree.leaves(shapes)
    }.values():
      _digest.lower(leaf).compile()

  def wait(self) -> None:
    """Wait until what was saved is committed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Wait for what is under way and release the directory."""
    self._manager.close()


def _wide(leaf: Any) -> Any:
  """A leaf, or its shape, in a type that can be stored: uint4 cannot."""
  if leaf.dtype != jnp.uint4:
    return leaf
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf.update(dtype=jnp.uint8)
  return leaf.astype(jnp.uint8)


def _digests(state: Any) -> dict[str, str]:
  """Path of each leaf -> its digest."""
  named = jax.tree_util.tree_leaves_with_path(state)
  # One at a time, after all else: devices of the CPU that wait for each other
  # in many small programs at once may run out of threads.
  jax.block_until_ready(state)
  found = [sharding.on_host(_digest(leaf)) for _, leaf in named]
  return {
    _name(path): ''.join(f'{word:08x}' for word in words.tolist())
    for (path, _), words in zip(named, found, strict=True)
  }


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _check(where: str, stored_tree: Any, like: Any) -> None:
  """Refuse to restore what was saved as something else."""
  stored, wanted = _signature(stored_tree), _signature(like)
  if stored != wanted:
    raise ValueError(
      f'{where} is of another model or optimiser:'
      f' {_difference(stored, wanted)}. Take the code and the files that it was'
      ' made with, or another --workdir'
    )


def _signature(tree: Any) -> dict[str, str]:
  """Path of each leaf -> its dtype and shape."""
  return {
    _name(path): (f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]')
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _difference(stored: dict[str, str], wanted: dict[str, str]) -> str:
  differing = [
    f'{path} is {stored.get(path, "absent")}, not {wanted.get(path, "absent")}'
    for path in sorted(stored.keys() | wanted.keys())
    if stored.get(path) != wanted.get(path)
  ]
  return '; '.join(differing[:4]) + ('; ...' if len(differing) > 4 else '')


def check_leaves(state: Any) -> None:
  """Refuse leaves that Orbax would hang on."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
      raise ValueError(
        f'checkpoint leaf {jax.tree_util.keystr(path)} is {type(leaf)}:'
        ' only arrays are saved'
      )
