"""The chain against plain Python; its policy and labels by closed forms."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import losses, tasks
from postrain.reward_models import step_ends
from postrain.sampling import sample
from postrain.scoring import score
from postrain.step_labels import (
  at_ends,
  cut_after_steps,
  rollouts_after_steps,
  to_ends,
)
from postrain.tasks.chain import noisy_policy, read_steps, success_chances

M, K, REPEATS = 3, 2, 1
END, PAD, STOP = M, M + 1, M + 2
TASK = tasks.chain(modulus=M, num_steps=K, num_repeats=REPEATS)
RATES = jnp.array([0.2, 0.6])
SLOTS, MAX_STEPS = TASK.completion_length, K + REPEATS + 1
POLICY = noisy_policy(
  error_rates=RATES.tolist(), num_steps=K, num_repeats=REPEATS, repeat_rate=0.3
)


def judged(prompt, text):
  """(answer, sound, share of right steps) by a scan over the tokens."""
  value, place, right, count, t = prompt[0], 0, 0, 0, 0
  while text[t + 2 : t + 3] == [END] and max(text[t : t + 2]) < M:
    added, total = text[t : t + 2]
    fits = total == (value + added) % M
    if added:
      place += 1
      fits &= place < len(prompt) and added == prompt[place]
    value, right, count, t = total, right + fits, count + 1, t + 3
  ended = text[t:] == [STOP]
  answer = ended and count > 0 and value == sum(prompt) % M
  whole = right == count and place == len(prompt) - 1
  return answer, answer and whole, right / max(count, 1)


def rows(texts, length=SLOTS):
  tokens = np.full((len(texts), length), PAD, np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[: len(text)] = text
  mask = np.arange(length) < np.array([[len(text)] for text in texts])
  return jnp.asarray(tokens), jnp.asarray(mask)


def spoilt(draw, prompt):
  """A solution with some of its tokens changed, and perhaps cut."""
  tokens, mask = TASK.solution(np.array([prompt], np.int32))
  text = np.asarray(tokens[0])[np.asarray(mask[0])].tolist()
  if draw.random() < 0.4:  # say the first sum once more
    text[3:3] = [0, text[1], END]
  for _ in range(draw.integers(3)):
    text[draw.integers(len(text))] = int(draw.integers(M + 3))
  return (
    text[: draw.integers(1, len(text) + 1)] if draw.random() < 0.2 else text
  )


@jax.jit
def rewarded(*texts):
  return [reward(*texts) for reward in TASK.rewards.values()]


def test_rewards_are_those_of_a_scan():
  draw = np.random.default_rng(0)
  prompts = [[draw.integers(M), *draw.integers(1, M, K)] for _ in range(400)]
  prompts = [[int(x) for x in row] for row in prompts]
  texts = [spoilt(draw, prompt) for prompt in prompts]
  expected = np.array([
    judged(p, text) for p, text in zip(prompts, texts, strict=True)
  ])  # fmt: skip
  found = rewarded(jnp.array(prompts), *rows(texts))
  np.testing.assert_allclose(np.stack(found, 1), expected, rtol=1e-6)
  assert set(expected[:, 2]) >= {0, 0.5, 1}
  # Two errors may undo each other: a right answer of wrong steps.
  assert (expected[:, 0] > expected[:, 1]).any()


def test_prompts_are_held_out_by_their_ends():
  for held_out in (False, True):
    keys = jax.random.split(jax.random.key(0), 400)
    prompts, _ = jax.vmap(lambda k: TASK.prompt(k, held_out))(keys)  # noqa: B023
    prompts = np.asarray(prompts)
    assert ((prompts[:, 0] == prompts[:, -1]) == held_out).all()
    assert (prompts[:, 1:] > 0).all()
    count = len({tuple(row) for row in prompts.tolist()})
    assert count == (M - 1) ** K * (1 if held_out else M - 1)


def everything():
  """All that the policy can write to one prompt, and all begun steps."""
  texts = []
  for places in ((), (0,), (1,), (2,)):  # where it repeats itself
    for sums in itertools.product(range(M), repeat=K):
      numbers, text, before = iter(zip((2, 1), sums, strict=True)), [], 1
      for step in range(K + len(places)):
        if step in places:
          text += [0, before, END]
        else:
          added, before = next(numbers)
          text += [added, before, END]
      texts.append([*text, STOP])
  return texts


@jax.jit
def scored(params, prompts, tokens, mask):
  """Log-probs of completions under the policy, in one pass."""
  behind = jnp.pad(mask, ((0, 0), (K + 1, 0)))
  valid = behind.at[:, : K + 1].set(True)
  whole = jnp.concatenate([prompts, tokens], 1)
  return score(POLICY, params, whole, valid, behind).logprobs[:, K + 1 :]


def test_the_policy_errs_at_its_rates():
  """Its chances of all it can write are those of the formula, and all mass."""
  texts = everything()
  tokens, mask = rows(texts)
  prompts = jnp.tile(jnp.array([[1, 2, 1]]), (len(texts), 1))
  params = POLICY.init(jax.random.key(0))
  found = scored(params, prompts, tokens, mask).sum(-1)
  for text, value in zip(texts, np.exp(found), strict=True):
    chance, before, repeats = 1.0, 1, 0
    for added, total in zip(text[:-1:3], text[1::3], strict=True):
      if not repeats:
        chance *= 0.3 if added == 0 else 0.7
      if added:
        error = float(RATES[added - 1])
        right = total == (before + added) % M
        chance *= 1 - error if right else error / (M - 1)
      repeats += added == 0
      before = total
    chance *= 1 if repeats else 0.7
    assert value == pytest.approx(chance, rel=1e-5)
  assert np.exp(found).sum() == pytest.approx(1, rel=1e-5)


@functools.cache
def drawn():
  """Completions of a few prompts, with the ends of their steps."""
  prompts = jnp.array([[1, 2, 1], [0, 1, 1], [2, 2, 2]])
  params = POLICY.init(jax.random.key(0))
  draw = functools.partial(
    sample, POLICY, num_samples=4, max_new_tokens=SLOTS, stop_ids=(STOP,),
    pad_id=PAD,
  )  # fmt: skip
  seen = jnp.ones(prompts.shape, bool)
  samples = jax.jit(draw)(params, prompts, seen, jax.random.key(1))
  ends = step_ends(samples.tokens, samples.mask, separators=((END,),))
  return prompts, params, samples, ends


def test_the_sampler_reads_the_policy_through_its_state():
  prompts, params, samples, _ = drawn()
  given = jnp.repeat(prompts, 4, 0)
  found = scored(params, given, samples.tokens, samples.mask)
  np.testing.assert_allclose(found, samples.model_logprobs, atol=1e-5)


def test_values_of_steps_go_to_their_ends_and_back():
  ends = jnp.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]], bool)
  values = jnp.arange(1, 16).reshape(3, 5)
  steps = at_ends(values, ends, max_steps=3)
  np.testing.assert_array_equal(steps, [[2, 4, 5], [0, 0, 0], [11, 15, 0]])
  np.testing.assert_array_equal(
    to_ends(steps, ends), jnp.where(ends, values, 0)
  )
  few = at_ends(values, ends, max_steps=1)
  np.testing.assert_array_equal(to_ends(few, ends).sum(1), [2, 0, 11])


def test_cut_rows_are_what_was_written_by_then():
  _, _, samples, ends = drawn()
  cut = cut_after_steps(
    samples, ends, max_steps=MAX_STEPS, num_rollouts=2, pad_id=PAD
  )
  tokens = np.asarray(cut.tokens).reshape(12, MAX_STEPS, 2, -1)
  assert (tokens[:, :, 0] == tokens[:, :, 1]).all()
  for row, last, parts in zip(
    samples.tokens, ends, tokens[:, :, 0], strict=True
  ):
    (places,) = np.nonzero(np.asarray(last))
    for s in range(MAX_STEPS):
      stop = places[s] + 1 if s < len(places) else SLOTS
      expected = np.where(np.arange(SLOTS) < stop, row, PAD)
      np.testing.assert_array_equal(parts[s], expected)


@functools.cache
def outcomes(count):
  prompts, params, samples, ends = drawn()
  roll = functools.partial(
    rollouts_after_steps, POLICY, verify=TASK.rewards['answer'],
    max_steps=MAX_STEPS, num_rollouts=count, stop_ids=(STOP,), pad_id=PAD,
  )  # fmt: skip
  seen = jnp.ones(prompts.shape, bool)
  return jax.jit(roll)(params, prompts, seen, samples, ends, jax.random.key(2))


def test_m61_soft_labels_tend_to_the_chance_of_success():
  """By rollouts from prefixes; the chance is known in closed form."""
  prompts, _, samples, ends = drawn()
  texts = jnp.repeat(prompts, 4, 0), samples.tokens, samples.mask
  chance = jax.jit(success_chances)(*texts, RATES)
  # The stop is the last step; nothing is left to chance behind it.
  count = jax.jit(functools.partial(read_steps, modulus=M))(*texts).written.sum(
    1
  )
  answer = rewarded(*texts)[0]
  chance = np.pad(
    np.asarray(chance), ((0, 0), (0, MAX_STEPS - chance.shape[1]))
  )
  chance[np.arange(12), count] = answer
  there = np.arange(MAX_STEPS) <= np.asarray(count)[:, None]
  np.testing.assert_array_equal(at_ends(ends, ends, max_steps=MAX_STEPS), there)
  assert len(np.unique(chance[there])) > 4
  errors = []
  for n in (8, 512):
    labels = np.asarray(losses.monte_carlo_labels(outcomes(n)))
    spread = np.sqrt(chance * (1 - chance) / n)
    assert (np.abs(labels - chance) <= 4 * spread + 1e-6)[there].all()
    assert (labels[~there] == 0).all()
    errors.append(np.abs(labels - chance)[there].mean())
  assert errors[1] < errors[0] / 4  # √(512 / 8) is 8


def test_m61_hard_labels_are_where_any_rollout_is_right():
  found = np.asarray(outcomes(8))
  hard = losses.monte_carlo_labels(outcomes(8), hard=True)
  np.testing.assert_array_equal(hard, (found > 0).any(-1))


def test_impossible_sizes_and_rates_are_refused():
  for sizes in ({'modulus': 2}, {'num_steps': 1}, {'num_repeats': -1}):
    with pytest.raises(ValueError, match='choose at least 3, 2 and 0'):
      tasks.chain(**sizes)
  with pytest.raises(ValueError, match=r'a rate of 1.5: choose it in \[0, 1\]'):
    noisy_policy(error_rates=(0.1, 1.5))
  prompts, params, samples, ends = drawn()
  for wrong in ({'max_steps': 0}, {'num_rollouts': 0}):
    with pytest.raises(ValueError, match='=0: it must be at least 1'):
      rollouts_after_steps(
        POLICY, params, prompts, prompts >= 0, samples, ends,
        jax.random.key(0), verify=TASK.rewards['answer'],
        stop_ids=(STOP,), pad_id=PAD, **{'max_steps': 1, **wrong},
      )  # fmt: skip
