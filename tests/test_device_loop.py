"""The loop inside one jit: many runs at once are the runs one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import sort_documented
from postrain import device_loop, hub
from postrain.models.transformer import Config, transformer
from postrain.recipe import plain
from postrain.tasks.arithmetic import CHARACTERS


@pytest.fixture(autouse=True, scope='module')
def quick_compiler():
  """The whole loop is one large program that runs for a moment."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


SEEDS = jnp.array([3, 11, 5])


def config(**changes):
  """The toy sort in a small size; dots in names are written as two lines."""
  config = sort_documented.get_config().to_dict()
  config['rl'] |= {'num_iterations': 3, 'num_prompts': 8, 'num_epochs': 2}
  config['rl'] |= {'num_minibatches': 2}
  config['sampling']['num_samples'] = 4
  for path, value in changes.items():
    block, _, field = path.partition('__')
    config[block][field] = value
  return config


def assert_close(found, expected, run):
  """Run ``run`` of several equals a run alone."""
  for several, alone in zip(found, expected, strict=True):
    for (path, a), b in zip(
      jax.tree.leaves_with_path(several), jax.tree.leaves(alone), strict=True
    ):
      np.testing.assert_allclose(
        a[run], b[0], rtol=1e-5, atol=2e-6, err_msg=str(path)
      )


def test_many_runs_at_once_are_the_runs_one_by_one():
  """Three seeds, of which two also have a bound of their own."""
  bounds = [0.02, 0.3, 0.02]
  together = device_loop.run(
    config(),
    seeds=SEEDS,
    hyperparameters={'loss.clip_low': jnp.array(bounds)},
  )
  params, figures = together
  assert figures['reward'].shape == (3, 3)
  assert len(np.unique(figures['reward'][:, 0])) == 3  # the seeds do differ
  assert (figures['skipped'] == 0).all()
  clipped = figures['policy/clip_low'].mean(-1)
  assert clipped[0] > clipped[1] + 0.01
  embedding = params['actor']['embedding']
  assert jnp.abs(embedding[0] - embedding[1]).max() > 0.1
  for run, bound in enumerate(bounds):
    alone = device_loop.run(
      config(loss__clip_low=bound), seeds=SEEDS[run : run + 1]
    )
    assert_close(together, alone, run)


def test_hyperparameters_reach_the_sampler_and_the_optimiser():
  """Three runs of one seed, each with one number changed."""
  params, figures = device_loop.run(
    config(rl__num_iterations=1),
    seeds=jnp.array([3, 3, 3]),
    hyperparameters={
      'sampling.temperature': jnp.array([1.0, 3.0, 1.0]),
      'rl.optimizer.learning_rate': jnp.array([1e-2, 1e-2, 0.0]),
      'kl.loss_coef': jnp.array([0.0, 0.0, 0.0]),
    },
  )
  entropy = figures['sampler/entropy'][:, 0]
  assert entropy[1] > entropy[0] + 0.1
  assert entropy[2] == entropy[0]  # the policy of the first rollout is one
  bias = params['actor']['bias']
  moved = jnp.abs(bias - bias[2:]).max(-1)
  assert (moved[:2] > 0.01).all()


@pytest.mark.parametrize(
  ('path', 'said'),
  [
    ('loss.clip_lwo', "'loss.clip_lwo'.*no such field.*clip_low"),
    ('los.clip_low', "config has no 'los'"),
    ('loss.clip_low.inner', "config has no 'clip_low'"),
    ('seeed', 'no such field'),
    ('sampling.num_samples', 'num_samples'),
  ],
)
def test_paths_that_do_not_exist_are_errors(path, said):
  with pytest.raises(ValueError, match=said):
    device_loop.run(config(), seeds=SEEDS, hyperparameters={path: jnp.ones(3)})


def test_one_number_for_each_run():
  with pytest.raises(ValueError, match=r'shape \(2,\).*one number for each'):
    device_loop.run(
      config(),
      seeds=SEEDS,
      hyperparameters={'loss.clip_low': jnp.ones(2)},
    )


@pytest.mark.parametrize(
  'changes', [{'sft__num_steps': 2}, {'filter__informative_only': True}]
)
def test_what_needs_the_host_is_refused(changes):
  with pytest.raises(ValueError, match='neither supervised steps nor dynamic'):
    device_loop.run(config(**changes), seeds=SEEDS)


def test_slots_are_refused():
  with pytest.raises(ValueError, match=r'num_slots=4.*set it to None'):
    device_loop.run(config(sampling__num_slots=4), seeds=SEEDS)
  with pytest.raises(ValueError, match=r'row_length=32.*set it to None'):
    device_loop.run(config(rl__row_length=32), seeds=SEEDS)


def test_demonstrations_beside_updates_are_refused():
  with pytest.raises(ValueError, match=r'ptx.coef=1.0.*set it to None'):
    device_loop.run(config(ptx__coef=1.0), seeds=SEEDS)


def test_a_mesh_is_refused():
  with pytest.raises(ValueError, match=r"mesh with {'data': 8}.*set them to 1"):
    device_loop.run(config(mesh__data=8), seeds=SEEDS)


def test_weights_of_a_directory_are_where_the_runs_begin(tmp_path, monkeypatch):
  """The loop without its iterations, which would compile for ten seconds."""
  monkeypatch.setattr(device_loop, '_iterate', lambda *x: (x[5], {}))
  begun = plain(tiny.arithmetic())
  begun['sft']['num_steps'] = 0
  shape = {k: v for k, v in tiny.transformer().items() if k != 'name'}
  network = Config(vocab_size=len(CHARACTERS), **shape)
  params = jax.jit(transformer(network).init)(jax.random.key(9))
  hub.save(tmp_path / 'model', network, params)
  begun['model'] = dict(name='pretrained', directory=str(tmp_path / 'model'))
  found, _ = device_loop.run(begun, seeds=SEEDS)
  for (path, a), b in zip(
    jax.tree.leaves_with_path(found['actor']), jax.tree.leaves(params),
    strict=True,
  ):  # fmt: skip
    for run in a:
      np.testing.assert_array_equal(run, b, err_msg=str(path))
