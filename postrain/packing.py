"""How many rows a batch is packed into: few numbers, all known in advance."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool
import numpy as np

from postrain.batches import packed_places
from postrain.environments import Environment
from postrain.preparation import uses_reference
from postrain.recipe import Recipe
from postrain.types import Packing, Samples


class Layout(NamedTuple):
  """How batches of one shape are packed.

  Attributes:
    num_sequences: of a batch.
    length: slots of a sequence, padding among them.
    width: slots of a packed row.
    num_slices: micro-batches or scoring slices, each in rows of its own.
    sizes: numbers of rows that a slice may have.
  """

  num_sequences: int
  length: int
  width: int
  num_slices: int
  sizes: tuple[int, ...]

  def pack(self, valid: Bool[np.ndarray, 'B T']) -> list[Any]:
    """Pack into the fewest rows that a program was compiled for: arrays."""
    how: Any = dict(num_slices=self.num_slices, num_rows=self.sizes)
    return [*packed_places(valid, width=self.width, **how)]

  def shapes(self) -> dict[int, list[Any]]:
    """All that `pack` may return, as shapes, by the number of rows."""
    places = (self.num_sequences, self.length)
    totals = [size * self.num_slices for size in self.sizes]
    return {
      total: [
        jax.ShapeDtypeStruct(shape, jnp.int32)
        for shape in (*[(total, self.width)] * 3, places)
      ]
      for total in totals
    }

  def reading(self, fn: Callable) -> Callable:
    """Turn a function's last argument, of `pack`, into a `Packing`."""

    def called(*arguments: Any) -> Any:
      *rest, arrays = arguments
      return fn(*rest, Packing(*arrays, num_slices=self.num_slices))

    return called


def make_layout(
  num_sequences: int, length: int, width: int, *, num_slices: int = 1,
  num_shards: int = 1, num_sizes: int = 6,
) -> Layout:  # fmt: skip
  """Choose the sizes of a layout: ⌈n / √2ⁱ⌉, n the most rows ever needed.

  First fit leaves a row only when it holds at least ⌊width / length⌋ sequences,
  so n is what sequences without padding would need.

  Args:
    num_sequences: of a batch, a multiple of ``num_slices``.
    length: slots of a sequence.
    width: slots of a packed row, at least ``length``.
    num_slices: micro-batches or scoring slices.
    num_shards: devices that share a batch; they divide every size.
    num_sizes: sizes at most.
  """
  most = math.ceil(num_sequences / num_slices / (width // length))
  wanted = [most / math.sqrt(2) ** i for i in range(num_sizes)]
  sizes = {math.ceil(n / num_shards) * num_shards for n in wanted}
  return Layout(num_sequences, length, width, num_slices, tuple(sorted(sizes)))


def layouts(recipe: Recipe, environment: Environment) -> dict[str, Layout]:
  """The layouts of a run by the program that reads them, where it packs.

  Sequences have the slots of the longest: packed, they cost next to nothing.
  """
  sft, rl, found = recipe.sft, recipe.rl, {}

  def layout(num: int, length: int, width: int, num_slices: int) -> Layout:
    mesh = recipe.mesh
    return make_layout(
      num, length, width, num_slices=num_slices,
      num_shards=mesh.data * mesh.fsdp * mesh.expert,
      num_sizes=recipe.num_row_buckets,
    )  # fmt: skip

  if sft.row_length is not None and sft.num_steps:
    length = environment.demonstration_length
    found['imitate'] = layout(
      sft.batch_size, length, sft.row_length, sft.num_micro_batches
    )
  if rl.row_length is not None and rl.num_iterations:
    length = environment.prompt_length + recipe.sampling.max_new_tokens
    rows = rl.num_prompts * recipe.sampling.num_samples
    if rl.rescore or uses_reference(recipe):
      found['prepare'] = layout(
        rows, length, rl.row_length, rl.num_score_slices
      )
    rows //= rl.num_minibatches
    found['update'] = layout(rows, length, rl.row_length, rl.num_micro_batches)
  return found


def with_slots(
  prompts: Any, prompt_mask: Any, samples: Samples, slots: int
) -> tuple[Any, Any, Samples]:
  """Pad prompts on the left, so that all rollouts have one shape."""
  more = slots - prompts.shape[1]

  def behind(x: Any, fill: Any) -> Any:
    widths = [(0, 0), (more, 0)] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, widths, constant_values=fill)

  if samples.experts is not None:
    samples = samples._replace(experts=behind(samples.experts, -1))
  return behind(prompts, 0), behind(prompt_mask, False), samples


def real_tokens(prompt_mask: Any, samples: Samples) -> np.ndarray:
  """Which slots of prompts and their completions hold a token [B T]."""
  repeats = len(samples.mask) // len(prompt_mask)
  prompts = np.repeat(prompt_mask, repeats, axis=0)
  return np.concatenate([prompts, samples.mask], axis=1)
