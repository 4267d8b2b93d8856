"""PPO with a critic: its values, its updates, and what moves beside them."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax
import pytest
import tiny

from configs import ppo_sort
from postrain import (
  aggregation,
  critics,
  hub,
  losses,
  objectives,
  optimizers,
  reward_models,
  workdir,
)
from postrain.algorithm import make_algorithm
from postrain.batches import reweigh
from postrain.models.config import Config
from postrain.models.heads import scalar_head, with_labels
from postrain.models.transformer import transformer
from postrain.recipe import make_recipe
from postrain.scoring import score
from postrain.tasks.sort import toy_policy
from postrain.train_step import finish, make_train_step
from postrain.trainer import Trainer
from postrain.types import Mean, Samples, SharedPrompts, Sum, TrainState
from postrain.values import token_values

quick_compiler = tiny.quick_compiler


def sorting(**changes: Any) -> ConfigDict:
  """PPO with a critic and a moving coefficient, four updates an iteration."""
  config = tiny.sort()
  config.advantage = dict(name='gae')
  config.whitening = dict(name='whiten')
  config.critic.network = dict(name='copied')
  config.kl.estimator = dict(name='k1')
  config.kl.reward_coef = 0.05
  config.kl.controller = dict(name='adaptive_coef', target=0.1, horizon=100.0)
  config.rl.num_epochs = config.rl.num_minibatches = 2
  config.rl.kl_stop = 0.02
  config.checkpoint.every = 1
  config.checkpoint.keep = 5
  config.evaluation.num_prompts = config.evaluation.batch_size = 8
  for path, value in changes.items():
    *blocks, field = path.split('__')
    functools.reduce(lambda c, name: c[name], blocks, config)[field] = value
  return config


def demonstrated() -> ConfigDict:
  """The same beside demonstrations."""
  return sorting(ptx__coef=0.1, ptx__batch_size=4)


def rows(directory: pathlib.Path) -> list[dict]:
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_same_bits(left: Any, right: Any) -> None:
  jax.tree.map(np.testing.assert_array_equal, left, right)


assert_close = functools.partial(
  jax.tree.map,
  functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6),
)


@pytest.fixture(scope='module')
def whole(
  tmp_path_factory: pytest.TempPathFactory,
) -> tuple[pathlib.Path, TrainState, TrainState]:
  """A run: its directory, its first state and its last."""
  directory = tmp_path_factory.mktemp('critic')
  trainer = Trainer(demonstrated(), str(directory))
  return directory, trainer._states.fresh(), trainer.run()


def test_m16_the_reference_begins_as_the_actor_and_keeps_its_bits(
  whole: tuple[pathlib.Path, TrainState, TrainState],
) -> None:
  directory, first, last = whole
  assert_same_bits(first.ref_params, first.params['actor'])
  assert_same_bits(first.params['critic']['backbone'], first.params['actor'])
  assert not first.params['critic']['head'].any()
  assert_same_bits(first.ref_params, last.ref_params)
  for role in ('actor', 'critic'):
    assert optax.tree.norm(
      jax.tree.map(jnp.subtract, first.params[role], last.params[role])
    )
  found = rows(directory)[0]
  assert found['reference/kl_sequence'] == found['value/old'] == 0
  assert found['reference/kl_sequence_root'] == 0
  # Of a reward on the last of three tokens, with values of 0.
  decayed = found['reward'] * (1 + 0.95 + 0.95**2) / 3
  assert found['value/returns'] == pytest.approx(decayed, rel=1e-5)
  assert found['value/explained_variance'] == 0


def test_m15_the_coefficient_follows_the_measured_divergence(
  whole: tuple[pathlib.Path, TrainState, TrainState],
) -> None:
  directory, first, last = whole
  found, coef = rows(directory), 0.05
  for row in found:
    assert row['reference/kl_coef'] == pytest.approx(coef, rel=1e-6)
    error = np.clip(row['reference/kl_sequence'] / 0.1 - 1, -0.2, 0.2)
    coef *= 1 + error * 16 / 100
  assert float(first.kl_coef) == np.float32(0.05)
  assert float(last.kl_coef) == pytest.approx(coef, rel=1e-6)


class Killed(BaseException):
  """What ends a run in the middle."""


def test_a_killed_run_ends_with_the_same_bits(
  whole: tuple[pathlib.Path, TrainState, TrainState],
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  directory, _, last = whole

  def die_at(point: str, step: int) -> None:
    if (point, step) == ('in_rollout', 2):
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(workdir, 'die_at', die_at)
    with pytest.raises(Killed):
      Trainer(demonstrated(), str(tmp_path)).run()
  assert not (tmp_path / 'finished.json').exists()
  assert_same_bits(Trainer(demonstrated(), str(tmp_path)).run(), last)
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_m13_a_large_coefficient_keeps_the_policy(
  tmp_path: pathlib.Path,
) -> None:
  """The coefficient is of the state: both runs are the same programs."""
  found = {}
  for coef in (1e-3, 1e6):
    config = sorting(kl__reward_coef=coef, rl__num_iterations=12)
    config.kl.controller = {**config.kl.controller, 'horizon': 1e9}
    config.checkpoint.every = 100
    Trainer(config, str(tmp_path / str(coef))).run()
    found[coef] = rows(tmp_path / str(coef))
    for row in found[coef]:
      row.pop('reference/kl_coef')
  # Nothing is paid at the reference: whatever the coefficient, the same bits.
  first, bound = found[1e-3][0], found[1e6][0]
  assert bound == first
  ends = [
    np.mean([row['reference/kl_token'] for row in found[coef][-4:]])
    for coef in (1e-3, 1e6)
  ]
  assert ends[1] < ends[0] / 4, ends


@pytest.mark.slow
def test_m15_the_controller_holds_its_target(tmp_path: pathlib.Path) -> None:
  config = sorting(rl__num_iterations=150, rl__num_prompts=16)
  config.kl.controller = dict(name='adaptive_coef', target=0.3, horizon=200.0)
  config.checkpoint.every = 1000
  Trainer(config, str(tmp_path)).run()
  held = [row['reference/kl_sequence'] for row in rows(tmp_path)[75:-1]]
  assert 0.2 < np.mean(held) < 0.4


# One step against its pieces.

VOCAB, LENGTH = 5, 3
MODEL = toy_policy(vocab_size=VOCAB, length=LENGTH, embed_dim=4)
CRITIC = scalar_head(MODEL)


@functools.cache
def first_update() -> Any:
  """State, batch and figures before and after an update of all rows.

  In slices, which must change nothing.
  """
  config = sorting(
    rl__num_epochs=1, rl__num_minibatches=1, rl__num_micro_batches=4,
    rl__num_score_slices=2,
  )  # fmt: skip
  config.kl.controller = config.rl.kl_stop = None
  config.rl.optimizer = dict(
    name='adamw', learning_rate=10.0, eps=1.0, clip_norm=0.01
  )
  config.critic.optimizer = dict(
    name='adamw', learning_rate=2.0, eps=1.0, clip_norm=0.1
  )
  config.critic.coef = 0.5
  recipe = make_recipe(config)
  functions = make_algorithm(recipe, MODEL, pad_id=0, stop_ids=())

  def step(key: Any) -> Any:
    keys = jax.random.split(key, 5)
    critic = CRITIC.init(keys[0])
    critic['head'] = jax.random.normal(keys[1], critic['head'].shape)
    params = {'actor': MODEL.init(keys[0]), 'critic': critic}
    reference = MODEL.init(keys[2])
    prompts = jax.random.randint(keys[3], (4, LENGTH), 0, VOCAB)
    mask = jnp.ones(prompts.shape, bool)
    tokens = jax.random.randint(keys[4], (16, LENGTH), 0, VOCAB)
    flat = jnp.zeros(tokens.shape)
    samples = Samples(tokens, flat == 0, flat, flat, flat[:, 0] > 0)
    rewards = samples.tokens[:, 0].reshape(4, 4).astype(jnp.float32)
    batch, scored, _ = functions.prepare(
      params, reference, prompts, mask, samples, rewards,
      {'reward_parts': rewards[..., None]},
    )  # fmt: skip
    state = TrainState(
      jnp.int32(0), params, functions.rl_optimizer.init(params), reference
    )
    after, figures = functions.update(state, batch, jnp.arange(16), keys[0])
    return state, batch, after, {**scored, **figures}

  state, batch, after, figures = jax.jit(step)(jax.random.key(0))
  return recipe, state, batch, after, finish(figures)


def test_m06_values_advantages_and_returns_of_a_rollout() -> None:
  _, state, batch, _, figures = first_update()
  arrays = {k: np.asarray(v, float) for k, v in batch.arrays.items()}
  critic = state.params['critic']
  hidden, _ = MODEL.hidden(
    critic['backbone'], batch.tokens, segment_ids=jnp.ones_like(batch.tokens),
    positions=jnp.broadcast_to(jnp.arange(2 * LENGTH), batch.tokens.shape),
  )  # fmt: skip
  seen = np.asarray(hidden @ critic['head'], float)[:, LENGTH - 1 : -1, 0]
  values = arrays['old_values'][:, LENGTH:]
  np.testing.assert_allclose(values, seen, atol=1e-5)
  assert not arrays['old_values'][:, :LENGTH].any()
  gap = arrays['old_logprobs'] - arrays['ref_logprobs']
  rewards = -0.05 * gap[:, LENGTH:]
  rewards[:, -1] += np.asarray(batch.tokens)[:, LENGTH]
  following, raw = np.zeros(16), np.zeros_like(values)
  for t in reversed(range(LENGTH)):
    after = values[:, t + 1] if t + 1 < LENGTH else 0
    following = rewards[:, t] + after - values[:, t] + 0.95 * following
    raw[:, t] = following
  returns = raw + values
  np.testing.assert_allclose(
    arrays['returns'][:, LENGTH:], returns, rtol=1e-5, atol=1e-5
  )
  white = (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(
    arrays['advantages'][:, LENGTH:], white, rtol=1e-4, atol=1e-5
  )
  explained = 1 - np.var(returns - values) / np.var(returns)
  assert figures['value/explained_variance'] == pytest.approx(explained, 1e-4)


def test_m16_an_update_is_that_of_each_role_alone() -> None:
  """Each by its own optimiser, clipped by its own norm."""
  recipe, state, batch, after, figures = first_update()
  weigh = functools.partial(reweigh, aggregation=aggregation.token_mean)

  def loss(params: Any) -> Any:
    batch_of_all = weigh(batch)
    objective = objectives.policy_gradient(
      MODEL, loss=functools.partial(losses.ppo_clip, clip_low=0.2)
    )
    found = token_values(
      CRITIC, params['critic'], batch.tokens, batch.valid, batch.mask
    )
    error, _ = losses.clipped_squared_error(
      found, batch.arrays['old_values'], batch.arrays['returns'], batch.mask
    )
    policy, _ = objective({'actor': params['actor']}, {}, batch_of_all)
    value = jnp.sum(batch_of_all.weights['value'] * error)
    return policy + 0.5 * value, value

  gradient, value = jax.jit(jax.grad(loss, has_aux=True))(state.params)
  assert figures['loss/value'] == pytest.approx(float(value), rel=1e-5)
  blocks = {'actor': recipe.rl.optimizer, 'critic': recipe.critic.optimizer}
  for role, block in blocks.items():
    block = {k: v for k, v in block.items() if k != 'name'}
    optimizer = optimizers.adamw(**block)
    part = state.params[role]
    with jax.numpy_dtype_promotion('standard'):
      updates, _ = optimizer.update(gradient[role], optimizer.init(part), part)
    expected = optax.apply_updates(part, updates)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4),
      after.params[role], expected,
    )  # fmt: skip
    norm = float(optax.tree.norm(gradient[role]))
    assert figures[f'gradient_norm/{role}'] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize('stop', [False, True])
def test_m16_a_shared_trunk_has_both_gradients(stop: bool) -> None:
  _, state, batch, *_ = first_update()
  network = critics.shared(MODEL, 0, stop_gradient=stop)
  head = {'head': state.params['critic']['head']}
  actor = state.params['actor']
  batch = reweigh(batch, aggregation=aggregation.token_mean)
  ppo = functools.partial(losses.ppo_clip, clip_low=0.2)
  objective = objectives.policy_gradient(
    MODEL, loss=ppo, value_loss=losses.squared_error, value_coef=0.5,
    critic=network.model, trunk=network.trunk,
  )  # fmt: skip
  plain = objectives.policy_gradient(MODEL, loss=ppo)

  def values(actor: Any, head: Any) -> Any:
    params = {'backbone': actor, **head}
    found = token_values(CRITIC, params, batch.tokens, batch.valid, batch.mask)
    error, _ = losses.squared_error(found, batch.arrays['returns'], batch.mask)
    return 0.5 * jnp.sum(batch.weights['value'] * error)

  @jax.jit
  def gradients(roles: Any) -> Any:
    both, _ = jax.grad(lambda p: objective(p, {}, batch), has_aux=True)(roles)
    policy, _ = jax.grad(lambda p: plain(p, {}, batch), has_aux=True)(
      {'actor': roles['actor']}
    )
    of_values = jax.grad(values, (0, 1))(roles['actor'], roles['critic'])
    return both, policy['actor'], *of_values

  both, policy, of_trunk, of_head = gradients({'actor': actor, 'critic': head})
  assert_close(both['critic'], of_head)
  whole = jax.tree.map(jnp.add, policy, of_trunk)
  assert_close(both['actor'], policy if stop else whole)


@pytest.mark.slow
def test_m16_a_run_with_one_trunk(tmp_path: pathlib.Path) -> None:
  config = sorting(rl__num_iterations=2)
  config.critic.network = dict(name='shared', stop_gradient=True)
  last = Trainer(config, str(tmp_path)).run()
  assert last.params['critic'].keys() == {'head'}
  assert last.params['critic']['head'].any()


# Demonstrations beside the updates.


def test_m16_demonstrations_add_their_supervised_gradient() -> None:
  """Times the coefficient, in however many slices."""
  _, state, batch, *_ = first_update()
  draw = jax.random.randint(jax.random.key(7), (6, 2 * LENGTH), 0, VOCAB)
  valid = jnp.arange(2 * LENGTH)[None] < jnp.arange(1, 7)[:, None]
  shown = draw, valid, valid.at[:, :2].set(False)

  def moved(coef: float | None, num_micro_batches: int = 1) -> Any:
    config = sorting(
      ptx__coef=coef, ptx__batch_size=6,
      ptx__num_micro_batches=num_micro_batches,
      critic__network=None, advantage=dict(name='group_centered'),
      whitening=None,
    )  # fmt: skip
    config.rl.optimizer = dict(name='sgd', learning_rate=1.0)
    config.kl.controller = config.rl.kl_stop = None
    update = make_algorithm(
      make_recipe(config), MODEL, pad_id=0, stop_ids=()
    ).update
    actor = {'actor': state.params['actor']}
    begun = TrainState(jnp.int32(0), actor, ())
    step = jax.jit(functools.partial(update, demonstrations=shown))
    after, figures = step(begun, batch, jnp.arange(8), jax.random.key(0))
    return after.params['actor'], finish(figures)

  def likelihood(params: Any) -> Any:
    tokens, valid, mask = shown
    found = score(MODEL, params, tokens, valid, mask).logprobs
    return -jnp.where(mask, found, 0).sum() / mask.sum(dtype=jnp.float32)

  loss, gradient = jax.jit(jax.value_and_grad(likelihood))(
    state.params['actor']
  )
  plain, before = moved(None)
  whole, figures = moved(0.5)
  assert_close(
    jax.tree.map(jnp.subtract, plain, whole),
    jax.tree.map(lambda g: 0.5 * g, gradient),
  )
  assert_close(moved(0.5, 3)[0], whole)
  assert figures['loss/ptx'] == pytest.approx(float(loss), rel=1e-5)
  both = before['loss'] + float(loss) / 2
  assert figures['loss'] == pytest.approx(both, abs=1e-5)


# Early stop.


def test_m17_an_update_past_the_limit_leaves_all_as_it_is() -> None:
  def objective(params: Any, frozen: Any, batch: Any) -> Any:
    total = jnp.sum(params['actor'] * batch.arrays['x'])
    return total, {'loss': Sum(total), 'policy/old_k1': Mean(total, total + 1)}

  optimizer = optimizers.adam(learning_rate=0.1)
  _, _, batch, *_ = first_update()
  batch = dataclasses.replace(batch, arrays={'x': jnp.ones((16, 2))})
  params = {'actor': jnp.ones((16, 2))}
  step = jax.jit(
    make_train_step(
      objective, optimizer, stop=lambda state, metrics: state.stopped
    )
  )
  for stopped in (True, False):
    state = TrainState(
      jnp.int32(0), params, optimizer.init(params), stopped=jnp.bool_(stopped)
    )
    after, metrics = step(state, {}, batch)
    assert int(after.step) == 1
    assert finish(metrics)['stopped'] == stopped
    assert bool((after.params['actor'] == 1).all()) == stopped
    assert int(jax.tree.leaves(after.opt_state)[0]) == (not stopped)


@pytest.mark.parametrize(
  ('step', 'before', 'divergence', 'expected'),
  [(1, False, 0.029, False), (1, False, 0.031, True), (1, True, 0.0, True),
   (4, True, 0.0, False), (5, True, -1.0, True)],
)  # fmt: skip
def test_m17_it_stops_past_one_and_a_half_until_the_next_iteration(
  step: int, before: bool, divergence: float, expected: bool
) -> None:
  from postrain.control import make_stop

  stop = make_stop(make_recipe(sorting()))
  state = TrainState(jnp.int32(step), {}, None, stopped=jnp.bool_(before))
  figure = Mean(jnp.float32(divergence), jnp.float32(1))
  assert bool(stop(state, {'policy/old_k1': figure})) == expected


# Networks.

SHAPE = {k: v for k, v in tiny.transformer().items() if k != 'name'}


def test_values_of_shared_prompts_are_those_of_repeated_ones() -> None:
  critic = scalar_head(transformer(Config(vocab_size=9, **SHAPE)))
  tokens = jax.random.randint(jax.random.key(1), (4, 7), 0, 9)
  tokens = tokens.at[1:, :3].set(tokens[:1, :3])
  valid = jnp.ones(tokens.shape, bool).at[:, 0].set(False)
  mask = valid.at[:, :3].set(False)
  shared = SharedPrompts(3, 4)

  @jax.jit
  def both(key: Any) -> Any:
    params = critic.init(key)
    params['head'] = jax.random.normal(key, params['head'].shape)
    rows = (critic, params, tokens, valid, mask)
    return token_values(*rows), token_values(*rows, shared)

  plain, found = both(jax.random.key(0))
  np.testing.assert_allclose(found, plain, atol=1e-5)
  assert not plain[:, :3].any()


def directory_of(folder: pathlib.Path, vocab_size: int, num_labels: int) -> Any:
  config = Config(vocab_size=vocab_size, **SHAPE)
  model = transformer(config)
  config, params = with_labels(
    config, jax.jit(model.init)(jax.random.key(5)), num_labels=num_labels
  )
  params['score'] = np.arange(16.0 * num_labels, dtype=np.float32).reshape(
    16, num_labels
  )
  hub.save(folder, config, params, source={'pad_token_id': 0})
  return params


def test_a_critic_begins_as_a_reward_model(tmp_path: pathlib.Path) -> None:
  folder = tmp_path / 'model'
  params = directory_of(folder, 40, 1)
  changed = tiny.arithmetic()
  changed.sft.num_steps = changed.evaluation.every = 0
  changed.advantage = dict(name='gae')
  changed.critic.network = dict(name='pretrained', directory=str(folder))
  trainer = Trainer(changed, str(tmp_path / 'run'))
  state = trainer._states.fresh()
  assert_same_bits(state.params['critic'], params)
  network = critics.pretrained(MODEL, 0, directory=str(folder))
  tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 40)
  valid = jnp.ones(tokens.shape, bool)

  @jax.jit
  def both(params: Any) -> Any:
    rows = network.model, params, tokens, valid, valid
    return token_values(*rows), reward_models.token_scores(*rows)

  values, scores = both(params)
  np.testing.assert_allclose(values[:, 1:], scores[:, :-1], atol=1e-5)


def test_a_critic_begins_as_what_another_run_left(
  tmp_path: pathlib.Path,
) -> None:
  config = tiny.arithmetic()
  config.sft.num_steps = config.evaluation.every = 0
  config.advantage = dict(name='gae')
  config.critic.network = dict(name='copied')
  trainer = Trainer(config, str(tmp_path / 'first'))
  state = trainer._states.fresh()
  critic = state.params['critic']
  critic['head'] = jax.random.normal(jax.random.key(0), critic['head'].shape)
  with trainer._report(0) as report:
    trainer._finish(state, report)
  folder = str(tmp_path / 'first' / 'export_critic')
  config.critic.network = dict(name='pretrained', directory=folder)
  trainer = Trainer(config, str(tmp_path / 'second'))
  begun = trainer._states.fresh().params['critic']
  assert_same_bits(begun['score'], critic['head'])
  trunk = {k: v for k, v in critic['backbone'].items() if k != 'unembedding'}
  assert_same_bits({k: begun[k] for k in trunk}, trunk)
  network = trainer.algorithm.critic
  again = str(tmp_path / 'again')
  critics.export(
    network, trainer.actor, trainer.environment, again, {'critic': begun}
  )
  assert_same_bits(hub.load(again, head='sequence_labels').params, begun)


@pytest.mark.parametrize(
  ('vocab_size', 'num_labels', 'message'),
  [(40, 2, 'num_labels=2, a value is one number'),
   (3, 1, 'ids, the embedding of the critic 3 rows')],
)  # fmt: skip
def test_a_reward_model_that_is_no_critic(
  vocab_size: int, num_labels: int, message: str, tmp_path: pathlib.Path
) -> None:
  directory_of(tmp_path / 'model', vocab_size, num_labels)
  config = tiny.arithmetic()
  config.advantage = dict(name='gae')
  config.critic.network = dict(
    name='pretrained', directory=str(tmp_path / 'model')
  )
  with pytest.raises(ValueError, match=message):
    Trainer(config, str(tmp_path / 'run'))


@pytest.mark.parametrize('name', ['copied', 'fresh'])
def test_a_trunk_with_adapters_is_not_copied(
  name: str, tmp_path: pathlib.Path
) -> None:
  config = tiny.arithmetic()
  config.advantage = dict(name='gae')
  config.critic.network = dict(name=name)
  config.model.lora = dict(rank=1, alpha=1.0, targets='layers/query')
  with pytest.raises(ValueError, match=f"'{name}' with model.lora"):
    Trainer(config, str(tmp_path))


def test_a_fresh_critic_is_drawn_by_the_seed(tmp_path: pathlib.Path) -> None:
  config = sorting(critic__network=dict(name='fresh'))
  state = Trainer(config, str(tmp_path))._states.fresh()
  critic = state.params['critic']['backbone']
  assert (critic['embedding'] != state.params['actor']['embedding']).any()


@pytest.mark.slow
def test_the_config_learns(tmp_path: pathlib.Path) -> None:
  config = ppo_sort.get_config()
  config.rl.num_iterations = config.evaluation.every = 60
  Trainer(config, str(tmp_path)).run()
  found = rows(tmp_path)
  means = [
    np.mean([row['reward'] for row in part])
    for part in (found[:5], found[-6:-1])
  ]
  assert means[1] > means[0] + 1.5, means
  gaps = [row['value/old'] - row['value/returns'] for row in found[10:-1]]
  assert np.abs(np.mean(gaps)) < 0.2, gaps
