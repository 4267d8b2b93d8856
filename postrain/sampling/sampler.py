"""Sample groups of completions: prefill once a prompt, decode until all end."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from postrain.logprobs import token_logprobs
from postrain.sampling.filters import Draw, draw
from postrain.scoring import forward, token_positions
from postrain.types import Model, Samples, Scalar


def sequence_keys(
  key: Key[Array, ''], prompt_ids: Int[Array, ' P'], num_samples: int
) -> Key[Array, ' B']:
  """One key per (prompt, sample): neighbours of a prompt change nothing."""
  prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  samples = jnp.arange(num_samples, dtype=jnp.uint32)
  return jax.vmap(fold, (0, None))(prompt_keys, samples).reshape(-1)


class _Loop(NamedTuple):
  step: Array
  last: Array
  done: Array
  cache: Any
  samples: Samples


def sample(
  model: Model,
  params: Any,
  prompts: Int[Array, 'P S'],
  prompt_mask: Bool[Array, 'P S'],
  key: Key[Array, ''],
  *,
  num_samples: int,
  max_new_tokens: int,
  stop_ids: Sequence[int],
  pad_id: int,
  num_cache_sizes: int = 1,
  temperature: Scalar = 1.0,
  top_k: int | None = None,
  top_p: Scalar | None = None,
  min_p: Scalar | None = None,
  record_kept: bool = False,
  record_routing: bool = False,
  prompt_ids: Int[Array, ' P'] | None = None,
) -> Samples:
  """Sample ``num_samples`` completions of each prompt.

  The token at position t of sample g of prompt p is drawn with the key
  fold(fold(fold(key, prompt_ids[p]), g), t), so that it depends neither on the
  other prompts nor on the number of samples. The prompt runs through the model
  once; its samples share its cache. The loop ends when all sequences have.

  Args:
    model: see `postrain.types.Model`.
    params: its parameters.
    prompts: left-padded token ids.
    prompt_mask: True on real tokens.
    key: of this (run, purpose, iteration).
    num_samples: completions of each prompt, ``G``.
    max_new_tokens: slots of a completion, ``T``.
    stop_ids: tokens that end a completion; they are kept and in the mask.
    pad_id: fills the slots after the end.
    num_cache_sizes: that the cache of completions grows through, in equal
      steps; each compiles the loop anew.
    temperature: divides the logits; 0 is greedy.
    top_k: candidates kept, None for all.
    top_p: probability mass kept, in (0, 1], None for all.
    min_p: least probability relative to the best, in [0, 1], None for none.
    record_kept: also return the ids that the filters kept; needs ``top_k``,
      which bounds their number.
    record_routing: also return the experts that each token visited.
    prompt_ids: identities of the prompts for the keys; 0, 1, ... if None.

  Returns:
    Samples of ``B = P * num_samples`` rows, the samples of a prompt together.

  Raises:
    ValueError: ``record_kept`` without ``top_k``, or a number is too small.
  """
  check_bounded(record_kept, top_k)
  if prompt_ids is None:
    prompt_ids = jnp.arange(len(prompts))
  keys = sequence_keys(key, prompt_ids, num_samples)
  filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  chosen = functools.partial(
    choose, keys=keys, record_kept=record_kept, filters=filters
  )
  lengths = jnp.repeat(prompt_mask.sum(-1, dtype=jnp.int32), num_samples)
  stops = jnp.asarray(tuple(stop_ids), prompts.dtype)
  capture = ('experts',) if record_routing else ()
  run = functools.partial(forward, model, capture=capture)
  last, prefix, routing = prefill(model, run, params, prompts, prompt_mask)
  params = served(model, params)
  logits = jnp.repeat(model.unembed(params, last), num_samples, axis=0)
  first, model_logprobs = chosen(logits, jnp.int32(0))
  buffers = empty_samples(first, model_logprobs, max_new_tokens, pad_id)
  buffers = with_experts(buffers, prompt_mask, routing)
  done = jnp.zeros(len(keys), bool)
  empty = functools.partial(model.empty_cache, len(keys), prefix=prefix)
  state = _Loop(
    step=jnp.int32(1),
    last=first.tokens.astype(prompts.dtype),
    done=jnp.isin(first.tokens, stops),
    cache=None,
    samples=_write(buffers, jnp.int32(0), first, model_logprobs, done),
  )

  def decode(loop: _Loop) -> _Loop:
    hidden, cache, routing = run(
      params, loop.last[:, None], positions=(lengths + loop.step - 1)[:, None],
      segment_ids=(~loop.done).astype(jnp.int32)[:, None], cache=loop.cache,
    )  # fmt: skip
    logits = model.unembed(params, hidden[:, 0])
    drawn, model_logprobs = chosen(logits, loop.step)
    samples = _write_experts(loop.samples, loop.step, routing, loop.done)
    return _Loop(
      step=loop.step + 1,
      last=jnp.where(loop.done, pad_id, drawn.tokens).astype(prompts.dtype),
      done=loop.done | jnp.isin(drawn.tokens, stops),
      cache=cache,
      samples=_write(samples, loop.step, drawn, model_logprobs, loop.done),
    )

  return _decoded(decode, state, empty, max_new_tokens, num_cache_sizes)


def _cache_sizes(max_new_tokens: int, number: int) -> list[int]:
  """Slots for completions, in equal steps up to all but their last token."""
  if number < 1:
    raise ValueError(f'num_cache_sizes={number}: it must be at least 1')
  slots = max(max_new_tokens - 1, 1)
  number = min(number, slots)
  return [-(-slots * (i + 1) // number) for i in range(number)]


def _decoded(
  decode: Callable[[_Loop], _Loop], loop: _Loop,
  empty: Callable[[int], Any], max_new_tokens: int, num_cache_sizes: int,
) -> Samples:  # fmt: skip
  """Run until all have ended, in a cache of one size after the other."""

  def put(new: Array, old: Array) -> Array:
    return jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim)

  def goes(end: int, loop: _Loop) -> Array:
    return (loop.step < end) & ~loop.done.all()

  for size in _cache_sizes(max_new_tokens, num_cache_sizes):
    cache = empty(size)
    if loop.cache is not None:  # it moves to the start of the longer one
      cache = jax.tree.map(put, cache, loop.cache)
    end = min(size + 1, max_new_tokens)  # the first token needs no slot
    loop = jax.lax.while_loop(
      functools.partial(goes, end), decode, loop._replace(cache=cache)
    )
  return loop.samples._replace(truncated=~loop.done)


def served(model: Model, params: Any) -> Any:
  """Parameters as a loop over tokens reads them."""
  return params if model.serving is None else model.serving(params)


def check_bounded(record_kept: bool, top_k: int | None) -> None:
  """Refuse to record kept sets of any size."""
  if record_kept and top_k is None:
    raise ValueError(
      'record_kept=True needs top_k, which bounds the recorded set:'
      ' set it, for example, to 128'
    )


def prefill(
  model: Model, run: Callable, params: Any, prompts: Array, prompt_mask: Array
) -> tuple[Array, Any, dict[str, Array]]:
  """The last hidden state of each prompt, its cache, where its tokens went."""
  hidden, cache, routing = run(
    params,
    prompts,
    positions=token_positions(prompt_mask),
    segment_ids=prompt_mask.astype(jnp.int32),
    cache=model.empty_cache(*prompts.shape),
  )
  return hidden[:, -1], cache, routing


def choose(
  logits: Array, step: Array, *, keys: Array, record_kept: bool,
  filters: Mapping[str, Any],
) -> tuple[Draw, Array]:  # fmt: skip
  """Draw at a completion position; also the plain model's log-prob."""
  steps = jnp.broadcast_to(step, keys.shape)
  step_keys = jax.vmap(jax.random.fold_in)(keys, steps)
  drawn = draw(logits, step_keys, **filters)
  if not record_kept:
    drawn = drawn._replace(kept=None)
  return drawn, token_logprobs(logits, drawn.tokens)


