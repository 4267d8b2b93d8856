"""Sums in steps: ``2 4 5`` is continued by ``4 6; 5 4;`` and stop, modulo 7.

Token ids: the numbers 0 to M − 1, then the end of a step, padding and stop.
`noisy_policy` errs at known rates, and `success_chances` says how likely the
answer of what it has begun is still to be right.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from postrain.types import Model, Task


class Steps(NamedTuple):
  """Steps of completions, S = T // 3 places, in the order of writing.

  Attributes:
    sums: of each step, whatever it says.
    used: how many numbers of the prompt are added by then.
    written: three tokens of the right kinds, and so are all before.
    right: and adds what it should to the sum before, right or wrong.
  """

  sums: Int[Array, 'B S']
  used: Int[Array, 'B S']
  written: Bool[Array, 'B S']
  right: Bool[Array, 'B S']


def chain(
  *, modulus: int = 7, num_steps: int = 4, num_repeats: int = 0
) -> Task:
  """Add numbers one by one; every step has an exact verifier.

  A prompt is x₀ x₁ ... x_K with xᵢ ≠ 0 for i ≥ 1; it is held out iff x₀ = x_K.
  A step is three tokens: what is added, the sum modulo M, the end of a step.
  It adds the next number of the prompt, or 0: then it says the sum once more,
  which is right and leads nowhere. An error stays in the sums that follow, and
  a second one may undo it: a right answer of wrong steps.

  Rewards, each a function of the tokens under the mask alone:
    answer: 1 iff the last sum is x₀ + ... + x_K, then the stop token.
    sound: 1 iff all steps are right and add all numbers, then the stop token.
    steps: the share of the written steps that are right, 0 without any.

  Args:
    modulus: M ≥ 3.
    num_steps: K ≥ 2.
    num_repeats: steps that a completion has room for beyond K, ≥ 0.

  Raises:
    ValueError: a size out of range.
  """
  _check(modulus, num_steps, num_repeats)
  pad, stop = modulus + 1, modulus + 2

  def prompt(
    key: Key[Array, ''], held_out: bool = False
  ) -> tuple[Int[Array, ' S'], Bool[Array, ' S']]:
    shape = (num_steps + 1,)
    draws = jax.random.randint(key, shape, 1, modulus, dtype=jnp.int32)
    # The first draw is how far the first number is from the last.
    distance = 0 if held_out else draws[0]
    first = (draws[-1] + distance) % modulus
    return draws.at[0].set(first), jnp.ones(shape, bool)

  def judged(
    prompts: Int[Array, 'B S'],
    completions: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
  ) -> tuple[Steps, Bool[Array, ' B'], Bool[Array, ' B']]:
    """Steps; whether the answer is right; whether all else is."""
    steps = read_steps(prompts, completions, mask, modulus=modulus)
    count = steps.written.sum(-1, dtype=jnp.int32)
    ends = (jnp.where(mask, completions, pad) == stop).astype(jnp.int32)
    place = jnp.minimum(3 * count, mask.shape[1] - 1)[:, None]
    stopped = jnp.take_along_axis(ends, place, 1)[:, 0] > 0
    stopped &= mask.sum(-1, dtype=jnp.int32) == 3 * count + 1
    last = jnp.maximum(count - 1, 0)[:, None]
    found = jnp.take_along_axis(steps.sums, last, 1)[:, 0]
    used = jnp.take_along_axis(steps.used, last, 1)[:, 0]
    total = prompts.sum(-1, dtype=jnp.int32) % modulus
    answer = stopped & (count > 0) & (found == total)
    whole = (steps.right == steps.written).all(-1) & (used == num_steps)
    return steps, answer, whole

  def answer(
    prompts: Int[Array, 'B S'],
    completions: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
  ) -> Float[Array, ' B']:
    return judged(prompts, completions, mask)[1].astype(jnp.float32)

  def sound(
    prompts: Int[Array, 'B S'],
    completions: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
  ) -> Float[Array, ' B']:
    _, right, whole = judged(prompts, completions, mask)
    return (right & whole).astype(jnp.float32)

  def share(
    prompts: Int[Array, 'B S'],
    completions: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
  ) -> Float[Array, ' B']:
    steps = read_steps(prompts, completions, mask, modulus=modulus)
    right, written = (
      x.sum(-1).astype(jnp.float32) for x in (steps.right, steps.written)
    )
    return right / jnp.maximum(written, 1)

  def solution(
    prompts: Int[Array | np.ndarray, 'B S'],
  ) -> tuple[Int[Array, 'B T'], Bool[Array, 'B T']]:
    prompts = jnp.asarray(prompts)
    sums = jnp.cumsum(prompts, -1, dtype=jnp.int32) % modulus
    steps = jnp.stack([prompts, sums, jnp.full_like(sums, modulus)], -1)[:, 1:]
    tokens = steps.reshape(len(prompts), -1)
    room = ((0, 0), (0, 1 + 3 * num_repeats))
    tokens = jnp.pad(tokens, room, constant_values=pad)
    tokens = tokens.at[:, 3 * num_steps].set(stop)
    return tokens, tokens != pad

  def render(ids: Sequence[int] | np.ndarray | Array) -> str:
    written = {modulus: ';', pad: '', stop: '$'}
    words = (written.get(i, str(i)) for i in np.asarray(ids).tolist())
    return ' '.join(filter(None, words)).replace(' ;', ';')

  return Task(
    vocab_size=modulus + 3,
    pad_id=pad,
    stop_ids=(stop,),
    prompt_length=num_steps + 1,
    completion_length=3 * (num_steps + num_repeats) + 1,
    prompt=prompt,
    rewards={'answer': answer, 'sound': sound, 'steps': share},
    render=render,
    solution=solution,
  )


def read_steps(
  prompts: Int[Array, 'B N'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  modulus: int,
) -> Steps:
  """The steps of completions of `chain`, and which of them are right."""
  count = completions.shape[1] // 3

  def by_step(x: Array) -> Array:
    return x[:, : 3 * count].reshape(-1, count, 3)

  added, sums, ends = jnp.moveaxis(by_step(completions), -1, 0)
  formed = (added < modulus) & (sums < modulus) & (ends == modulus)
  formed &= by_step(mask).all(-1)
  written = jnp.cumsum(~formed, -1) == 0
  uses = written & (added > 0)
  used = jnp.cumsum(uses, -1, dtype=jnp.int32)
  last = prompts.shape[1] - 1
  wanted = jnp.take_along_axis(prompts, jnp.minimum(used, last), 1)
  before = jnp.concatenate([prompts[:, :1], sums[:, :-1]], 1)
  right = written & (~uses | ((used <= last) & (added == wanted)))
  right &= sums == (before + added) % modulus
  return Steps(sums, used, written, right)


class _State(NamedTuple):
  """What `noisy_policy` knows of a row: its cache."""

  prompt: Int[Array, 'B N']
  used: Int[Array, ' B']
  repeats: Int[Array, ' B']
  value: Int[Array, ' B']
  added: Int[Array, ' B']


def noisy_policy(
  *,
  error_rates: Sequence[float],
  num_steps: int = 4,
  num_repeats: int = 0,
  repeat_rate: float = 0.0,
) -> Model:
  """A policy of `chain` that errs at known rates.

  It adds the numbers in their order. Its sum is wrong with the chance ε of the
  number that is added, and then any wrong number alike; an added 0 never is.
  Before each step, the stop too, it says the sum once more with the repeat
  rate, as long as there is room. Parameters: ``error_rates`` and
  ``repeat_rate``.

  Args:
    error_rates: ε of 1 to M − 1, each in [0, 1].
    num_steps, num_repeats: of the task.
    repeat_rate: in [0, 1].

  Raises:
    ValueError: a size or a rate out of range.
  """
  modulus = len(error_rates) + 1
  _check(modulus, num_steps, num_repeats)
  for rate in (*error_rates, repeat_rate):
    if not 0 <= rate <= 1:
      raise ValueError(f'a rate of {rate}: choose it in [0, 1]')
  size = modulus + 3
  eye = np.eye(size, dtype=np.float32)
  numbers = np.asarray(np.arange(size) < modulus, np.float32)

  def init(key: Key[Array, '']) -> dict[str, Array]:
    del key
    rates = jnp.asarray(error_rates, jnp.float32)
    return {'error_rates': rates, 'repeat_rate': jnp.float32(repeat_rate)}

  def read(state: _State, token: Array, position: Array) -> _State:
    """The state behind one more token."""
    kind = jnp.where(position > num_steps, (position - num_steps - 1) % 3, -1)
    here = jnp.arange(num_steps + 1)[None] == position[:, None]
    starts = kind == 0
    value = (kind == 1) | (position == 0)
    return _State(
      jnp.where(here, token[:, None], state.prompt),
      state.used + (starts & (token > 0)).astype(jnp.int32),
      state.repeats + (starts & (token == 0)).astype(jnp.int32),
      jnp.where(value, token, state.value),
      jnp.where(starts, token, state.added),
    )

  def chances(params: dict[str, Array], state: _State, kind: Array) -> Array:
    """Of the next token [B V], whose place in a step is ``kind``."""
    rates = params['error_rates']
    table: Array = jnp.asarray(eye)
    room = state.repeats < num_repeats
    repeat = jnp.where(room, params['repeat_rate'], 0)[:, None]
    place = jnp.minimum(state.used + 1, num_steps)[:, None]
    number = jnp.take_along_axis(state.prompt, place, 1)[:, 0]
    ahead = jnp.where(state.used < num_steps, number, modulus + 2)
    begins = (1 - repeat) * table[ahead] + repeat * table[:1]
    error = jnp.pad(rates, (1, 0))[state.added % modulus][:, None]
    target = table[(state.value + state.added) % modulus]
    wrong = (numbers[None] - target) * error / (modulus - 1)
    of_kind = begins, (1 - error) * target + wrong, table[None, modulus]
    return jnp.select([kind[:, None] == k for k in range(3)], of_kind)

  def hidden(
    params: dict[str, Array],
    tokens: Int[Array, 'B N'],
    *,
    positions: Int[Array, 'B N'],
    segment_ids: Int[Array, 'B N'],
    cache: _State | None = None,
  ) -> tuple[Float[Array, 'B N V'], _State | None]:
    def advance(state: _State, slot: tuple) -> tuple[_State, Array]:
      token, position, segment = slot
      behind = read(state, token, position)
      state = jax.tree.map(
        lambda new, old: jnp.where(
          jnp.expand_dims(segment > 0, range(1, new.ndim)), new, old
        ),
        behind,
        state,
      )
      return state, chances(params, state, (position - num_steps) % 3)

    start = empty_cache(tokens.shape[0], 0) if cache is None else cache
    slots = (tokens.astype(jnp.int32).T, positions.T, segment_ids.T)
    last, rows = jax.lax.scan(advance, start, slots)
    return jnp.moveaxis(rows, 0, 1), None if cache is None else last

  def empty_cache(
    batch_size: int, length: int, prefix: _State | None = None
  ) -> _State:
    del length  # the state stands for all that came before
    if prefix is None:
      zeros = jnp.zeros(batch_size, jnp.int32)
      prompt = jnp.zeros((batch_size, num_steps + 1), jnp.int32)
      return _State(prompt, zeros, zeros, zeros, zeros)
    times = batch_size // prefix.used.shape[0]
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), prefix)

  return Model(
    init, hidden, lambda params, hidden: jnp.log(hidden), empty_cache, size
  )


def success_chances(
  prompts: Int[Array, 'B N'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  error_rates: Float[Array, ' R'],
) -> Float[Array, 'B S']:
  """P(answer | prompt, steps so far) behind each step, of `noisy_policy`.

  With aᵢ = 1 − εᵢ M / (M − 1) of each number still to be added, and A their
  product, an error so far stays where it is with the chance A, and is any
  offset alike otherwise:

      P = (1 − A) / M + A·1[the sum is right so far]

  Args:
    prompts, completions, mask: of `chain`.
    error_rates: ε of 1 to M − 1.

  Returns:
    Chances, 0 where no step is written.
  """
  modulus = error_rates.shape[0] + 1
  steps = read_steps(prompts, completions, mask, modulus=modulus)
  keeps = 1 - jnp.pad(error_rates, (1, 0)) * modulus / (modulus - 1)
  # left[k] is of the numbers behind x_k.
  kept = keeps[prompts[:, 1:]]
  left = jnp.cumprod(jnp.pad(kept, ((0, 0), (0, 1)), constant_values=1)
    [:, ::-1], 1)[:, ::-1]  # fmt: skip
  used = jnp.minimum(steps.used, prompts.shape[1] - 1)
  sums = jnp.cumsum(prompts, 1, dtype=jnp.int32) % modulus
  right = steps.sums == jnp.take_along_axis(sums, used, 1)
  stays = jnp.take_along_axis(left, used, 1)
  chance = (1 - stays) / modulus + jnp.where(right, stays, 0)
  return jnp.where(steps.written, chance, 0)


def _check(modulus: int, num_steps: int, num_repeats: int) -> None:
  if modulus < 3 or num_steps < 2 or num_repeats < 0:
    raise ValueError(
      f'modulus={modulus}, num_steps={num_steps}, num_repeats={num_repeats}:'
      ' choose at least 3, 2 and 0'
    )
