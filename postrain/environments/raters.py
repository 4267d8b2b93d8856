"""Preferences of synthetic tasks: what raters say of completions at random."""

from collections.abc import Callable, Mapping
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import data
from postrain.binding import check_arguments
from postrain.environments.record import Comparisons, Units, rows_of
from postrain.keys import run_key
from postrain.tasks import labels
from postrain.types import Batch, Prompts, Samples, Task

# How raters speak, and the arrays that come of it.
KINDS = {
  'pairs': (labels.pairs, {}),
  'rankings': (labels.rankings, {'ranks': np.int32}),
  'unpaired': (labels.unpaired, {'desirable': bool}),
}


def comparisons(
  task: Task,
  seed: int,
  rater: Mapping[str, Any],
  num_completions: int,
  writer_logits: tuple[float, ...] | None = None,
) -> Callable[[str], Comparisons] | None:
  """The ``preferences`` of an environment; None of tasks without ``gold``."""
  if num_completions < 2:
    raise ValueError(
      f'environment.num_completions={num_completions}: a ranking has at least 2'
    )
  if writer_logits is not None and len(writer_logits) != task.vocab_size:
    raise ValueError(
      f'environment.writer_logits has {len(writer_logits)} numbers: give one'
      f' for each of {task.vocab_size} token ids, or None'
    )
  if 'gold' not in task.rewards or not task.stop_ids:
    return None
  sizes = {'pairs': 2, 'rankings': num_completions, 'unpaired': 1}

  @functools.cache
  def of_kind(kind: str) -> Comparisons:
    return _comparisons(task, seed, rater, kind, sizes[kind], writer_logits)

  return of_kind


def _comparisons(
  task: Task,
  seed: int,
  rater: Mapping[str, Any],
  kind: str,
  unit_size: int,
  writer_logits: tuple[float, ...] | None,
) -> Comparisons:
  """So many examples are drawn once, and taken in another order at each pass.

  Without a number each step draws anew.
  """
  label, dtypes = KINDS[kind]
  check_arguments(label, rater, 'environment.rater')
  draw = _drawing(task, label, rater, unit_size, tuple(dtypes), writer_logits)
  draw_pairs = _drawing(task, labels.pairs, _shared(rater), 2, ())
  jax.eval_shape(lambda: draw(run_key(seed, 'preferences'), 2))  # its errors

  @functools.cache
  def all_of_them(number: int) -> Units:
    return jax.device_get(draw(run_key(seed, 'preferences'), number))

  def numbers(step: int, batch_size: int, num_examples: int) -> np.ndarray:
    return data.indices(seed, step, num_prompts=batch_size, size=num_examples)

  def units(step: int, batch_size: int, num_examples: int | None) -> Units:
    if num_examples is None:
      return jax.device_get(
        draw(run_key(seed, 'preferences', step), batch_size)
      )
    chosen = numbers(step, batch_size, num_examples)
    return rows_of(all_of_them(num_examples), chosen, unit_size)

  @jax.jit
  def compared(key: Any, prompts: Any, samples: Any) -> Units:
    paired = (x.reshape(len(prompts[0]), 2, -1) for x in samples)
    drawn = labels.Candidates(*prompts, *paired)
    batch = labels.pairs(task, drawn, key, **_shared(rater))
    return Units(batch.tokens, batch.valid, batch.mask, {})

  def compare(step: int, prompts: Prompts, samples: Samples) -> Units:
    key = run_key(seed, 'raters', step)
    written = (samples.tokens, samples.mask)
    return jax.device_get(compared(key, prompts[:2], written))

  length = task.prompt_length + task.completion_length
  return Comparisons(
    unit_size=unit_size,
    length=length,
    dtypes=dtypes,
    units=units,
    lengths=lambda *_: {length},
    held_out=lambda number: jax.device_get(
      draw_pairs(run_key(seed, 'held_out_preferences'), number, held_out=True)
    ),
    numbers=numbers,
    all_units=all_of_them,
    compare=compare,
  )


def _drawing(
  task: Task, label: Callable[..., Batch], rater: Mapping[str, Any],
  unit_size: int, names: tuple[str, ...],
  writer_logits: tuple[float, ...] | None = None,
) -> Callable[..., Units]:  # fmt: skip
  """Jitted (key, number, held_out=False) -> so many units."""

  def draw(key: Any, number: int, held_out: bool = False) -> Units:
    of_texts, of_labels = jax.random.split(key)
    logits = None
    if writer_logits is not None:
      logits = jnp.asarray(writer_logits, jnp.float32)
      logits = logits.at[task.pad_id].set(-jnp.inf)
    drawn = labels.candidates(
      task, of_texts, num_prompts=number, num_samples=unit_size,
      held_out=held_out, logits=logits,
    )  # fmt: skip
    batch = label(task, drawn, of_labels, **rater)
    arrays = {name: batch.arrays[name] for name in names}
    return Units(batch.tokens, batch.valid, batch.mask, arrays)

  return jax.jit(draw, static_argnames=('number', 'held_out'))


def _shared(rater: Mapping[str, Any]) -> dict[str, Any]:
  """What a rater of another kind and one of pairs have in common."""
  known = inspect.signature(labels.pairs).parameters
  return {k: v for k, v in rater.items() if k in known}
