"""Random keys of a run: folded from what they are for, never split in turn."""

import jax
from jaxtyping import Array, Int, Key

PURPOSES = (
  'init',
  'prompts',
  'sample',
  'held_out',
  'demonstrations',
  'evaluation',
  'minibatches',
  'selection',
  'critic',
  'preferences',
  'held_out_preferences',
  'pairs',
  'raters',
)


def run_key(
  seed: int | Int[Array, ''], purpose: str, iteration: int | Int[Array, ''] = 0
) -> Key[Array, '']:
  """The key of (seed, purpose, iteration).

  Prompt, sample and token position are folded in where they are known, so that
  a run can be continued anywhere and nothing depends on what was drawn before.
  """
  key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
  return jax.random.fold_in(key, iteration)


def prompt_keys(
  key: Key[Array, ''], prompt_ids: Int[Array, ' P']
) -> Key[Array, ' P']:
  """One key per prompt."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_ids)


def minibatch_key(
  seed: int | Int[Array, ''],
  iteration: int | Int[Array, ''],
  epoch: int | Int[Array, ''],
) -> Key[Array, '']:
  """The key that shuffles one pass over a rollout."""
  return jax.random.fold_in(run_key(seed, 'minibatches', iteration), epoch)
