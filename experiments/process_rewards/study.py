"""Models of steps and outcomes of chains, from a policy whose errors are known.

The policy adds modulo five, errs at a rate of the number that it adds, and
says a sum once more now and then (`postrain.tasks.chain`), so that the chance
of success behind each step is known in closed form.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from postrain import losses, tasks
from postrain.aggregation import token_mean
from postrain.batches import take
from postrain.evaluation import best_of_n, calibration_error, majority
from postrain.keys import run_key
from postrain.models.wrap import plain
from postrain.reward_models import step_ends, step_objective, token_scores
from postrain.sampling import sample
from postrain.step_labels import at_ends, rollouts_after_steps, to_ends
from postrain.tasks.chain import noisy_policy, read_steps, success_chances
from postrain.train_step import make_train_step
from postrain.types import Batch, Model, TrainState

MODULUS, STEPS, REPEATS = 5, 4, 2
MAX_STEPS = STEPS + REPEATS
RATES = tuple(np.linspace(0.05, 0.4, MODULUS - 1).tolist())
ROLLOUTS = 8
NUM_PROMPTS, NUM_SAMPLES = 512, 2  # to train on
NUM_UPDATES, ROWS, WIDTH = 400, 128, 32
NUM_HELD_OUT, CANDIDATES = 512, 16
SIZES = (1, 2, 4, 8, 16)
AGGREGATES = ('sum', 'mean', 'min', 'product', 'last')
LABELS = {
  'outcome': 'the answer, at the end',
  'outcome, every step': 'the answer, at every step',
  'soft': f'share of {ROLLOUTS} rollouts that are right',
  'hard': f'any of {ROLLOUTS} rollouts is right',
  'verifier, then 0': 'the step is right; 0 from the first error on',
  'verifier, then none': 'the step is right; none behind the first error',
}
TASK = tasks.chain(modulus=MODULUS, num_steps=STEPS, num_repeats=REPEATS)
POLICY = noisy_policy(
  error_rates=RATES, num_steps=STEPS, num_repeats=REPEATS, repeat_rate=0.15
)


class Drawn(NamedTuple):
  """Completions and what is known of them; [B T] spans the prompt too."""

  tokens: Any
  valid: Any
  ends: Any  # of steps
  answer: Any  # [B]
  sums: Any  # [B], the last of each completion
  right: Any  # [B S], each step by itself
  written: Any  # [B S]
  chance: Any  # [B S], of success
  rollouts: Any  # [B S M]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def drawn(seed: Any, num_prompts: int, num_samples: int, held_out: bool) -> Any:
  """Completions of the policy, and rollouts behind each of their steps."""
  key = run_key(seed, 'held_out' if held_out else 'sample')
  keys = jax.random.split(key, 3)
  params = POLICY.init(key)
  ids = jnp.arange(num_prompts).reshape(-1, 128)
  prompts, seen = jax.vmap(lambda k: TASK.prompt(k, held_out))(
    jax.random.split(keys[0], num_prompts)
  )
  stops = {'stop_ids': TASK.stop_ids, 'pad_id': TASK.pad_id}

  def of_slice(piece: tuple) -> Drawn:
    ids, prompts, seen = piece
    samples = sample(
      POLICY, params, prompts, seen, keys[1], num_samples=num_samples,
      max_new_tokens=TASK.completion_length, prompt_ids=ids, **stops,
    )  # fmt: skip
    ends = step_ends(
      samples.tokens, samples.mask, separators=((MODULUS,),), last=False
    )
    rollouts = rollouts_after_steps(
      POLICY, params, prompts, seen, samples, ends, keys[2],
      verify=TASK.rewards['answer'], max_steps=MAX_STEPS,
      num_rollouts=ROLLOUTS, prompt_ids=ids, **stops,
    )  # fmt: skip
    given = jnp.repeat(prompts, num_samples, axis=0)
    texts = samples.tokens, samples.mask
    steps = read_steps(given, *texts, modulus=MODULUS)
    last = jnp.maximum(steps.written.sum(-1) - 1, 0)[:, None]
    front = ((0, 0), (given.shape[1], 0))
    return Drawn(
      jnp.concatenate([given, samples.tokens], axis=1),
      jnp.pad(samples.mask, front, constant_values=True),
      jnp.pad(ends, front),
      TASK.rewards['answer'](given, *texts),
      jnp.take_along_axis(steps.sums, last, axis=1)[:, 0],
      steps.right,
      steps.written,
      success_chances(given, *texts, jnp.array(RATES, jnp.float32)),
      rollouts,
    )

  sliced = [x.reshape(-1, 128, *x.shape[1:]) for x in (prompts, seen)]
  found = jax.lax.map(of_slice, (ids, *sliced))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def labels_of(kind: str, data: Drawn) -> tuple[Any, Any]:
  """What a model is trained to say [B T], and where."""
  sound = jnp.cumprod(data.right | ~data.written, axis=1) > 0
  steps = {
    'soft': losses.monte_carlo_labels(data.rollouts),
    'hard': losses.monte_carlo_labels(data.rollouts, hard=True),
    'verifier, then 0': jnp.float32(sound & data.written),
    'verifier, then none': jnp.float32(data.right),
  }
  if kind in steps:
    labels = to_ends(steps[kind], data.ends)
    if kind == 'verifier, then none':
      return labels, losses.until_first_error(labels > 0.5, data.ends)
    return labels, data.ends
  labels = jnp.where(data.valid, data.answer[:, None], 0)
  if kind == 'outcome, every step':
    return labels, data.ends
  slots = jnp.arange(data.valid.shape[1])[None]
  last = slots == data.valid.sum(-1, keepdims=True) - 1
  return labels, last


def network() -> Model:
  """Scores from the steps so far and the prompt.

  A step is embedded as what it is: the sum before it, what it adds, its sum.
  The embeddings are added up, and two layers read the total beside the prompt.
  """
  size, length = TASK.vocab_size, TASK.prompt_length
  shapes = {
    'step': (size**3, WIDTH), 'asked': (length * size, WIDTH),
    'total': (WIDTH, WIDTH), 'second': (WIDTH, WIDTH), 'score': (WIDTH, 1),
  }  # fmt: skip

  def init(key: Any) -> Any:
    keys = jax.random.split(key, len(shapes))
    return {
      name: jax.random.normal(k, shape) / min(shape[0], WIDTH) ** 0.5
      for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  def hidden(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
    del positions  # rows begin with their prompt
    prompt = jax.nn.one_hot(tokens[:, :length], size)
    prompt = prompt.reshape(len(tokens), 1, -1)
    # The first step finds the number that it starts from where others do.
    moved = tokens.at[:, length - 2].set(tokens[:, 0])
    before, added, total = (
      jnp.pad(moved, ((0, 0), (by, 0)))[:, :-by] for by in (4, 2, 1)
    )
    steps = params['step'][(before * size + added) * size + total]
    ends = (tokens == MODULUS) & (segments > 0)
    so_far = jnp.cumsum(jnp.where(ends[..., None], steps, 0), axis=1)
    first = so_far @ params['total'] + prompt @ params['asked']
    return jax.nn.relu(jax.nn.relu(first) @ params['second'])

  return plain(init, hidden, lambda params, x: x @ params['score'], size)


@jax.jit
def trained(key: Any, tokens: Any, valid: Any, labels: Any, mask: Any) -> Any:
  """The network from scratch, by cross-entropy where the mask is."""
  of_init, of_rows = jax.random.split(key)
  model = network()
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, NUM_UPDATES))
  train_step = make_train_step(step_objective(model), optimizer)
  batch = Batch(tokens, valid, mask, {}, {'labels': labels})

  def update(state: TrainState, key: Any) -> tuple[TrainState, None]:
    part = take(batch, jax.random.randint(key, (ROWS,), 0, len(tokens)))
    weights = {'policy': token_mean(part.mask)}
    return train_step(state, {}, part.replace(weights=weights))[0], None

  params = {'reward_model': model.init(of_init)}
  start = TrainState(jnp.int32(0), params, optimizer.init(params))
  keys = jax.random.split(of_rows, NUM_UPDATES)
  return jax.lax.scan(update, start, keys)[0].params['reward_model']


@jax.jit
def probabilities(params: Any, tokens: Any, valid: Any) -> Any:
  """σ(score) behind each token."""
  scores = token_scores(network(), params, tokens, valid, valid, num_slices=8)
  return jax.nn.sigmoid(scores)


def area(scores: Any, positive: Any) -> float:
  """P(score of a positive > score of a negative), ties half: the AUC."""
  values, place = np.unique(scores, return_inverse=True)
  counts = np.bincount(place, minlength=len(values))
  ranks = np.cumsum(counts) - (counts - 1) / 2
  count = positive.sum()
  above = ranks[place][positive].sum() - count * (count + 1) / 2
  return float(above / (count * (len(scores) - count)))


def figures(kind: str, chances: Any, data: Drawn) -> dict[str, Any]:
  """Of single steps: order, accuracy, calibration, distance to the truth."""
  labels, mask = map(np.asarray, labels_of(kind, data))
  sound = np.cumprod(data.right | ~data.written, axis=1) > 0
  first = np.asarray(losses.until_first_error(data.right, data.written))
  steps = np.asarray(at_ends(chances, data.ends, max_steps=MAX_STEPS))
  written, chances = np.asarray(data.written), np.asarray(chances)
  gap = (steps - data.chance)[written]
  outcomes = np.broadcast_to(np.asarray(data.answer)[:, None], written.shape)
  return {
    'auc_first': area(steps[first], np.asarray(data.right)[first]),
    'auc_sound': area(steps[written], sound[written]),
    'accuracy': float(((steps > 0.5) == sound)[written].mean()),
    'ece': calibration_error(chances[mask], labels[mask]),
    'ece_answer': calibration_error(steps[written], outcomes[written]),
    'rmse': float(np.sqrt(np.square(gap).mean())),
    'reliability': reliability(steps[written], outcomes[written]),
  }


def reliability(chances: Any, outcomes: Any, num_bins: int = 10) -> list:
  """Mean chance, mean outcome and count of each bin that has any."""
  bins = np.minimum((chances * num_bins).astype(int), num_bins - 1)
  return [
    [float(chances[bins == b].mean()), float(outcomes[bins == b].mean()),
     int((bins == b).sum())]
    for b in range(num_bins) if (bins == b).any()
  ]  # fmt: skip


def selected(scores: Any, data: Drawn) -> list[list[float]]:
  """Right answers and written steps of the best of n, for each n."""
  answer, written = np.asarray(data.answer), np.asarray(data.written).sum(1)
  found = []
  for size in SIZES:
    groups = np.asarray(scores).reshape(-1, size)
    rows = np.arange(len(groups)) * size + best_of_n(groups)
    found.append([float(answer[rows].mean()), float(written[rows].mean())])
  return found


def baselines(data: Drawn) -> dict[str, list[float]]:
  """Votes, and a perfect verifier of the answer."""
  answer, sums = np.asarray(data.answer), np.asarray(data.sums)
  votes, perfect = [], []
  for size in SIZES:
    right, said = answer.reshape(-1, size), sums.reshape(-1, size)
    perfect.append(float(right.max(1).mean()))
    won = [
      r[s.tolist().index(majority(s.tolist()))]
      for r, s in zip(right, said, strict=True)
    ]
    votes.append(float(np.mean(won)))
  return {'majority': votes, 'perfect': perfect}


def study(seed: int) -> dict[str, Any]:
  """Figures and selections of each model of one seed."""
  data = drawn(seed, NUM_PROMPTS, NUM_SAMPLES, False)
  held_out = drawn(seed, NUM_HELD_OUT, CANDIDATES, True)
  found: dict[str, Any] = {'baselines': baselines(held_out)}
  for number, kind in enumerate(LABELS):
    key = run_key(seed, 'init', number)
    params = trained(key, data.tokens, data.valid, *labels_of(kind, data))
    chances = probabilities(params, held_out.tokens, held_out.valid)
    scores = {
      a: losses.step_score(chances, held_out.ends, aggregate=a)
      for a in AGGREGATES
    }
    if kind == 'outcome':
      scores = {'end': losses.last_score(chances, held_out.valid)}
    best = {name: selected(x, held_out) for name, x in scores.items()}
    found[kind] = figures(kind, chances, held_out) | {'best': best}
    shown = {k: v for k, v in found[kind].items() if isinstance(v, float)}
    print(seed, kind, {k: round(v, 3) for k, v in shown.items()}, flush=True)
  return found
