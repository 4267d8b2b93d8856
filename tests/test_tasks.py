"""Tasks against brute force in plain Python; their policies by enumeration."""

from collections import Counter
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from postrain import tasks
from postrain.binding import bind
from postrain.sampling import sample
from postrain.tasks.arithmetic import STOP, question
from postrain.tasks.sort import toy_policy
from postrain.tasks.tabular import enumeration, tabular_policy

BLOCKS = [
  {'name': 'arithmetic', 'num_digits': 3},
  {'name': 'sort'},
  {'name': 'sort', 'vocab_size': 2, 'length': 1},
  {'name': 'tabular'},
  {'name': 'tabular', 'stop_id': 2},
  {'name': 'preference'},
  {'name': 'chain', 'num_repeats': 1},
]


def keys(number, seed=0):
  return jax.random.split(jax.random.key(seed), number)


def draw(task, number, held_out, seed=0):
  prompt = functools.partial(task.prompt, held_out=held_out)
  return jax.jit(jax.vmap(prompt))(keys(number, seed))


def prefix_mask(lengths, width):
  return np.arange(width) < np.asarray(lengths)[:, None]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = model.hidden(
    params, tokens, positions=positions, segment_ids=jnp.ones_like(tokens)
  )
  return jax.nn.log_softmax(model.unembed(params, hidden))