def empty_samples(
  drawn: Draw, logprobs: Array, length: int, pad_id: int
) -> Samples:
  """Completions without a token, of as many rows as were drawn for."""
  shape = (drawn.tokens.shape[0], length)
  kept = drawn.kept
  return Samples(
    tokens=jnp.full(shape, pad_id, jnp.int32),
    mask=jnp.zeros(shape, bool),
    sampler_logprobs=jnp.zeros(shape, logprobs.dtype),
    model_logprobs=jnp.zeros(shape, logprobs.dtype),
    truncated=jnp.zeros(shape[:1], bool),
    kept=None if kept is None else jnp.full((*shape, kept.shape[-1]), -1),
  )


def _write(
  samples: Samples, step: Array, drawn: Draw, logprobs: Array, done: Array
) -> Samples:
  """Put a drawn token into its column, unless the sequence has ended."""

  def column(buffer: Any, value: Array) -> Array:
    live = ~done if value.ndim == 1 else ~done[:, None]
    return buffer.at[:, step].set(
      jnp.where(live, value.astype(buffer.dtype), buffer[:, step])
    )

  return samples._replace(
    tokens=column(samples.tokens, drawn.tokens),
    mask=column(samples.mask, ~done),
    sampler_logprobs=column(samples.sampler_logprobs, drawn.logprobs),
    model_logprobs=column(samples.model_logprobs, logprobs),
    kept=None if drawn.kept is None else column(samples.kept, drawn.kept),
  )


def with_experts(
  samples: Samples, valid: Array, routing: dict[str, Array]
) -> Samples:
  """Room for the experts of completions, behind those of the prompts."""
  if 'experts' not in routing:
    return samples
  batch_size, length = samples.tokens.shape
  visited = jnp.where(valid[..., None, None], routing['experts'], -1)
  visited = jnp.repeat(visited, batch_size // len(valid), axis=0)
  widths = ((0, 0), (0, length), (0, 0), (0, 0))
  return samples._replace(experts=jnp.pad(visited, widths, constant_values=-1))


def _write_experts(
  samples: Samples, step: Array, routing: dict[str, Array], done: Array
) -> Samples:
  """Put what the token before ``step`` visited into its column, if recorded."""
  if samples.experts is None:
    return samples
  visited = jnp.where(done[:, None, None], -1, routing['experts'][:, 0])
  place = samples.experts.shape[1] - samples.tokens.shape[1] + step - 1
  return samples._replace(experts=samples.experts.at[:, place].set(visited))
