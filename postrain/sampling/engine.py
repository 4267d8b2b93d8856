"""Sample through a fixed number of slots, each refilled when its row ends."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from postrain.models.cache import Cache
from postrain.sampling.filters import Draw
from postrain.sampling.sampler import (
  check_bounded,
  choose,
  empty_samples,
  prefill,
  sequence_keys,
  served,
  with_experts,
)
from postrain.scoring import forward
from postrain.types import Model, Samples, Scalar


class _Work(NamedTuple):
  """What a loop over slots reads.

  ``queue`` holds the numbers of the sequences, of which the first ``count``
  wait for a slot; ``bank`` is the cache of the prompts.
  """

  run: Callable
  unembed: Callable
  draw: Callable
  stops: Int[Array, ' N']
  keys: Key[Array, ' B']
  queue: Int[Array, ' B']
  count: Int[Array, '']
  lengths: Int[Array, ' P']
  bank: Cache

  def prompt(self, rows: Int[Array, ' N']) -> Int[Array, ' N']:
    """The prompts of sequences."""
    return rows // (len(self.keys) // len(self.lengths))


class _Slots(NamedTuple):
  """What runs: sequence ``row`` in each live slot has ``step`` tokens so far.

  ``taken`` counts the sequences that have left the queue.
  """

  row: Int[Array, ' N']
  step: Int[Array, ' N']
  live: Bool[Array, ' N']
  taken: Int[Array, '']
  cache: Cache
  samples: Samples


def sample_in_slots(
  model: Model,
  params: Any,
  prompts: Int[Array, 'P S'],
  prompt_mask: Bool[Array, 'P S'],
  key: Key[Array, ''],
  *,
  num_slots: int,
  num_samples: int,
  max_new_tokens: int,
  stop_ids: Sequence[int],
  pad_id: int,
  num_halvings: int = 3,
  temperature: Scalar = 1.0,
  top_k: int | None = None,
  top_p: Scalar | None = None,
  min_p: Scalar | None = None,
  record_kept: bool = False,
  record_routing: bool = False,
  prompt_ids: Int[Array, ' P'] | None = None,
) -> Samples:
  """Sample what `postrain.sampling.sample` does, ``num_slots`` rows at a time.

  Continuous batching inside one program: a slot whose sequence has ended takes
  the next one in the same step. It gets a new segment id, by which the keys
  of the old sequence become invisible, and a copy of its prompt's cache; each
  prompt runs through the model once. When the queue is empty and half of the
  slots are idle, the others go on in half the slots.

  A token is drawn with the same key as in `postrain.sampling.sample`, so the
  results are the same; but the keys of a sequence lie elsewhere in the cache
  and are summed in another order, so log-probs differ in the last bits, and a
  token where two candidates are equal to as many bits.

  Args:
    model: its cache must be a `postrain.models.cache.Cache`.
    params: see `postrain.sampling.sample`, as the arguments not named here.
    prompts: left-padded token ids.
    prompt_mask: True on real tokens.
    key: of this (run, purpose, iteration).
    num_slots: sequences that run at once; more than there are count as these.
    num_samples: completions of each prompt, ``G``.
    max_new_tokens: slots of a completion, ``T``.
    stop_ids: tokens that end a completion.
    pad_id: fills the slots after the end.
    num_halvings: times that the slots are halved; each compiles the loop anew.
    temperature: divides the logits; 0 is greedy.
    top_k: candidates kept, None for all.
    top_p: probability mass kept, in (0, 1], None for all.
    min_p: least probability relative to the best, in [0, 1], None for none.
    record_kept: also return the ids that the filters kept.
    record_routing: also return the experts that each token visited.
    prompt_ids: identities of the prompts for the keys; 0, 1, ... if None.

  Returns:
    Samples of ``B = P * num_samples`` rows, the samples of a prompt together.

  Raises:
    ValueError: the model has another kind of cache, or a number is too small.

  References:
    Yu et al. 2022, Orca: A Distributed Serving System for Transformer-Based
    Generative Models, OSDI (scheduling by iteration).
  """
  check_bounded(record_kept, top_k)
  _check(model, num_slots, num_halvings)
  if prompt_ids is None:
    prompt_ids = jnp.arange(len(prompts))
  keys = sequence_keys(key, prompt_ids, num_samples)
  num_slots = min(num_slots, len(keys))
  filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  draw = functools.partial(choose, record_kept=record_kept, filters=filters)
  capture = ('experts',) if record_routing else ()
  run = functools.partial(forward, model, capture=capture)
  hidden, bank, routing = prefill(model, run, params, prompts, prompt_mask)
  params = served(model, params)
  unembed = functools.partial(model.unembed, params)
  first, logprobs = _first_tokens(unembed, draw, hidden, keys, num_slots)
  samples = empty_samples(first, logprobs, max_new_tokens, pad_id)
  samples = with_experts(samples, prompt_mask, routing)
  rows = jnp.arange(len(keys), dtype=jnp.int32)
  stops = jnp.asarray(tuple(stop_ids), prompts.dtype)
  samples, waits = write_tokens(samples, rows, 0 * rows, first, logprobs, stops)
  work = _Work(
    functools.partial(run, params), unembed, draw, stops, keys,
    queue=jnp.argsort(~waits, stable=True).astype(jnp.int32),
    count=waits.sum(dtype=jnp.int32),
    lengths=prompt_mask.sum(-1, dtype=jnp.int32),
    bank=bank,
  )  # fmt: skip
  slots = _idle(model, bank, samples, num_slots)
  return _emptied(work, slots, num_halvings).samples


def _check(model: Model, num_slots: int, num_halvings: int) -> None:
  for name, value, least in (
    ('num_slots', num_slots, 1), ('num_halvings', num_halvings, 0)
  ):  # fmt: skip
    if value < least:
      raise ValueError(f'{name}={value}: it must be at least {least}')
  cache = jax.eval_shape(lambda: model.empty_cache(1, 1))
  if not isinstance(cache, Cache):
    raise ValueError(
      f'the cache of this model is a {type(cache).__name__}, whose rows cannot'
      ' be refilled: sample without slots (sampling.num_slots=None), or give'
      ' it a postrain.models.cache.Cache'
    )


def _first_tokens(
  unembed: Callable, draw: Callable, hidden: Array, keys: Array, num_slots: int
) -> tuple[Draw, Array]:
  """Draw the first token of every sequence.

  In slices, lest the logits of the whole queue exist at once.
  """
  num_samples = len(keys) // len(hidden)

  def begin(piece: tuple[Array, Array]) -> tuple[Draw, Array]:
    logits = jnp.repeat(unembed(piece[0][None]), num_samples, axis=0)
    return draw(logits, jnp.int32(0), keys=piece[1])

  grouped = keys.reshape(len(hidden), num_samples)
  size = max(num_slots // num_samples, 1)
  found = jax.lax.map(begin, (hidden, grouped), batch_size=size)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def write_tokens(
  samples: Samples, rows: Array, step: Array, drawn: Draw, logprobs: Array,
  stops: Array,
) -> tuple[Samples, Array]:  # fmt: skip
  """Write a token of each row into its column; also tell which rows go on.

  Rows beyond the last are dropped.
  """

  def put(buffer: Any, value: Array) -> Array:
    value = value.astype(buffer.dtype)
    return buffer.at[rows, step].set(value, mode='drop')

  stopped = jnp.isin(drawn.tokens, stops)
  full = step + 1 == samples.tokens.shape[1]
  samples = samples._replace(
    tokens=put(samples.tokens, drawn.tokens),
    mask=put(samples.mask, jnp.ones_like(stopped)),
    sampler_logprobs=put(samples.sampler_logprobs, drawn.logprobs),
    model_logprobs=put(samples.model_logprobs, logprobs),
    truncated=samples.truncated.at[rows].set(full & ~stopped, mode='drop'),
    kept=None if drawn.kept is None else put(samples.kept, drawn.kept),
  )
  return samples, ~stopped & ~full


def _idle(
  model: Model, bank: Cache, samples: Samples, num_slots: int
) -> _Slots:
  """Slots in which nothing runs."""
  length = max(samples.tokens.shape[1] - 1, 1)
  prefix = jax.tree.map(
    lambda x: jnp.zeros((num_slots, *x.shape[1:]), x.dtype) if x.ndim else x,
    bank,
  )
  return _Slots(
    row=jnp.zeros(num_slots, jnp.int32),
    step=jnp.ones(num_slots, jnp.int32),
    live=jnp.zeros(num_slots, bool),
    taken=jnp.int32(0),
    cache=model.empty_cache(num_slots, length, prefix),
    samples=samples,
  )


def _emptied(work: _Work, slots: _Slots, num_halvings: int) -> _Slots:
  """Run until the queue and all slots are empty, at last in fewer slots."""
  size = len(slots.live)
  halves = [size >> i for i in range(1, num_halvings + 1) if size >> i]

  def run(slots: _Slots, step: Callable, enough: int) -> _Slots:
    def busy(slots: _Slots) -> Array:
      return (slots.taken < work.count) | (slots.live.sum() > enough)

    return _shrunk(jax.lax.while_loop(busy, step, slots), enough)

  first, *others = [*halves, 0]
  slots = run(slots, lambda slots: _decode(work, _refill(work, slots)), first)
  for enough in others:
    slots = run(slots, functools.partial(_decode, work), enough)
  return slots


def _refill(work: _Work, slots: _Slots) -> _Slots:
  """Put the next sequences of the queue into idle slots."""
  place = slots.taken + jnp.cumsum(~slots.live, dtype=jnp.int32) - 1
  fresh = ~slots.live & (place < work.count)
  row = jnp.where(fresh, work.queue[place], slots.row)
  prompt, targets = work.prompt(row), jnp.argsort(~fresh, stable=True)
  bank, prefix = work.bank, slots.cache.prefix

  def copy(i: Array, levels: Any) -> Any:
    target = targets[i]
    source = prompt[target]

    def put(old: Array, new: Array) -> Array:
      new = jax.lax.dynamic_slice_in_dim(new, source, 1)
      return jax.lax.dynamic_update_slice_in_dim(old, new, target, 0)

    return jax.tree.map(put, levels, (bank.keys, bank.values))

  count = fresh.sum(dtype=jnp.int32)
  keys, values = jax.lax.fori_loop(0, count, copy, (prefix.keys, prefix.values))
  # A segment of its own: what was in the slot before is invisible to it.
  ids = bank.segment_ids[prompt] * (row + 1)[:, None]
  prefix = prefix._replace(
    keys=keys,
    values=values,
    positions=jnp.where(
      fresh[:, None], bank.positions[prompt], prefix.positions
    ),
    segment_ids=jnp.where(fresh[:, None], ids, prefix.segment_ids),
  )
  return slots._replace(
    row=row,
    step=jnp.where(fresh, 1, slots.step),
    live=slots.live | fresh,
    taken=slots.taken + count,
    cache=slots.cache._replace(prefix=prefix),
  )


def _decode(work: _Work, slots: _Slots) -> _Slots:
  """Give each running sequence a token."""
  row, step, live, samples = slots.row, slots.step, slots.live, slots.samples
  hidden, cache, routing = work.run(
    samples.tokens[row, step - 1].astype(work.stops.dtype)[:, None],
    positions=(work.lengths[work.prompt(row)] + step - 1)[:, None],
    segment_ids=jnp.where(live, row + 1, 0)[:, None],
    cache=slots.cache,
  )
  logits = work.unembed(hidden[:, 0])
  drawn, logprobs = work.draw(logits, step, keys=work.keys[row])
  rows = jnp.where(live, row, len(work.keys))
  if samples.experts is not None:
    place = samples.experts.shape[1] - samples.tokens.shape[1] + step - 1
    visited = samples.experts.at[rows, place].set(
      routing['experts'][:, 0], mode='drop'
    )
    samples = samples._replace(experts=visited)
  samples, goes = write_tokens(samples, rows, step, drawn, logprobs, work.stops)
  return slots._replace(
    step=step + 1, live=live & goes, cache=cache, samples=samples
  )


def _shrunk(slots: _Slots, size: int) -> _Slots:
  """The first ``size`` slots, running ones first."""
  order = jnp.argsort(~slots.live, stable=True)[:size]

  def rows(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[order] if x.ndim else x, tree)

  row, step, live, cache = rows((*slots[:3], slots.cache))
  return slots._replace(row=row, step=step, live=live, cache=cache)
