"""Go on with completions that are under way, under other parameters too."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key
import numpy as np

from postrain.models.cache import Cache
from postrain.sampling.engine import write_tokens
from postrain.sampling.sampler import choose, prefill, sequence_keys, served
from postrain.scoring import forward
from postrain.types import Model, Samples, Scalar


class _Loop(NamedTuple):
  """What runs: each row that is ``live`` has got ``step`` tokens."""

  step: Array
  live: Array
  cache: Any
  samples: Samples


def ended(
  samples: Samples, stop_ids: Sequence[int]
) -> Bool[Array | np.ndarray, ' B']:
  """Which completions go no further: a stop token, or every slot filled."""
  stops = np.asarray(tuple(stop_ids), samples.tokens.dtype)[None, None]
  stop = (samples.tokens[..., None] == stops).any(-1)
  return (stop & samples.mask).any(-1) | samples.mask.all(-1)


def extend(
  model: Model,
  params: Any,
  prompts: Int[Array, 'P S'],
  prompt_mask: Bool[Array, 'P S'],
  samples: Samples,
  key: Key[Array, ''],
  *,
  max_steps: int,
  stop_ids: Sequence[int],
  temperature: Scalar = 1.0,
  top_k: int | None = None,
  top_p: Scalar | None = None,
  min_p: Scalar | None = None,
  version: Int[Array, ''] | int = 0,
  prompt_ids: Int[Array, ' P'] | None = None,
) -> Samples:
  """Give each completion that has not ended up to ``max_steps`` more tokens.

  Row b has n_b tokens, of which this call reads all in one pass behind those of
  the prompt, and goes on at position n_b. The key of a token is that of
  `postrain.sampling.sample`, fold(fold(fold(key, prompt_ids[p]), g), t): with
  the same parameters, t tokens of `sample` followed by this are what `sample`
  gives at once, but for the last bits of log-probs.

  Tokens and log-probs that are there stay as they are: where parameters have
  moved, each token keeps the log-prob under those that drew it.

  Args:
    model: see `postrain.types.Model`.
    params: its parameters.
    prompts: left-padded token ids.
    prompt_mask: True on real tokens.
    samples: so far, ``B = P * G`` rows, filled from the first slot on; rows
      without a token begin.
    key: of this (run, purpose).
    max_steps: tokens that a row gets, at most; the slots of ``samples`` are
      the other limit.
    stop_ids: tokens that end a completion.
    temperature: divides the logits; 0 is greedy.
    top_k: candidates kept, None for all.
    top_p: probability mass kept, in (0, 1], None for all.
    min_p: least probability relative to the best, in [0, 1], None for none.
    version: of the parameters; stamped on the new tokens if ``samples`` has a
      ``version``.
    prompt_ids: identities of the prompts for the keys; 0, 1, ... if None.

  Returns:
    Samples of the same shapes. ``truncated`` rows have filled all their slots;
    which rows have ended is told by `ended`.

  Raises:
    ValueError: ``max_steps`` is less than 1, or the samples record candidates
      or experts, which an earlier version of the policy chose.

  References:
    Kimi Team 2025, Kimi k1.5, arXiv:2501.12599 (partial rollouts).
  """
  _check(samples, max_steps)
  if prompt_ids is None:
    prompt_ids = jnp.arange(len(prompts))
  num_rows = len(samples.tokens)
  num_samples = num_rows // len(prompts)
  keys = sequence_keys(key, prompt_ids, num_samples)
  filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  draw = functools.partial(
    choose, keys=keys, record_kept=False, filters=filters
  )
  run = functools.partial(forward, model)
  lengths = jnp.repeat(prompt_mask.sum(-1, dtype=jnp.int32), num_samples)
  counts = samples.mask.sum(-1, dtype=jnp.int32)
  rows = jnp.arange(num_rows, dtype=jnp.int32)
  stops = jnp.asarray(tuple(stop_ids), prompts.dtype)
  last, prefix, _ = prefill(model, run, params, prompts, prompt_mask)
  cache = _room(model, prefix, samples, max_steps)
  hidden, cache = _read(run, params, samples, cache, lengths, counts)
  last = jnp.repeat(last, num_samples, axis=0)
  params = served(model, params)

  def write(step: Array, hidden: Array, live: Array, samples: Samples) -> Any:
    drawn, logprobs = draw(model.unembed(params, hidden), counts + step)
    places = jnp.where(live, rows, num_rows)
    samples, goes = write_tokens(
      samples, places, counts + step, drawn, logprobs, stops
    )
    return live & goes, samples

  def decode(loop: _Loop) -> _Loop:
    at = counts + loop.step - 1
    hidden, cache, _ = run(
      params, loop.samples.tokens[rows, at].astype(prompts.dtype)[:, None],
      positions=(lengths + at)[:, None],
      segment_ids=loop.live.astype(jnp.int32)[:, None], cache=loop.cache,
    )  # fmt: skip
    live, filled = write(loop.step, hidden[:, 0], loop.live, loop.samples)
    return _Loop(loop.step + 1, live, cache, filled)

  def unfinished(loop: _Loop) -> Array:
    return (loop.step < max_steps) & loop.live.any()

  hidden = jnp.where(counts[:, None] > 0, hidden, last)
  live: Any = ~ended(samples, stop_ids)
  live, filled = write(jnp.int32(0), hidden, live, samples)
  state = _Loop(jnp.int32(1), live, cache, filled)
  final = jax.lax.while_loop(unfinished, decode, state).samples
  return _stamped(final, samples, version)


def _check(samples: Samples, max_steps: int) -> None:
  if max_steps < 1:
    raise ValueError(f'max_steps={max_steps}: it must be at least 1')
  for name in ('kept', 'experts'):
    if getattr(samples, name) is not None:
      raise ValueError(
        f'samples.{name} is recorded, of parameters that may have moved since:'
        f' go on with samples._replace({name}=None), and sample without'
      )


def _room(model: Model, prefix: Any, samples: Samples, max_steps: int) -> Any:
  """Slots for the tokens that are there, right-aligned, and for new ones.

  A `Cache` is a ring: new tokens take the slots of the padding, and those of a
  row's own tokens when it has ended only.
  """
  num_rows, length = samples.tokens.shape
  if not isinstance(prefix, Cache):
    length += max_steps - 1
  return model.empty_cache(num_rows, length, prefix)


def _read(
  run: Callable, params: Any, samples: Samples, cache: Any, lengths: Array,
  counts: Array,
) -> tuple[Array, Any]:  # fmt: skip
  """The hidden state after the last token of each row, and its cache."""
  slots = jnp.arange(samples.tokens.shape[1], dtype=jnp.int32)
  places = slots[None] - (len(slots) - counts)[:, None]  # aligned on the right
  own, places = places >= 0, jnp.maximum(places, 0)
  hidden, cache, _ = run(
    params,
    jnp.take_along_axis(samples.tokens, places, axis=1),
    positions=lengths[:, None] + places,
    segment_ids=own.astype(jnp.int32),
    cache=cache,
  )
  return hidden[:, -1], cache


def _stamped(final: Samples, before: Samples, version: Any) -> Samples:
  if before.version is None:
    return final
  new = final.mask & ~before.mask
  return final._replace(version=jnp.where(new, version, before.version))
