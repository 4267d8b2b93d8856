"""A completion as it is decoded: its tokens, and text that stays."""

from collections.abc import Callable, Iterator, Sequence
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np

from postrain.data.buckets import bucket, bucket_sizes, padded
from postrain.policies import Policy
from postrain.sampling import draw, sequence_keys
from postrain.scoring import token_positions

# Half of a character, as decoders show it.
_INCOMPLETE = '\N{REPLACEMENT CHARACTER}'
_BYTE_TOKEN = re.compile('<0x[0-9A-F]{2}>')


class _State(NamedTuple):
  """A completion in the making: its last token, not yet in the cache."""

  step: Array
  token: Array
  cache: Any


def make_streamer(
  policy: Policy,
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
) -> Callable[[Sequence[int], Key[Array, ''], int], Iterator[int]]:
  """Make ``stream(prompt_ids, key, sample)``, which yields tokens one by one.

  The tokens are those that `postrain.sampling.sample` draws for the first
  prompt and this sample with the same key and filters; the stop token, if one
  is met, comes last. Prompts are padded to few lengths: a conversation compiles
  a handful of programs.

  Raises:
    ValueError: of ``stream``: the prompt leaves no room for the completion.
  """
  params = jax.device_put(policy.params)
  room = policy.room(max_new_tokens)
  filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  start = jax.jit(functools.partial(_start, policy, max_new_tokens, filters))
  advance = jax.jit(
    functools.partial(_advance, policy, filters), donate_argnums=1
  )

  def stream(
    prompt_ids: Sequence[int], key: Key[Array, ''], sample: int
  ) -> Iterator[int]:
    if len(prompt_ids) > room:
      raise ValueError(
        f'the prompt has {len(prompt_ids)} tokens, of which {room} leave room'
        f' for max_new_tokens={max_new_tokens}: shorten it, or lower the limit'
      )
    length = bucket(len(prompt_ids), bucket_sizes(room, num_buckets=16))
    tokens, mask = padded(
      [prompt_ids], length=length, pad_id=policy.pad_id, side='left'
    )
    own_key = sequence_keys(key, jnp.arange(1), sample + 1)[sample:]
    state = start(params, tokens, mask, own_key)
    for left in reversed(range(max_new_tokens)):
      token = int(state.token[0])
      yield token
      if token in policy.stop_ids or not left:
        return
      state = advance(params, state, np.int32(len(prompt_ids)), own_key)

  return stream


def _start(
  policy: Policy,
  max_new_tokens: int,
  filters: dict[str, Any],
  params: Any,
  tokens: Array,
  mask: Array,
  key: Array,
) -> _State:
  """Run the prompt through the model and draw the first token."""
  hidden, prefix = policy.model.hidden(
    params,
    tokens,
    positions=token_positions(mask),
    segment_ids=mask.astype(jnp.int32),
    cache=policy.model.empty_cache(*tokens.shape),
  )
  step = jnp.int32(0)
  token = _draw(policy, filters, params, hidden[:, -1], key, step)
  cache = policy.model.empty_cache(1, max(max_new_tokens - 1, 1), prefix)
  return _State(step + 1, token, cache)


def _advance(
  policy: Policy,
  filters: dict[str, Any],
  params: Any,
  state: _State,
  prompt_length: Array,
  key: Array,
) -> _State:
  """Run the last token through the model and draw the next."""
  position = prompt_length + state.step - 1
  hidden, cache = policy.model.hidden(
    params,
    state.token[:, None],
    positions=position[None, None],
    segment_ids=jnp.ones((1, 1), jnp.int32),
    cache=state.cache,
  )
  token = _draw(policy, filters, params, hidden[:, 0], key, state.step)
  return _State(state.step + 1, token, cache)


def _draw(
  policy: Policy,
  filters: dict[str, Any],
  params: Any,
  hidden: Array,
  key: Array,
  step: Array,
) -> Array:
  step_key = jax.vmap(jax.random.fold_in, (0, None))(key, step)
  drawn = draw(policy.model.unembed(params, hidden), step_key, **filters)
  return drawn.tokens.astype(jnp.int32)


class TextStream:
  """Turn tokens into text piece by piece; what was given out stays.

  A character may span tokens, and what a decoder shows of half of it changes
  when the rest arrives: such an end is held back. So is a run of byte tokens
  (``<0xE2>``), which decoders read as a whole.
  """

  def __init__(self, policy: Policy):
    self._policy = policy
    self._ids: list[int] = []
    self._length = 0

  def push(self, token: int) -> str:
    """Add a token; returns the text that is certain now."""
    self._ids.append(token)
    name = self._policy.tokenizer.convert_ids_to_tokens(token)
    if name is None or _BYTE_TOKEN.fullmatch(name):
      return ''
    return self._rest(self.text.rstrip(_INCOMPLETE))

  def flush(self) -> str:
    """End the completion; returns what was held back."""
    return self._rest(self.text)

  @property
  def text(self) -> str:
    """All of it, as `Policy.decode` gives it."""
    return self._policy.decode(self._ids)

  @property
  def num_tokens(self) -> int:
    """Tokens so far, the stop token included."""
    return len(self._ids)

  @property
  def stopped(self) -> bool:
    """Whether the last token ends the completion."""
    return bool(self._ids) and self._ids[-1] in self._policy.stop_ids

  def _rest(self, text: str) -> str:
    new = text[self._length :]
    self._length += len(new)
    return new