@functools.partial(jax.jit, static_argnums=0)
def logprobs_from_cache(model, params, prompts, completions):
  """Prefill the left-padded prompts, then feed the completions one by one."""
  (num_prompts, slots), (rows, length) = prompts.shape, completions.shape
  columns = jnp.broadcast_to(jnp.arange(-1, slots), (num_prompts, slots + 1))
  hidden, prefix = model.hidden(
    params,
    jnp.pad(prompts, ((0, 0), (1, 0)), constant_values=1),
    positions=jnp.maximum(columns, 0),
    segment_ids=(columns >= 0).astype(jnp.int32),
    cache=model.empty_cache(num_prompts, slots + 1),
  )
  out = [jnp.repeat(hidden[:, -1], rows // num_prompts, axis=0)]
  cache = model.empty_cache(rows, length - 1, prefix)
  for t in range(length - 1):
    hidden, cache = model.hidden(
      params,
      completions[:, t : t + 1],
      positions=jnp.full((rows, 1), slots + t),
      segment_ids=jnp.ones((rows, 1), jnp.int32),
      cache=cache,
    )
    out.append(hidden[:, 0])
  return jax.nn.log_softmax(model.unembed(params, jnp.stack(out, axis=1)))


# Every task.


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('held_out', [False, True])
def test_a_task_keeps_its_contract(block, held_out):
  task = bind(tasks, block)()
  prompts, mask = draw(task, 50, held_out)
  assert prompts.shape == mask.shape == (50, task.prompt_length)
  assert prompts.dtype == jnp.int32
  assert mask.dtype == bool
  assert (prompts >= 0).all()
  assert (prompts < task.vocab_size).all()
  assert mask[:, -1].all(), 'left-padded'
  assert (jnp.diff(mask.astype(int)) >= 0).all()
  assert (prompts[~mask] == task.pad_id).all()
  assert task.pad_id not in task.stop_ids
  completions = jax.random.randint(
    jax.random.key(1), (50, task.completion_length), 0, task.vocab_size
  )
  lengths = np.arange(50) % (task.completion_length + 1)
  mask = jnp.asarray(prefix_mask(lengths, task.completion_length))
  for reward in map(jax.jit, task.rewards.values()):
    values = reward(prompts, completions, mask)
    assert values.shape == (50,)
    assert values.dtype == jnp.float32
    for other in (task.pad_id, task.vocab_size - 1):
      changed = jnp.where(mask, completions, other)
      np.testing.assert_array_equal(values, reward(prompts, changed, mask))


@pytest.mark.parametrize('block', BLOCKS)
def test_a_prompt_depends_on_its_key_alone(block):
  task = bind(tasks, block)()
  for held_out in (False, True):
    many = draw(task, 7, held_out)
    for i, key in enumerate(keys(7)):
      for row, one in zip(many, task.prompt(key, held_out), strict=True):
        np.testing.assert_array_equal(row[i], one)


@pytest.mark.parametrize('block', BLOCKS[:3])
def test_solutions_earn_the_greatest_reward(block):
  task = bind(tasks, block)()
  prompts, _ = draw(task, 64, False)
  completions, mask = task.solution(np.asarray(prompts))
  assert completions.shape == mask.shape == (64, task.completion_length)
  assert (completions[~mask] == task.pad_id).all()
  length = task.prompt_length
  best = {
    'inclusion_ordering': 2 * length - 1,
    'multiset_ordering': 2 * length - 1,
    'distance': length,
  }
  for name, reward in task.rewards.items():
    values = reward(prompts, completions, mask)
    np.testing.assert_array_equal(values, best.get(name, 1))


@pytest.mark.parametrize('block', BLOCKS)
def test_tasks_run_in_double_precision_mode(block):
  expected = draw(bind(tasks, block)(), 5, False)[0]
  with jax.enable_x64(True):
    task = bind(tasks, block)()
    prompts, _ = draw(task, 5, False)
    assert prompts.dtype == jnp.int32
    np.testing.assert_array_equal(prompts, expected)
    completions = jnp.zeros((5, task.completion_length), jnp.int32)
    for reward in task.rewards.values():
      assert reward(prompts, completions, completions == 0).shape == (5,)


# Arithmetic.


def all_pairs(num_digits):
  a, b = np.divmod(np.arange(100**num_digits), 10**num_digits)
  build = jax.vmap(functools.partial(question, num_digits=num_digits))
  prompts, mask = build(jnp.asarray(a), jnp.asarray(b))
  return a, b, prompts, mask


@pytest.mark.parametrize('num_digits', [1, 2])
def test_all_sums_are_written_as_people_write_them(num_digits):
  task = tasks.arithmetic(num_digits=num_digits)
  a, b, prompts, mask = all_pairs(num_digits)
  completions, completion_mask = task.solution(prompts)
  for name in ('exact', 'format', 'digits'):
    rewards = task.rewards[name](prompts, completions, completion_mask)
    assert (rewards == 1).all()
  prompts, mask, completions, completion_mask = map(
    np.asarray, (prompts, mask, completions, completion_mask)
  )
  for i in range(len(a)):
    assert task.render(prompts[i]) == f'{a[i]}+{b[i]}='
    assert task.render(prompts[i][mask[i]]) == f'{a[i]}+{b[i]}='
    kept = completions[i][completion_mask[i]]
    assert task.render(kept) == f'{a[i] + b[i]}$'


def test_the_widest_sums_stay_within_int32():
  task = tasks.arithmetic(num_digits=7)
  nines = jnp.int32(9_999_999)
  prompts, _ = question(nines, nines, num_digits=7)
  completions, _ = task.solution(prompts[None])
  assert task.render(completions[0]) == '19999998$'
  prompts, _ = draw(task, 100, False)
  operands = [task.render(row)[:-1].split('+') for row in prompts]
  assert all(0 <= int(x) < 10**7 for pair in operands for x in pair)
  assert all(x == str(int(x)) for pair in operands for x in pair)


def arithmetic_oracle(prompt, completion):
  """The rewards of what a person reads; ``completion`` is under the mask."""
  a, b = prompt.removesuffix('=').split('+')
  answer = f'{int(a) + int(b)}$'
  right = sum(x == y for x, y in zip(completion, answer, strict=False))
  body = completion[:-1]
  return {
    'exact': float(completion == answer),
    'format': float(body.isdigit() and completion[-1:] == '$'),
    'digits': right / max(len(completion), len(answer)),
  }


@pytest.mark.parametrize('width', [2, 4, 7])
def test_arithmetic_rewards_read_the_completion_as_people_do(width):
  task = tasks.arithmetic(num_digits=2)
  prompts, _ = draw(task, 600, False)
  rng = np.random.default_rng(0)
  answers = np.asarray(task.solution(prompts)[0])
  completions = rng.choice([*range(10), 10, 11, STOP, 20], (600, width))
  kept = min(width, 4)  # mostly right, so that every case occurs
  change = rng.random((600, kept)) < 0.3
  completions[:, :kept] = np.where(
    change, completions[:, :kept], answers[:, :kept]
  )
  completions = completions.astype(np.int32)
  lengths = np.where(
    rng.random(600) < 0.5,
    np.minimum((answers != task.pad_id).sum(-1), width),
    rng.integers(0, width + 1, 600),
  )
  mask = prefix_mask(lengths, width)
  expected = [
    arithmetic_oracle(task.render(p), ''.join(map(letter, c[m])))
    for p, c, m in zip(np.asarray(prompts), completions, mask, strict=True)
  ]
  assert 0 < sum(e['format'] for e in expected) < 600
  for name, reward in task.rewards.items():
    values = reward(prompts, jnp.asarray(completions), jnp.asarray(mask))
    np.testing.assert_allclose(values, [e[name] for e in expected], rtol=1e-6)


def letter(i):
  return {10: '+', 11: '=', 12: '_', STOP: '$', 20: '?'}.get(int(i), str(i))


def test_every_single_change_of_a_sum_is_wrong():
  task = tasks.arithmetic(num_digits=2)
  prompts, _ = draw(task, 200, False)
  completions, mask = task.solution(prompts)
  exact = jax.jit(task.rewards['exact'])
  for t in range(task.completion_length):
    without = np.where(mask[:, t], 0, 1)  # the reward of a change at slot t
    for shift in range(1, task.vocab_size):
      changed = completions.at[:, t].add(shift) % task.vocab_size
      np.testing.assert_array_equal(exact(prompts, changed, mask), without)
    shorter, longer = (mask.at[:, t].set(on) for on in (False, True))
    rewards = exact(prompts, completions, shorter)
    np.testing.assert_array_equal(rewards, without)
    rewards = exact(prompts, completions, longer)
    np.testing.assert_array_equal(rewards, 1 - without)


@pytest.mark.parametrize(
  ('num_digits', 'draws'), [(1, (200, 3_000)), (2, (20_000, 200_000))]
)
def test_arithmetic_holds_out_a_tenth_of_all_pairs(num_digits, draws):
  task = tasks.arithmetic(num_digits=num_digits)
  _, _, everything, _ = all_pairs(num_digits)
  held_out, train = (
    np.unique(np.asarray(draw(task, n, side)[0]), axis=0)
    for n, side in zip(draws, (True, False), strict=True)
  )
  assert len(held_out) == 100**num_digits // 10
  assert len(train) == 100**num_digits - len(held_out)
  union = np.unique(np.concatenate([held_out, train]), axis=0)
  np.testing.assert_array_equal(union, np.unique(everything, axis=0))


def test_both_sides_of_the_split_contain_all_last_digits():
  task = tasks.arithmetic(num_digits=2)
  for side in (False, True):
    prompts, _ = draw(task, 20_000, side)
    texts = {task.render(p) for p in np.unique(np.asarray(prompts), axis=0)}
    lasts = {tuple(x[-1] for x in text[:-1].split('+')) for text in texts}
    assert len(lasts) == 100


# Sort.


def sort_oracle(prompt, completion):
  """Loops over lists; None stands for a token off the mask."""
  real = [y for y in completion if y is not None]
  ordered = sum(
    x is not None and y is not None and x <= y
    for x, y in itertools.pairwise(completion)
  )
  both = Counter(prompt) & Counter(real)
  return {
    'inclusion_ordering': sum(x in real for x in prompt) + ordered,
    'multiset_ordering': both.total() + ordered,
    'distance': sum(
      x == y for x, y in zip(sorted(prompt), completion, strict=True)
    ),
    'exact': sorted(prompt) == completion,
  }


@pytest.mark.parametrize(('vocab_size', 'length'), [(3, 4), (10, 4), (5, 1)])
def test_sort_rewards_count_as_loops_do(vocab_size, length):
  task = tasks.sort(vocab_size=vocab_size, length=length)
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, vocab_size, (300, length), dtype=np.int32)
  completions = rng.integers(0, vocab_size, (300, length), dtype=np.int32)
  completions[::3] = np.sort(prompts[::3])
  mask = rng.random((300, length)) < 0.9
  expected = [
    sort_oracle(p, [y if m else None for y, m in zip(c, w, strict=True)])
    for p, c, w in zip(
      prompts.tolist(), completions.tolist(), mask.tolist(), strict=True
    )
  ]
  for name, reward in task.rewards.items():
    values = reward(*map(jnp.asarray, (prompts, completions, mask)))
    np.testing.assert_array_equal(values, [e[name] for e in expected])


@pytest.mark.parametrize(
  ('prompt', 'multiset'),
  # All different: P(present) each. All equal: the mean count, 4/10.
  [([3, 1, 4, 6], 4 * (1 - 0.9**4)), ([7, 7, 7, 7], 4 * 0.1)],
)
def test_uniform_sort_policy_earns_what_the_closed_form_says(prompt, multiset):
  task = tasks.sort()
  completions = jnp.array([*itertools.product(range(10), repeat=4)])
  prompts = jnp.broadcast_to(jnp.array(prompt), completions.shape)
  mask = jnp.ones(completions.shape, bool)
  means = {
    name: np.asarray(reward(prompts, completions, mask), np.float64).mean()
    for name, reward in task.rewards.items()
  }
  # A pair is ordered with probability (1 + 1/V)/2 = 0.55.
  expected = 4 * (1 - 0.9**4) + 3 * 0.55
  assert expected == pytest.approx(3.0256)
  assert means['inclusion_ordering'] == pytest.approx(expected, abs=1e-12)
  assert means['distance'] == pytest.approx(4 / 10, abs=1e-12)
  assert means['exact'] == pytest.approx(1e-4, abs=1e-12)
  multiset += 3 * 0.55
  assert means['multiset_ordering'] == pytest.approx(multiset, abs=1e-12)


def test_duplicates_are_paid_by_presence_but_not_as_a_multiset():
  task = tasks.sort()
  prompts, completions = jnp.array([[4, 2, 4, 4]]), jnp.array([[0, 2, 4, 6]])
  rewards = {
    name: float(reward(prompts, completions, completions >= 0)[0])
    for name, reward in task.rewards.items()
  }
  assert rewards == {
    'inclusion_ordering': 7,
    'multiset_ordering': 5,
    'distance': 1,
    'exact': 0,
  }


@pytest.mark.parametrize(('vocab_size', 'length'), [(3, 3), (2, 1)])
def test_sort_holds_out_prompts_by_their_sum(vocab_size, length):
  everything = set(itertools.product(range(vocab_size), repeat=length))
  split, joint = (
    [
      Counter(map(tuple, np.asarray(draw(task, 3_000, side)[0]).tolist()))
      for side in (False, True)
    ]
    for task in (
      tasks.sort(vocab_size=vocab_size, length=length, hold_out=hold_out)
      for hold_out in (True, False)
    )
  )
  held_out = {x for x in everything if sum(x) % vocab_size == 0}
  assert set(split[1]) == held_out
  assert set(split[0]) == everything - held_out
  assert set(joint[0]) == set(joint[1]) == everything
  for counts in (*split, *joint):
    expected = 3_000 / len(counts)
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_square < 5 * len(counts)


def test_sort_refuses_completions_longer_than_the_prompt():
  task = tasks.sort()
  prompts, completions = jnp.zeros((2, 4), int), jnp.zeros((2, 5), int)
  for reward in task.rewards.values():
    with pytest.raises(ValueError, match='max_new_tokens=4'):
      reward(prompts, completions, jnp.ones((2, 5), bool))


# The lecture's sort policy.


def test_toy_policy_equals_loops_over_its_formula():
  model = toy_policy(vocab_size=6, length=3, embed_dim=2)
  params = model.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 6, (5, 6), dtype=np.int32)
  logits = forward(model, params, jnp.asarray(tokens))
  p = {name: np.asarray(x, np.float64) for name, x in params.items()}
  for row in range(5):
    h = sum(p['embedding'][tokens[row, l]] @ p['encoder'][l] for l in range(3))
    for l in range(3):
      z = h @ p['decoder'][l]
      scores = z @ p['kernel'] + p['bias']
      expected = scores - np.log(np.exp(scores).sum())
      np.testing.assert_allclose(logits[row, 2 + l], expected, atol=2e-6)


