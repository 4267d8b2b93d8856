"""The hidden reward by enumeration, and what raters say by closed forms."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import tasks
from postrain.batches import mismatched, weigh_units
from postrain.tasks.labels import (
  Candidates,
  candidates,
  label_probability,
  pair_accuracy,
  pairs,
  rankings,
  unpaired,
)
from postrain.tasks.preference import word_values

WORDS, SLOTS = 3, 4
PAD, STOP = WORDS, WORDS + 1
TASK = tasks.preference(
  num_words=WORDS, prompt_length=2, completion_length=SLOTS
)
MANY = 4000


@functools.cache
def everything():
  """All prompts, and all completions that end or are full."""
  prompts = list(itertools.product(range(WORDS), repeat=2))
  texts = [
    (*words, *[STOP] * (length < SLOTS))
    for length in range(SLOTS + 1)
    for words in itertools.product(range(WORDS), repeat=length)
  ]
  tokens = np.full((len(texts), SLOTS), PAD, np.int32)
  mask = np.zeros((len(texts), SLOTS), bool)
  for row, seen, text in zip(tokens, mask, texts, strict=True):
    row[: len(text)], seen[: len(text)] = text, True
  return np.array(prompts, np.int32), texts, tokens, mask


def rewarded(name):
  """The reward [P N] of all completions for all prompts."""
  prompts, texts, tokens, mask = everything()
  many = (
    np.repeat(prompts, len(texts), 0),
    *(np.tile(x, (len(prompts), 1)) for x in (tokens, mask)),
  )
  values = jax.jit(TASK.rewards[name])(*map(jnp.asarray, many))
  return np.asarray(values).reshape(len(prompts), -1)


def test_gold_is_its_formula_and_the_solution_its_maximum():
  prompts, texts, _, _ = everything()
  gold, table = rewarded('gold'), word_values(num_words=WORDS)
  for x, row in zip(prompts, gold, strict=True):
    for text, value in zip(texts, row, strict=True):
      worth = [1 if v == STOP else table[x, v].mean() for v in text]
      assert value == pytest.approx(0.5 + sum(worth) / (2 * SLOTS), abs=1e-6)
  assert gold.min() >= 0
  assert gold.max() <= 1
  completions, mask = TASK.solution(prompts)
  best = TASK.rewards['gold'](jnp.asarray(prompts), completions, mask)
  np.testing.assert_array_equal(best, gold.max(1))
  # Both kinds of solution: the best word all along, and silence.
  assert {1, SLOTS} == set(np.asarray(mask.sum(1)).tolist())


def test_features_are_what_gold_dislikes():
  _, texts, _, _ = everything()
  lengths, zeros = rewarded('length'), rewarded('disliked')
  for i, text in enumerate(texts):
    assert (lengths[:, i] == len(text) / SLOTS).all()
    assert (zeros[:, i] == text.count(0) / SLOTS).all()
  ended = [i for i, text in enumerate(texts) if STOP in text]
  gold = rewarded('gold')[:, ended].mean(0)
  for feature in (lengths[0, ended], zeros[0, ended]):
    assert np.cov(gold, feature)[0, 1] < 0


@functools.cache
def drawing(held_out=False, word=None):
  """Two completions each of many prompts, as NumPy arrays."""
  logits = (
    None if word is None else jnp.full(WORDS + 2, -jnp.inf).at[word].set(0)
  )
  draw = functools.partial(
    candidates, TASK, num_prompts=MANY, held_out=held_out, logits=logits
  )
  return jax.tree.map(np.asarray, jax.jit(draw)(jax.random.key(0)))


def some(num_prompts, num_samples):
  """Other candidates of the same draw; texts do not depend on prompts."""
  prompts, prompt_mask, tokens, mask = drawing()
  shape = (-1, num_samples, SLOTS)
  return Candidates(
    *(x[:num_prompts] for x in (prompts, prompt_mask)),
    *(x.reshape(shape)[:num_prompts] for x in (tokens, mask)),
  )


@functools.cache
def program(fn, **options):
  return jax.jit(lambda drawn, key: fn(TASK, drawn, key, **options))


def labelled(fn, drawn, seed=0, **options):
  return program(fn, **options)(drawn, jax.random.key(seed))


def near(share, chance, number=MANY):
  """Within five standard deviations of a binomial."""
  return abs(share - chance) <= 5 * math.sqrt(chance * (1 - chance) / number)


def test_candidates_are_drawn_of_their_distribution():
  drawn = drawing()
  tokens, mask = np.asarray(drawn.completions), np.asarray(drawn.mask)
  lengths = mask.sum(-1)
  ends = np.take_along_axis(tokens, lengths[..., None] - 1, -1)
  assert (ends == STOP).all()
  assert ((tokens == STOP).sum(-1) == 1).all()
  assert (tokens[~mask] == PAD).all()
  assert not (tokens[mask] == PAD).any()
  for length in range(1, SLOTS + 1):
    chance = (WORDS / (WORDS + 1)) ** (length - 1)
    chance *= 1 if length == SLOTS else 1 / (WORDS + 1)
    assert near((lengths == length).mean(), chance, 2 * MANY)


def test_candidates_of_evaluation_and_of_one_word():
  drawn = drawing(held_out=True, word=1)
  text = [1] * (SLOTS - 1) + [STOP]
  assert (drawn.completions == text).all()
  for one, residues in ((drawn, {0}), (drawing(), {1, 2})):
    assert set((one.prompts.sum(1) % WORDS).tolist()) == residues


def test_chance_of_a_label_is_its_formula():
  draw = np.random.default_rng(0)
  gold, feature = draw.random((2, 50, 2)).astype(np.float32)
  gold[:5, 1] = gold[:5, 0]
  z = 7 * (gold[:, 0] - gold[:, 1]) - 2 * (feature[:, 0] - feature[:, 1])
  p = 1 / (1 + np.exp(-z))
  expected = 0.8 * p + 0.2 * (1 - p)
  given = jnp.asarray(gold), jnp.asarray(feature)
  options = {'scale': 7.0, 'bias': -2.0, 'flip': 0.2}
  chance = label_probability(*given, **options)
  np.testing.assert_allclose(chance, expected, atol=1e-6)
  turned = label_probability(*(x[:, ::-1] for x in given), **options)
  np.testing.assert_allclose(turned, 1 - expected, atol=1e-6)
  # A rater who never errs, and one who looks at the bias between equals.
  never = label_probability(given[0], scale=math.inf)
  np.testing.assert_array_equal(never[:5], 0.5)
  np.testing.assert_array_equal(never[5:], gold[5:, 0] > gold[5:, 1])
  limit = label_probability(*given, scale=math.inf, bias=-2.0, flip=0.1)
  np.testing.assert_allclose(limit[:5], 0.8 * p[:5] + 0.1, atol=1e-6)
  np.testing.assert_allclose(limit[5:], 0.8 * never[5:] + 0.1, atol=1e-6)


def same(number, *texts):
  """One prompt and its completions, many times."""
  _, all_texts, tokens, mask = everything()
  rows = [all_texts.index(text) for text in texts]
  one = np.array([[1, 1]], np.int32), np.ones((1, 2), bool)
  one += tokens[None, rows], mask[None, rows]
  return Candidates(*(jnp.asarray(np.repeat(x, number, axis=0)) for x in one))


def gold_of(batch):
  """The array ``gold``, which is the reward of the rows, wherever they went."""
  prompts, texts, _, _ = everything()
  places = {text: i for i, text in enumerate(texts)}
  table, gold = rewarded('gold'), np.asarray(batch.arrays['gold'])
  tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
  for row, seen, value in zip(tokens, mask, gold, strict=True):
    if seen.any():
      x = np.flatnonzero((prompts == row[:2]).all(1))[0]
      place = places[tuple(row[seen].tolist())]
      assert abs(table[x, place] - value) < 1e-6
  return gold


RATER = {'scale': 6.0, 'feature': 'length', 'bias': 2.0}
TEXTS = (2, 0, STOP), (1, 1, 2, 2), (0, STOP)


def utilities():
  _, texts, _, _ = everything()
  rows = [texts.index(text) for text in TEXTS]
  x = 1 * WORDS + 1  # the prompt 1, 1
  return 6 * rewarded('gold')[x, rows] + 2 * rewarded('length')[x, rows]


def test_pairs_are_labelled_by_chance():
  batch = labelled(pairs, same(MANY, *TEXTS[:2]), 3, **RATER)
  a, b, _ = utilities()
  first = np.asarray(batch.tokens[::2, 2]) == TEXTS[0][0]
  assert near(first.mean(), 1 / (1 + math.exp(b - a)))
  gold_of(batch)


def test_rankings_follow_plackett_and_luce():
  batch = labelled(rankings, same(MANY, *TEXTS), 4, **RATER)
  assert batch.unit_size == 3
  weights = np.exp(utilities())
  ranks = np.asarray(batch.arrays['ranks']).reshape(-1, 3)
  assert (np.sort(ranks, 1) == np.arange(3)).all()
  for order in itertools.permutations(range(3)):
    chance, left = 1.0, weights.sum()
    for i in order:
      chance, left = chance * weights[i] / left, left - weights[i]
    assert near((np.argsort(ranks, 1) == order).all(1).mean(), chance)
  gold_of(batch)


def test_raters_who_never_err_rank_by_gold():
  batch = labelled(rankings, some(MANY // 2, 4), scale=math.inf)
  gold = gold_of(batch).reshape(-1, 4)
  ranks = np.asarray(batch.arrays['ranks']).reshape(-1, 4)
  ordered = np.take_along_axis(gold, np.argsort(ranks, 1), 1)
  assert (np.diff(ordered, axis=1) <= 0).all()
  # Equals in the order of chance, not of their places.
  batch = labelled(rankings, same(MANY // 2, *TEXTS[:1] * 4), scale=math.inf)
  assert near((batch.arrays['ranks'][::4] == 0).mean(), 0.25, MANY // 2)


def test_single_labels_have_their_share():
  drawn = some(200, 2)
  batch = labelled(unpaired, drawn, share=0.1)
  assert int(batch.arrays['desirable'].sum()) == 40
  gold_of(batch)
  # All turned around, of a rater who never errs: the best tenth is not.
  batch = labelled(unpaired, drawn, share=0.1, scale=math.inf, flip=1.0)
  gold, good = gold_of(batch), ~np.asarray(batch.arrays['desirable'])
  assert good.sum() == 40
  assert gold[good].min() >= gold[~good].max()


def test_single_labels_follow_the_logistic_of_their_reward():
  drawn = same(MANY, *TEXTS[:2])
  batch = labelled(unpaired, drawn, 6, **RATER)
  good = np.asarray(batch.arrays['desirable']).reshape(-1, 2).mean(0)
  # The bar is half-way between two that are equally often.
  a, b, _ = utilities()
  assert near(good[0], 1 / (1 + math.exp((b - a) / 2)))


@pytest.mark.parametrize('fn', [pairs, rankings, unpaired])
def test_the_same_key_gives_the_same_bits(fn):
  drawn = some(MANY, 2) if fn is not rankings else same(MANY, *TEXTS)
  first, again, other = (
    jax.tree.leaves(labelled(fn, drawn, seed, **RATER)) for seed in (0, 0, 1)
  )
  for one, two in zip(first, again, strict=True):
    np.testing.assert_array_equal(one, two)
  assert any((x != y).any() for x, y in zip(first, other, strict=True))


def test_the_accuracy_of_the_oracle_is_what_noise_leaves():
  accuracy = jax.jit(pair_accuracy)
  for scale, flip, width in ((math.inf, 0.2, 0.0), (4.0, 0.0, 0.1)):
    batch = labelled(pairs, drawing(), scale=scale, flip=flip, tie_width=width)
    seen = np.asarray(batch.mask.any(-1)[::2])
    assert seen.sum() > MANY / 2
    gold = gold_of(batch).reshape(-1, 2)[seen]
    right = 1 / (1 + np.exp(-scale * np.abs(gold[:, 0] - gold[:, 1])))
    expected = ((1 - flip) * right + flip * (1 - right)).mean()
    assert near(accuracy(batch, batch.arrays['gold']), expected, len(gold))
  assert accuracy(batch, jnp.zeros(2 * MANY)) == 0.5


def test_pairs_without_a_difference_have_no_tokens():
  batch = weigh_units(
    labelled(pairs, drawing(), scale=4.0, flip=0.0, tie_width=0.1)
  )
  gold = gold_of(batch).reshape(-1, 2)
  seen = np.abs(gold[:, 0] - gold[:, 1]) > 0.1
  assert 0 < seen.sum() < MANY
  rows = np.repeat(seen, 2)
  np.testing.assert_array_equal(batch.valid.any(1), rows)
  np.testing.assert_array_equal(batch.mask.any(1), rows)
  np.testing.assert_allclose(
    batch.weights['preference'],
    np.where(rows & (np.arange(2 * MANY) % 2 == 0), 1 / seen.sum(), 0),
    rtol=1e-6,
  )


def test_rows_are_prompt_then_completion():
  batch = labelled(unpaired, drawing(), **RATER)
  gold_of(batch)
  assert batch.valid[:, :2].all()
  assert not batch.mask[:, :2].any()
  np.testing.assert_array_equal(batch.mask[:, 2:], batch.valid[:, 2:])
  other = mismatched(batch, prompt_length=2)
  np.testing.assert_array_equal(other.tokens[:, :2], batch.tokens[:, :2])
  np.testing.assert_array_equal(other.tokens[0, 2:], batch.tokens[1, 2:])


@pytest.mark.parametrize('bias', [0.0, 8.0])
def test_a_reward_learnt_from_biased_labels_prefers_what_gold_dislikes(bias):
  """Logistic regression on the features that gold is linear in."""
  batch = labelled(pairs, drawing(), 8, scale=10.0, feature='disliked',
    bias=bias,
  )  # fmt: skip
  prompts, _, tokens, mask = everything()

  def features(prompts, tokens, mask):
    asked = (prompts[..., None] == np.arange(WORDS)).mean(-2)
    said = ((tokens[..., None] == np.arange(WORDS)) & mask[..., None]).sum(-2)
    both = asked[..., :, None] * said[..., None, :]
    return both.reshape(*both.shape[:-2], -1)

  rows = features(*(np.asarray(x) for x in (
    batch.tokens[:, :2], batch.tokens[:, 2:], batch.mask[:, 2:]
  )))  # fmt: skip
  x = rows[::2] - rows[1::2]
  weights = np.zeros(x.shape[1])
  for _ in range(8):  # Newton's steps
    p = 1 / (1 + np.exp(-x @ weights))
    curvature = (x.T * (p * (1 - p))) @ x + np.eye(len(weights))
    weights += np.linalg.solve(curvature, x.T @ (1 - p) - weights)
  learnt = pair_accuracy(batch, jnp.asarray(rows @ weights, jnp.float32))
  oracle = pair_accuracy(batch, batch.arrays['gold'])
  proxy = features(prompts[:, None], tokens[None], mask[None]) @ weights
  chosen = np.take_along_axis(
    rewarded('gold'), proxy.argmax(1)[:, None], 1
  ).mean()
  if bias:
    assert learnt > oracle + 0.02
    assert chosen < rewarded('gold').mean()
  else:
    assert learnt > oracle - 0.02
    assert chosen > rewarded('gold').max(1).mean() - 0.15


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'scale': 0.0}, 'scale=0.0: choose it above 0'),
    ({'scale': math.nan}, 'scale=nan'),
    ({'flip': 1.5}, r'flip=1.5: choose it in \[0, 1\]'),
    ({'share': -0.5}, 'share=-0.5'),
    ({'bias': 1.0}, 'bias=1.0: name the feature'),
    ({'feature': 'width'}, "no reward 'width', only gold, length, disliked"),
  ],
)
def test_impossible_raters_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    labelled(unpaired, same(2, TEXTS[0]), 0, **change)


def test_impossible_tasks_and_candidates_are_refused():
  for sizes in ({'num_words': 1}, {'prompt_length': 0}):
    with pytest.raises(ValueError, match='choose at least 2, 1 and 1'):
      tasks.preference(**sizes)
  for reward in TASK.rewards.values():
    with pytest.raises(ValueError, match=f'max_new_tokens={SLOTS}'):
      reward(
        jnp.zeros((1, 2), jnp.int32),
        jnp.zeros((1, 5), jnp.int32),
        jnp.ones((1, 5), bool),
      )
  with pytest.raises(ValueError, match='3 completions of a prompt'):
    labelled(pairs, same(2, *TEXTS), 0)
  with pytest.raises(ValueError, match='no stop_ids'):
    candidates(tasks.sort(), jax.random.key(0), num_prompts=1)


def test_render_writes_words_and_the_stop():
  assert TASK.render([2, 0, STOP, PAD]) == '2 0 $'


def test_raters_work_in_double_precision_mode():
  def figures(key):
    drawn = candidates(TASK, key, num_prompts=4)
    for fn in (pairs, rankings, unpaired):
      batch = fn(TASK, drawn, key, **RATER)
      gold = batch.arrays['gold']
    return batch.tokens, gold, pair_accuracy(batch, gold)

  with jax.enable_x64(True):
    tokens, *others = jax.eval_shape(figures, jax.random.key(0))
    assert tokens.dtype == jnp.int32
    assert {x.dtype for x in others} == {jnp.dtype('float32')}
