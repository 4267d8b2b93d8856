"""Addition, character by character: ``17+5=`` is continued by ``22`` and stop.

Token ids: the digits are themselves, then plus, equals, padding and stop.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from postrain.types import Task

PLUS, EQUALS, PAD, STOP = 10, 11, 12, 13
CHARACTERS = (*'0123456789+=', '', '$')
MAX_DIGITS = 7  # keeps the split's products within int32


def arithmetic(*, num_digits: int = 2) -> Task:
  """Sums of two numbers below 10^num_digits, without leading zeros.

  A tenth of all pairs (a, b) is held out. With M = 10ⁿ, every pair is

    a = (37 u + 62 b) mod M,  u, b ∈ [0, M),

  for exactly one u, because 37 is invertible; it is held out iff u < M / 10.
  So both sides are drawn uniformly and without a table. For two digits and
  more, either side contains all combinations of last digits. The split is of
  ordered pairs: b+a may be trained where a+b is held out.

  Rewards, each a function of the tokens under the mask alone:
    exact: 1 iff the completion is the sum, then the stop token.
    format: 1 iff it is one digit or more, then the stop token.
    digits: the right characters, stop token included, over the length of the
      answer or the completion, whichever is longer; 1 iff exact.

  Args:
    num_digits: greatest number of digits of an operand, 1 to 7.

  Raises:
    ValueError: num_digits outside of its range.
  """
  if not 1 <= num_digits <= MAX_DIGITS:
    raise ValueError(
      f'num_digits={num_digits}: choose 1 to {MAX_DIGITS}, int32 holds no more'
    )
  size = 10**num_digits

  def prompt(
    key: Key[Array, ''], held_out: bool = False
  ) -> tuple[Int[Array, ' S'], Bool[Array, ' S']]:
    low, high = (0, size // 10) if held_out else (size // 10, size)
    bounds = jnp.array([low, 0]), jnp.array([high, size])
    u, right = jax.random.randint(key, (2,), *bounds, dtype=jnp.int32)
    return question((37 * u + 62 * right) % size, right, num_digits=num_digits)

  def solution(
    prompts: Int[Array | np.ndarray, 'B S'],
  ) -> tuple[Int[Array, 'B T'], Bool[Array, 'B T']]:
    return answer(jnp.asarray(prompts))

  return Task(
    vocab_size=len(CHARACTERS),
    pad_id=PAD,
    stop_ids=(STOP,),
    prompt_length=2 * num_digits + 2,
    completion_length=num_digits + 2,
    prompt=prompt,
    rewards={'exact': exact, 'format': well_formed, 'digits': digits},
    render=render,
    solution=solution,
  )


def question(
  left: Int[Array, ''], right: Int[Array, ''], *, num_digits: int
) -> tuple[Int[Array, ' S'], Bool[Array, ' S']]:
  """The characters of ``left+right=``, left-padded, and their mask."""
  signs = jnp.array([[PLUS], [EQUALS]], jnp.int32)
  numbers = _decimal(jnp.stack([left, right]), width=num_digits)
  tokens = jnp.concatenate([numbers, signs], axis=-1).reshape(-1)
  tokens = tokens[jnp.argsort(tokens != PAD, stable=True)]
  return tokens, tokens != PAD


def answer(
  prompts: Int[Array, 'B S'],
) -> tuple[Int[Array, 'B T'], Bool[Array, 'B T']]:
  """The sum and the stop token, right-padded, T = S/2 + 1, and the mask."""
  is_digit = prompts < PLUS
  after_plus = jnp.cumsum(prompts == PLUS, -1, dtype=jnp.int32) > 0
  left = _number(prompts, is_digit & ~after_plus)
  right = _number(prompts, is_digit & after_plus)
  tokens = _decimal(left + right, width=prompts.shape[1] // 2)
  tokens = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=STOP)
  order = jnp.argsort(tokens == PAD, axis=-1, stable=True)
  tokens = jnp.take_along_axis(tokens, order, axis=-1)
  return tokens, tokens != PAD


def exact(
  prompts: Int[Array, 'B S'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, ' B']:
  """1 iff the completion is the sum, then the stop token."""
  right, longest = _matches(prompts, completions, mask)
  return (right == longest).astype(jnp.float32)


def digits(
  prompts: Int[Array, 'B S'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, ' B']:
  """#{t: yₜ = answerₜ} / max(|y|, |answer|), the stop token counted."""
  right, longest = _matches(prompts, completions, mask)
  return right / longest


def well_formed(
  prompts: Int[Array, 'B S'],
  completions: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
) -> Float[Array, ' B']:
  """1 iff the completion is one digit or more, then the stop token."""
  del prompts
  left_to_come = mask.sum(-1, keepdims=True) - jnp.cumsum(mask, -1)
  fits = jnp.where(left_to_come == 0, completions == STOP, completions < PLUS)
  fits = (fits | ~mask).all(-1) & (mask.sum(-1) >= 2)
  return fits.astype(jnp.float32)


def render(ids: Sequence[int] | np.ndarray | Array) -> str:
  """Write ids as characters: padding as nothing, stop as $, unknown as ?."""
  known = dict(enumerate(CHARACTERS))
  return ''.join(known.get(i, '?') for i in np.asarray(ids).tolist())


def _matches(
  prompts: Array, completions: Array, mask: Array
) -> tuple[Array, Array]:
  """Number of right tokens; length of the answer or completion, the longer."""
  expected, expected_mask = answer(prompts)
  width = max(completions.shape[1], expected.shape[1])
  expected, expected_mask = _widen(width, expected, expected_mask)
  completions, mask = _widen(width, completions, mask)
  right = (completions == expected) & mask & expected_mask
  longest = jnp.maximum(mask.sum(-1), expected_mask.sum(-1))
  return right.sum(-1).astype(jnp.float32), longest.astype(jnp.float32)


def _widen(width: int, *rows: Array) -> list[Array]:
  return [jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in rows]


def _decimal(numbers: Array, *, width: int) -> Array:
  """Decimal digits, right-aligned; padding in place of leading zeros."""
  powers = [10**place for place in reversed(range(width))]
  higher = jnp.stack([numbers // power for power in powers], axis=-1)
  shown = (higher > 0).at[..., -1].set(True)
  return jnp.where(shown, higher % 10, PAD)


def _number(tokens: Array, where: Array) -> Array:
  """The number that the digits of each row under ``where`` write."""
  value = jnp.zeros_like(tokens[:, 0])
  for t in range(tokens.shape[1]):
    value = jnp.where(where[:, t], 10 * value + tokens[:, t], value)
  return value
