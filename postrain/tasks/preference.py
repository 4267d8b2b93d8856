"""A task whose reward is hidden from those who learn it by comparisons.

Token ids: words 0 to N − 1, then padding and stop. `postrain.tasks.labels`
draws what raters say of its completions.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from postrain.types import Task

DISLIKED = 0  # the word that no prompt wants


def preference(
  *,
  num_words: int = 6,
  prompt_length: int = 2,
  completion_length: int = 6,
  seed: int = 0,
) -> Task:
  """Words that fit a prompt more or less, and a stop token.

  A prompt x is ``prompt_length`` words, drawn with replacement; it is held out
  iff Σ x ≡ 0 (mod num_words). Rewards, each in [0, 1] and a function of the
  tokens under the mask alone, of T = ``completion_length``:

    gold: ½ + Σₜ w(x, yₜ) / 2T with w(x, v) = mean_s W[x_s, v], the worth of
      `word_values`, and w(x, stop) = 1.
    length: tokens / T, the stop token counted.
    disliked: occurrences of the word 0 / T.

  So gold is linear in the counts of (prompt word, completion word). At random,
  words lower it, and the word 0 always does: raters with a taste for ``length``
  or ``disliked`` teach what gold dislikes. Its greatest value is that of the
  best word all along, if that is worth more than nothing, then the stop token.

  Args:
    num_words: N ≥ 2.
    prompt_length: words of a prompt, ≥ 1.
    completion_length: tokens of a completion, the stop token included, ≥ 1.
    seed: of W.

  Raises:
    ValueError: a size out of range.

  References:
    Gao, Schulman and Hilton, 2022, Scaling Laws for Reward Model
    Overoptimization, arXiv:2210.10760.
  """
  if num_words < 2 or prompt_length < 1 or completion_length < 1:
    raise ValueError(
      f'num_words={num_words}, prompt_length={prompt_length},'
      f' completion_length={completion_length}: choose at least 2, 1 and 1'
    )
  pad, stop = num_words, num_words + 1
  extra = np.zeros((num_words, 2), np.float32)  # of padding and stop
  extra[:, 1] = 1
  table = np.hstack([word_values(num_words=num_words, seed=seed), extra])

  def prompt(
    key: Key[Array, ''], held_out: bool = False
  ) -> tuple[Int[Array, ' S'], Bool[Array, ' S']]:
    low, high = (0, 1) if held_out else (1, num_words)
    lows = jnp.array([0] * (prompt_length - 1) + [low])
    highs = jnp.array([num_words] * (prompt_length - 1) + [high])
    shape = (prompt_length,)
    draws = jax.random.randint(key, shape, lows, highs, dtype=jnp.int32)
    # The last draw is the residue that the sum shall have.
    rest = draws[:-1].sum(dtype=jnp.int32)
    return draws.at[-1].add(-rest) % num_words, jnp.ones(shape, bool)

  def worth(prompts: Int[Array, 'B S']) -> Float[Array, 'B V']:
    return jnp.asarray(table)[prompts].mean(1)

  def gold(
    prompts: Int[Array, 'B S'],
    completions: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
  ) -> Float[Array, ' B']:
    check(completions)
    # By counts, so that the order of words does not move the last bit.
    hot = jax.nn.one_hot(completions, num_words + 2, dtype=jnp.float32)
    counts = jnp.where(mask[:, :, None], hot, 0).sum(1)
    return 0.5 + (counts * worth(prompts)).sum(-1) / (2 * completion_length)

  def length(
    prompts: Int[Array, 'B S'],
    completions: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
  ) -> Float[Array, ' B']:
    del prompts
    check(completions)
    return mask.sum(-1).astype(jnp.float32) / completion_length

  def disliked(
    prompts: Int[Array, 'B S'],
    completions: Int[Array, 'B T'],
    mask: Bool[Array, 'B T'],
  ) -> Float[Array, ' B']:
    return length(prompts, completions, mask & (completions == DISLIKED))

  def check(completions: Array) -> None:
    if completions.shape[1] > completion_length:
      raise ValueError(
        f'completions of {completions.shape[1]} tokens for rewards of'
        f' {completion_length}: set max_new_tokens={completion_length}'
      )

  def solution(
    prompts: Int[Array | np.ndarray, 'B S'],
  ) -> tuple[Int[Array, 'B T'], Bool[Array, 'B T']]:
    words = worth(jnp.asarray(prompts))[:, :num_words]
    speaks = words.max(-1, keepdims=True) > 0
    ends = jnp.where(speaks, completion_length - 1, 0)
    slots = jnp.arange(completion_length)[None]
    best = jnp.where(slots < ends, words.argmax(-1, keepdims=True), stop)
    mask = slots <= ends
    return jnp.where(mask, best, pad).astype(jnp.int32), mask

  def render(ids: Sequence[int] | np.ndarray | Array) -> str:
    written = {pad: '', stop: '$'}
    return ' '.join(
      filter(None, (written.get(i, str(i)) for i in np.asarray(ids).tolist()))
    )

  return Task(
    vocab_size=num_words + 2,
    pad_id=pad,
    stop_ids=(stop,),
    prompt_length=prompt_length,
    completion_length=completion_length,
    prompt=prompt,
    rewards={'gold': gold, 'length': length, 'disliked': disliked},
    render=render,
    solution=solution,
  )


def word_values(
  *, num_words: int = 6, seed: int = 0
) -> Float[np.ndarray, 'N N']:
  """W of `preference`: what a prompt's word thinks of a completion's.

  Uniform in [−1, ½), so that more words are worse at random; −1 for the word
  that all dislike.
  """
  values = np.random.default_rng(seed).uniform(-1, 0.5, (num_words, num_words))
  values[:, DISLIKED] = -1
  return values.astype(np.float32)