def test_toy_policy_starts_as_pytorch_would():
  params = toy_policy(vocab_size=400, length=3, embed_dim=64).init(
    jax.random.key(0)
  )
  for name, deviation in [
    ('embedding', 1),
    ('encoder', 1 / 8),
    ('decoder', 1 / 8),
    ('kernel', 1 / 8 / np.sqrt(3)),
    ('bias', 1 / 8 / np.sqrt(3)),
  ]:
    assert float(params[name].std()) == pytest.approx(deviation, rel=0.1)
    if name in ('kernel', 'bias'):
      assert float(jnp.abs(params[name]).max()) <= 1 / 8
  shapes = {name: x.shape for name, x in params.items()}
  assert shapes == {
    'embedding': (400, 64),
    'encoder': (3, 64, 64),
    'decoder': (3, 64, 64),
    'kernel': (64, 400),
    'bias': (400,),
  }


@pytest.mark.parametrize(
  ('model', 'slots', 'vocab_size'),
  [
    (toy_policy(vocab_size=6, length=3, embed_dim=2), 3, 6),
    (tabular_policy(vocab_size=4, length=3), 1, 4),
  ],
)
class TestContractOfPolicies:
  """What `postrain.types.HiddenFn` asks of every model."""

  @pytest.fixture
  def params(self, model):
    return model.init(jax.random.key(0))

  @pytest.fixture
  def sequences(self, slots, vocab_size):
    prompts = jax.random.randint(jax.random.key(1), (4, slots), 0, vocab_size)
    shape = (12, 3)
    completions = jax.random.randint(jax.random.key(2), shape, 0, vocab_size)
    return prompts, completions

  def test_cache_equals_the_full_forward_pass(
    self, model, params, slots, sequences
  ):
    prompts, completions = sequences
    tokens = jnp.concatenate([jnp.repeat(prompts, 3, 0), completions], 1)
    full = forward(model, params, tokens)[:, slots - 1 : -1]
    cached = logprobs_from_cache(model, params, prompts, completions)
    np.testing.assert_allclose(cached, full, atol=1e-6)

  def test_hidden_states_see_neither_padding_nor_neighbours(
    self, model, params, slots, sequences
  ):
    prompts, completions = sequences
    tokens = jnp.concatenate([prompts, completions[:4]], 1)
    width = tokens.shape[1]
    alone = forward(model, params, tokens)
    # Two sequences a row; padding around them and inside of them.
    gaps = [0, slots, width, width + slots, 2 * width]
    columns = jnp.insert(jnp.arange(2 * width), jnp.array(gaps), -1)
    rows = jnp.concatenate([tokens[:2], tokens[2:]], 1)
    packed = jnp.where(columns[None] < 0, 1, rows[:, columns])
    hidden, cache = model.hidden(
      params,
      packed,
      positions=jnp.broadcast_to(columns % width, packed.shape),
      segment_ids=jnp.broadcast_to(columns // width + 1, packed.shape),
    )
    assert cache is None
    out = jax.nn.log_softmax(model.unembed(params, hidden))[:, columns >= 0]
    apart = jnp.concatenate([out[:, :width], out[:, width:]], 0)
    live = slice(slots - 1, width - 1)
    np.testing.assert_allclose(apart[:, live], alone[:, live], atol=1e-6)

  def test_hidden_states_do_not_see_the_future(
    self, model, params, slots, vocab_size, sequences
  ):
    prompts, completions = sequences
    tokens = jnp.concatenate([prompts, completions[:4]], 1)
    out = forward(model, params, tokens)
    for t in range(slots, tokens.shape[1]):
      future = jnp.arange(tokens.shape[1])[None] >= t
      changed = jnp.where(future, (tokens + 1) % vocab_size, tokens)
      changed = forward(model, params, changed)
      live = slice(slots - 1, t)
      np.testing.assert_array_equal(changed[:, live], out[:, live])

  def test_sampler_reports_the_logprobs_of_the_full_forward_pass(
    self, model, params, slots, sequences
  ):
    prompts, _ = sequences
    samples = sample(
      model,
      params,
      prompts,
      jnp.ones(prompts.shape, bool),
      jax.random.key(3),
      num_samples=5,
      max_new_tokens=3,
      stop_ids=(),
      pad_id=0,
    )
    tokens = jnp.concatenate([jnp.repeat(prompts, 5, 0), samples.tokens], 1)
    full = forward(model, params, tokens)[:, slots - 1 : -1]
    expected = jnp.take_along_axis(full, samples.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(samples.model_logprobs, expected, atol=1e-6)


# The tabular policy.


@pytest.mark.parametrize(
  ('vocab_size', 'length', 'stop_id', 'number'),
  [
    (3, 3, None, 27),
    (5, 2, None, 25),
    (3, 3, 2, 1 + 2 + 4 + 8),
    (2, 4, 1, 5),
    (4, 1, 3, 4),
  ],
)
def test_enumeration_lists_every_sequence_once(
  vocab_size, length, stop_id, number
):
  with jax.enable_x64(True):
    model = tabular_policy(vocab_size=vocab_size, length=length)
    params = model.init(jax.random.key(0))
    listed = enumeration(params, length=length, stop_id=stop_id)
    assert listed.logprobs.dtype == jnp.float64
    assert len(set(map(tuple, listed.tokens.tolist()))) == number
    assert listed.tokens.shape == (number, length)
    total = jnp.exp(listed.logprobs.sum(-1)).sum()
    assert float(total) == pytest.approx(1, abs=1e-14)
    for tokens, mask in zip(listed.tokens, listed.mask, strict=True):
      row = tokens.tolist()
      end = row.index(stop_id) + 1 if stop_id in row else length
      assert mask.tolist() == [t < end for t in range(length)]
      assert not any(row[end:])
    # The same figures from the model, in full and token by token.
    prompt = jnp.zeros((number, 1), jnp.int32)
    full = forward(model, params, jnp.concatenate([prompt, listed.tokens], 1))
    cached = logprobs_from_cache(model, params, prompt[:1], listed.tokens)
    for logprobs in (full[:, :-1], cached):
      chosen = jnp.take_along_axis(logprobs, listed.tokens[..., None], -1)
      np.testing.assert_allclose(
        jnp.where(listed.mask, chosen[..., 0], 0), listed.logprobs, atol=1e-14
      )


def test_gradient_of_the_expected_reward_is_that_of_reinforce():
  with jax.enable_x64(True):
    task = tasks.tabular(vocab_size=3, length=2)
    model = tabular_policy(vocab_size=3, length=2)
    params = model.init(jax.random.key(1))
    rewards = task.rewards['table'](
      jnp.zeros((9, 1), jnp.int32),
      *enumeration(params, length=2)[:2],
    )

    def logprobs(params):
      return enumeration(params, length=2).logprobs.sum(-1)

    def expected(params):
      return (jnp.exp(logprobs(params)) * rewards).sum()

    def surrogate(params):
      weights = jax.lax.stop_gradient(jnp.exp(logprobs(params)) * rewards)
      return (weights * logprobs(params)).sum()

    np.testing.assert_allclose(
      jax.grad(surrogate)(params)['logits'],
      jax.grad(expected)(params)['logits'],
      atol=1e-15,
    )


def test_tabular_rewards_stand_in_the_order_of_the_enumeration():
  table = [0.5 * i for i in range(27)]
  task = tasks.tabular(reward_table=table)
  params = tabular_policy().init(jax.random.key(0))
  listed = enumeration(params, length=3)
  prompts = jnp.zeros((27, 1), jnp.int32)
  rewards = task.rewards['table'](prompts, listed.tokens, listed.mask)
  np.testing.assert_array_equal(rewards, table)


def test_every_stopped_sequence_has_a_reward_of_its_own():
  table = [float(i) for i in range(27)]
  task = tasks.tabular(reward_table=table, stop_id=1)
  params = tabular_policy().init(jax.random.key(0))
  listed = enumeration(params, length=3, stop_id=1)
  prompts = jnp.zeros((15, 1), jnp.int32)
  rewards = task.rewards['table'](prompts, listed.tokens, listed.mask)
  assert len(set(rewards.tolist())) == 15


def test_sampled_frequencies_approach_the_enumerated_probabilities():
  model = tabular_policy(vocab_size=3, length=2)
  params = model.init(jax.random.key(0))
  task = tasks.tabular(vocab_size=3, length=2, stop_id=2)
  prompt, mask = task.prompt(jax.random.key(0))
  samples = sample(
    model,
    params,
    prompt[None],
    mask[None],
    jax.random.key(1),
    num_samples=20_000,
    max_new_tokens=2,
    stop_ids=task.stop_ids,
    pad_id=task.pad_id,
  )
  listed = enumeration(params, length=2, stop_id=2)
  counts = Counter(map(tuple, samples.tokens.tolist()))
  for tokens, logprobs in zip(listed.tokens, listed.logprobs, strict=True):
    p = float(jnp.exp(logprobs.sum()))
    deviation = (p * (1 - p) / 20_000) ** 0.5
    assert abs(counts[tuple(tokens.tolist())] / 20_000 - p) < 5 * deviation


# Boundaries.


def test_render_writes_what_people_read():
  assert tasks.arithmetic().render([12, 12, 1, 10, 2, 3, 11]) == '1+23='
  assert tasks.arithmetic().render(jnp.array([2, 4, 13, 14])) == '24$?'
  assert tasks.sort().render(np.array([4, 2, 4, 4])) == '4 2 4 4'
  assert tasks.tabular().render([0, 2]) == '0 2'


@pytest.mark.parametrize(
  ('block', 'message'),
  [
    ({'name': 'arithmetic', 'num_digits': 0}, 'num_digits=0: choose 1 to 7'),
    ({'name': 'arithmetic', 'num_digits': 8}, 'num_digits=8: choose 1 to 7'),
    ({'name': 'sort', 'vocab_size': 1}, 'vocab_size=1'),
    ({'name': 'sort', 'length': 0}, 'length=0'),
    ({'name': 'tabular', 'vocab_size': 1}, 'vocab_size=1'),
    ({'name': 'tabular', 'length': 40}, 'length=40'),
    ({'name': 'tabular', 'stop_id': 0}, 'stop_id=0: choose 1 to 2'),
    ({'name': 'tabular', 'stop_id': 3}, 'stop_id=3'),
    ({'name': 'tabular', 'reward_table': [1.0]}, '1 entries.* = 27'),
  ],
)
def test_impossible_tasks_are_refused_with_a_remedy(block, message):
  with pytest.raises(ValueError, match=message):
    bind(tasks, block)()


def test_impossible_policies_are_refused_with_a_remedy():
  with pytest.raises(ValueError, match='embed_dim=0'):
    toy_policy(embed_dim=0)
  with pytest.raises(ValueError, match='vocab_size=1'):
    tabular_policy(vocab_size=1)
  with pytest.raises(ValueError, match='max_new_tokens=3'):
    tasks.tabular().rewards['table'](
      jnp.zeros((1, 1), int), jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
    )
