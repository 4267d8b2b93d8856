"""Labels of steps from completions that are sampled behind each of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from postrain.sampling import extend
from postrain.types import Model, Samples, Scalar

__all__ = ['at_ends', 'cut_after_steps', 'rollouts_after_steps', 'to_ends']


def at_ends(
  values: Shaped[Array, 'B T'], ends: Bool[Array, 'B T'], *, max_steps: int
) -> Shaped[Array, 'B S']:
  """What a row of tokens says at the ends of its steps, in their order.

  Args:
    values: of tokens.
    ends: last token of each step, see `postrain.reward_models.step_ends`.
    max_steps: S; what ends behind that many steps is left out.

  Returns:
    Values, 0 behind the last step.
  """
  place, step = _places(ends, max_steps)
  found = jnp.take_along_axis(values, place, axis=1)
  return jnp.where(step, found, jnp.zeros_like(found))


def to_ends(
  values: Shaped[Array, 'B S'], ends: Bool[Array, 'B T']
) -> Shaped[Array, 'B T']:
  """Put values of steps on the tokens that end them, 0 elsewhere.

  Labels made so are those that `postrain.losses.step_correctness` reads. Steps
  that have no value, the S-th and those behind it, get 0: leave them out of the
  mask.
  """
  number = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - 1
  has = ends & (number < values.shape[1])
  place = jnp.clip(number, 0, values.shape[1] - 1)
  found = jnp.take_along_axis(values, place, axis=1)
  return jnp.where(has, found, jnp.zeros_like(found))


def cut_after_steps(
  samples: Samples,
  ends: Bool[Array, 'B T'],
  *,
  max_steps: int,
  num_rollouts: int,
  pad_id: int,
) -> Samples:
  """Each completion as it was behind each of its steps, M times over.

  Args:
    samples: B completions.
    ends: last token of each step, on the slots of the completion.
    max_steps: S.
    num_rollouts: M.
    pad_id: fills the slots behind a cut.

  Returns:
    B S M rows, those of a completion together, as `postrain.sampling.extend`
    goes on with them. Where a completion has fewer steps, the whole of it.
  """
  place, step = _places(ends, max_steps)
  slots = jnp.arange(ends.shape[1], dtype=jnp.int32)[None, None]
  last = jnp.where(step, place, ends.shape[1])
  mask = samples.mask[:, None] & (slots <= last[:, :, None])  # [B S T]
  mask = jnp.repeat(mask.reshape(-1, mask.shape[-1]), num_rollouts, axis=0)

  def rows(x: Array, fill: int) -> Array:
    x = jnp.repeat(x, max_steps * num_rollouts, axis=0)
    return jnp.where(mask, x, fill)

  truncated = jnp.repeat(samples.truncated, max_steps * num_rollouts)
  return Samples(
    rows(samples.tokens, pad_id),
    mask,
    rows(samples.sampler_logprobs, 0),
    rows(samples.model_logprobs, 0),
    truncated & mask.all(-1),
  )


def rollouts_after_steps(
  model: Model,
  params: Any,
  prompts: Int[Array, 'P N'],
  prompt_mask: Bool[Array, 'P N'],
  samples: Samples,
  ends: Bool[Array, 'B T'],
  key: Key[Array, ''],
  *,
  verify: Callable[[Array, Array, Array], Array],
  max_steps: int,
  num_rollouts: int = 8,
  stop_ids: Sequence[int],
  pad_id: int,
  temperature: Scalar = 1.0,
  prompt_ids: Int[Array, ' P'] | None = None,
) -> Float[Array, 'B S M']:
  """Which of M completions sampled behind each step end right.

  `postrain.losses.monte_carlo_labels` makes soft or hard labels of them, and
  `to_ends` puts these on tokens. The mean over M tends to the chance that the
  policy succeeds from there. Behind a step that ends its completion all M are
  that completion.

  Args:
    model: the policy that goes on; it need not be the one that began.
    params: its parameters.
    prompts: left-padded token ids.
    prompt_mask: True on real tokens.
    samples: B = P G completions, without a record of candidates or experts.
    ends: last token of each step, on the slots of the completion.
    key: of this (run, purpose); not the one that drew ``samples``.
    verify: (prompts, completions, mask) -> [N], 1 where right: a reward of a
      task, say.
    max_steps: S.
    num_rollouts: M.
    stop_ids, temperature, prompt_ids: see `postrain.sampling.extend`.
    pad_id: fills the slots behind a cut.

  Returns:
    What ``verify`` says, 0 where a completion has no such step.

  Raises:
    ValueError: max_steps or num_rollouts is less than 1.

  References:
    Wang et al., 2023, Math-Shepherd, arXiv:2312.08935.
  """
  for name, value in (('max_steps', max_steps), ('num_rollouts', num_rollouts)):
    if value < 1:
      raise ValueError(f'{name}={value}: it must be at least 1')
  begun = cut_after_steps(
    samples, ends, max_steps=max_steps, num_rollouts=num_rollouts,
    pad_id=pad_id,
  )  # fmt: skip
  done = extend(
    model, params, prompts, prompt_mask, begun, key,
    max_steps=ends.shape[1], stop_ids=stop_ids, temperature=temperature,
    prompt_ids=prompt_ids,
  )  # fmt: skip
  given = jnp.repeat(prompts, len(done.tokens) // len(prompts), axis=0)
  right = verify(given, done.tokens, done.mask)
  right = right.reshape(-1, max_steps, num_rollouts)
  _, step = _places(ends, max_steps)
  return jnp.where(step[:, :, None], right, 0)


def _places(
  ends: Bool[Array, 'B T'], max_steps: int
) -> tuple[Int[Array, 'B S'], Bool[Array, 'B S']]:
  """Where each step ends, and whether there is such a step."""
  count = jnp.cumsum(ends, axis=1, dtype=jnp.int32)
  steps = jnp.arange(1, max_steps + 1, dtype=jnp.int32)
  # The s-th end is the first slot by which s steps have ended.
  place = (count[:, None] < steps[None, :, None]).sum(-1, dtype=jnp.int32)
  step = place < ends.shape[1]
  return jnp.minimum(place, ends.shape[1] - 1), step
