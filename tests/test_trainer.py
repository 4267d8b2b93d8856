"""Whole runs: what they write, and that each choice does what it says."""

from collections.abc import Callable
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import tiny

from postrain import device_loop, grading, hub, metrics
from postrain.trainer import Trainer
from postrain.types import Batch, Samples, TrainState

quick_compiler = tiny.quick_compiler


def rows(directory: pathlib.Path, name: str = 'metrics') -> list[dict]:
  lines = (directory / f'{name}.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def run(config: ConfigDict, directory: pathlib.Path) -> TrainState:
  return Trainer(config, str(directory)).run()


def equal(left: Any, right: Any) -> bool:
  return all(
    jax.tree.leaves(
      jax.tree.map(lambda a, b: bool((a == b).all()), left, right)
    )
  )


def change(left: Any, right: Any) -> float:
  return max(
    float(jnp.abs(a - b).max())
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
  )


# One run of a transformer: supervised steps, iterations, evaluation, export.


@pytest.fixture(scope='module')
def whole(
  tmp_path_factory: pytest.TempPathFactory,
) -> tuple[pathlib.Path, TrainState]:
  directory = tmp_path_factory.mktemp('whole')
  trainer = Trainer(tiny.arithmetic(), str(directory), {'seed': 0})
  return directory, trainer.run()


def test_files(whole: tuple[pathlib.Path, TrainState]) -> None:
  directory, _ = whole
  record = json.loads((directory / 'config.json').read_text())
  assert record['overrides'] == {'seed': 0}
  assert record['config']['rl']['num_prompts'] == 4
  assert record['versions']['jax'] == jax.__version__
  assert 'commit' in record
  assert (directory / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert json.loads((directory / 'finished.json').read_text()) == {'steps': 4}
  assert [p.name for p in (directory / 'checkpoints').iterdir()] == ['4']


def test_metrics_hold_every_step_and_no_clock(
  whole: tuple[pathlib.Path, TrainState],
) -> None:
  directory, _ = whole
  found = rows(directory)
  assert [row['step'] for row in found] == [0, 1, 2, 3, 4]
  assert not any('second' in key for row in found for key in row)
  for row in found[:2]:
    assert row['sft/probability'] > 0
  for row in found[2:4]:
    assert row['sampler/logprob_gap_max'] < 1e-5
    assert row['reward'] == pytest.approx(
      row['reward/digits'] + 0.5 * row['reward/exact']
    )
  for row in (found[0], found[2], found[4]):
    assert 0 <= row['eval/greedy'] <= 1
    assert 0 <= row['eval/pass@1'] <= row['eval/pass@2'] <= 1
  assert not {'eval/greedy'} & (found[1].keys() | found[3].keys())
  timings = rows(directory, 'timings')
  assert [row['step'] for row in timings] == [0, 1, 2, 3, 4]
  parts = {f'seconds/{p}' for p in ('sample', 'reward', 'score', 'update')}
  assert parts | {'seconds/total', 'tokens_per_second'} <= timings[3].keys()


def test_samples_hold_every_completion(
  whole: tuple[pathlib.Path, TrainState],
) -> None:
  directory, _ = whole
  found = rows(directory, 'samples')
  steps = rows(directory)
  assert [row['step'] for row in found] == [2] * 16 + [3] * 16
  for step in (2, 3):
    group = [row for row in found if row['step'] == step]
    for key in ('reward', 'reward/digits', 'reward/exact'):
      mean = np.mean([row[key] for row in group])
      assert mean == pytest.approx(steps[step][key], abs=1e-6)
    share = np.mean([row['truncated'] for row in group])
    assert share == pytest.approx(steps[step]['completion/truncated'])
    gap = max(row['logprob_gap'] for row in group)
    assert gap == pytest.approx(steps[step]['sampler/logprob_gap_max'])
  rewards = np.array([row['reward'] for row in found]).reshape(-1, 4)
  advantages = np.array([row['advantage'] for row in found]).reshape(-1, 4)
  centered = rewards - rewards.mean(-1, keepdims=True)
  deviation = rewards.std(-1, keepdims=True)
  np.testing.assert_allclose(
    advantages, centered / (deviation + 1e-6), atol=1e-4
  )
  (prompt,) = {row['prompt'] for row in found[:4]}
  assert prompt.endswith('=')


def test_export_holds_the_trained_bits(
  whole: tuple[pathlib.Path, TrainState],
) -> None:
  directory, state = whole
  loaded = hub.load(directory / 'export')
  assert equal(loaded.params, state.params['actor'])


@pytest.mark.parametrize(
  'changes', [dict(num_slots=3, num_halvings=1), dict(num_cache_sizes=2)]
)
def test_no_way_of_sampling_changes_a_completion(
  changes: dict[str, int],
  whole: tuple[pathlib.Path, TrainState],
  tmp_path: pathlib.Path,
) -> None:
  config = tiny.arithmetic()
  config.sampling.update(changes)
  config.evaluation.every = 0
  run(config, tmp_path)
  drawn = ('prompt', 'completion', 'reward')
  found, expected = (
    [[row[k] for k in drawn] for row in rows(directory, 'samples')]
    for directory in (tmp_path, whole[0])
  )
  assert found == expected


def test_finished_run_says_so_and_changes_nothing(
  whole: tuple[pathlib.Path, TrainState], capsys: pytest.CaptureFixture
) -> None:
  directory, state = whole
  before = (directory / 'metrics.jsonl').read_bytes()
  capsys.readouterr()
  again = run(tiny.arithmetic(), directory)
  assert capsys.readouterr().out.endswith('this run is finished (4 steps)\n')
  assert equal(again.params, state.params)
  assert (directory / 'metrics.jsonl').read_bytes() == before


# Two stages of the toy policy.


def sorting(**changes: Any) -> ConfigDict:
  config = tiny.sort()
  with config.unlocked():
    for path, value in changes.items():
      *blocks, field = path.split('__')
      inner = config
      for block in blocks:
        inner = inner[block]
      inner[field] = value
  return config


KL = {'kl__loss_coef': 0.1, 'reference__update': 'frozen'}


def test_two_runs_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
  config = sorting(rl__num_minibatches=2, rl__num_epochs=2, **KL)
  first, second = (run(config, tmp_path / name) for name in 'ab')
  assert equal(first, second)
  for name in ('metrics.jsonl', 'samples.jsonl'):
    contents = [(tmp_path / run / name).read_bytes() for run in 'ab']
    assert contents[0] == contents[1]
  other = run(sorting(seed=1, **KL), tmp_path / 'c')
  assert not equal(first.params, other.params)


def test_stopping_and_going_on_changes_no_bit(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = sorting(
    sft__num_steps=3, sft__batch_size=8, rl__num_iterations=4,
    checkpoint__every=2, reference__update='ema', kl__loss_coef=0.1,
    evaluation__every=3, evaluation__num_prompts=8,
    evaluation__batch_size=8,
  )  # fmt: skip
  whole = run(config, tmp_path / 'whole')

  class Stop(Exception):
    """Stands for whatever ends a process."""

  def raising(*arguments: Any) -> None:
    raise Stop

  # In the supervised stage, at its last step, in the first iteration, later.
  for step in (1, 2, 3, 5):
    trainer = Trainer(config, str(tmp_path / 'parts'))
    forward = trainer._step

    def until(
      state: TrainState, number: int, report: Any,
      forward: Callable = forward, last: int = step,
    ) -> TrainState:  # fmt: skip
      state = forward(state, number, report)
      if number == last:
        raise Stop
      return state

    trainer._step = until
    with pytest.raises(Stop):
      trainer.run()
  # After the last row, before the run is called finished; twice.
  for _ in range(2):
    with monkeypatch.context() as patch:
      patch.setattr(metrics, 'curves', raising)
      with pytest.raises(Stop):
        run(config, tmp_path / 'parts')
    assert not (tmp_path / 'parts' / 'finished.json').exists()
    assert rows(tmp_path / 'parts')[-1]['step'] == 7
  parts = run(config, tmp_path / 'parts')
  assert equal(whole, parts)
  for name in ('metrics.jsonl', 'samples.jsonl'):
    contents = [(tmp_path / p / name).read_bytes() for p in ('whole', 'parts')]
    assert contents[0] == contents[1]


def test_checkpoint_of_another_shape(tmp_path: pathlib.Path) -> None:
  run(sorting(rl__num_iterations=1), tmp_path)
  (tmp_path / 'config.json').unlink()
  message = r'checkpoint 1 .* actor/bias is absent|embedding is float32\[5,4\]'
  with pytest.raises(ValueError, match=message):
    run(sorting(rl__num_iterations=1, model__embed_dim=8), tmp_path)


def test_references_move_as_they_say(tmp_path: pathlib.Path) -> None:
  start = run(sorting(rl__num_iterations=1, **KL), tmp_path / 'first')
  two = run(sorting(rl__num_iterations=2, **KL), tmp_path / 'frozen')
  assert equal(start.ref_params, two.ref_params)
  assert change(start.ref_params, start.params['actor']) > 0.01

  choices = {'kl__loss_coef': 0.1, 'reference__update': 'refresh'}
  config = sorting(rl__num_iterations=3, reference__every=2, **choices)
  refreshed = run(config, tmp_path / 'refresh')
  # The first two iterations meet the frozen reference, the third the policy
  # after them.
  assert equal(refreshed.ref_params, two.params['actor'])
  assert not equal(refreshed.ref_params, refreshed.params['actor'])

  choices = {'kl__loss_coef': 0.1, 'reference__update': 'ema'}
  config = sorting(rl__num_iterations=1, reference__decay=0.75, **choices)
  moved = run(config, tmp_path / 'ema')
  assert equal(moved.params, start.params)
  expected = jax.tree.map(
    lambda r, p: 0.75 * r + 0.25 * p, start.ref_params, start.params['actor']
  )
  assert change(moved.ref_params, expected) < 1e-6


def test_kl_binds_in_reward_in_loss_and_in_both(
  tmp_path: pathlib.Path,
) -> None:
  plain = run(sorting(), tmp_path / 'plain')
  assert plain.ref_params is None
  assert 'reference/kl_token' not in rows(tmp_path / 'plain')[0]
  found = {'plain': plain.params}
  for name, coefs in {
    'reward': {'kl__reward_coef': 0.5},
    'loss': {'kl__loss_coef': 0.5},
    'both': {'kl__reward_coef': 0.5, 'kl__loss_coef': 0.5},
  }.items():
    config = sorting(advantage=dict(name='group_centered'), **coefs)
    found[name] = run(config, tmp_path / name).params
    steps = rows(tmp_path / name)
    assert steps[0]['reference/kl_sequence'] == 0
    assert steps[2]['reference/kl_token'] > 0
    assert ('policy/kl_loss' in steps[2]) == ('kl__loss_coef' in coefs)
  names = list(found)
  for i, left in enumerate(names):
    for right in names[i + 1 :]:
      assert not equal(found[left], found[right])
  # The penalty enters the advantage, not the reward that is reported.
  samples = rows(tmp_path / 'reward', 'samples')[-16:]
  rewards = np.array([row['reward'] for row in samples]).reshape(-1, 4)
  advantages = np.array([row['advantage'] for row in samples]).reshape(-1, 4)
  assert np.abs(
    advantages - rewards + rewards.mean(-1, keepdims=True)
  ).max() > (1e-3)
  np.testing.assert_allclose(advantages.sum(-1), 0, atol=1e-5)


def test_entropy_bonus_raises_entropy(tmp_path: pathlib.Path) -> None:
  final = {
    coef: (
      run(
        sorting(entropy_coef=coef, rl__num_iterations=6), tmp_path / str(coef)
      ),
      rows(tmp_path / str(coef))[-1]['sampler/entropy'],
    )[1]
    for coef in (0.0, 2.0)
  }
  assert final[2.0] > final[0.0] + 0.05


def test_correction_binds(tmp_path: pathlib.Path) -> None:
  plain = run(sorting(rl__num_iterations=1), tmp_path / 'plain')
  capped = {
    cap: run(
      sorting(
        rl__num_iterations=1,
        correction=dict(name='truncated', cap=cap, level='token'),
      ),
      tmp_path / str(cap),
    )
    for cap in (2.0, 0.5)
  }
  # The engines agree: the weights are 1, or the cap where that is lower; Adam
  # is blind to such a scale, the gradient's norm is not.
  assert change(plain.params, capped[2.0].params) < 1e-4
  norms = {
    name: rows(tmp_path / name)[0]['gradient_norm']
    for name in ('plain', '2.0', '0.5')
  }
  assert norms['2.0'] == pytest.approx(norms['plain'], rel=1e-4)
  assert norms['0.5'] == pytest.approx(0.5 * norms['plain'], rel=1e-4)


def test_dynamic_sampling_collects_informative_groups(
  tmp_path: pathlib.Path,
) -> None:
  # A right answer is rare: most groups say nothing.
  choices = {
    'environment__task__vocab_size': 3,
    'environment__task__length': 2,
    'sampling__max_new_tokens': 2,
    'rewards': dict(exact=dict(name='exact', weight=1.0)),
    'rl__num_prompts': 8,
  }
  filtered = dict(overlong='keep', informative_only=True, max_rollouts=3)
  run(sorting(**choices, filter=filtered), tmp_path / 'three')
  run(sorting(**choices), tmp_path / 'one')

  def informative(name: str) -> list[int]:
    found = rows(tmp_path / name, 'samples')
    groups = np.array([row['reward'] for row in found]).reshape(3, 8, 4)
    return (groups.max(-1) > groups.min(-1)).sum(-1).tolist()

  more = informative('three')
  assert sum(more) > sum(informative('one'))
  # All that three rollouts had are kept, up to a full iteration.
  for number, row in zip(more, rows(tmp_path / 'three'), strict=True):
    assert number == 8 or number == round(row['groups/informative'] * 24)


def test_overlong_completions_are_not_trained(tmp_path: pathlib.Path) -> None:
  config = tiny.arithmetic()
  config.sft.num_steps = 0
  config.evaluation.every = 0
  config.filter.overlong = 'mask'
  trainer = Trainer(config, str(tmp_path))

  class Caught(Exception):
    """Carries a batch on its way to the update."""

  def catch(state: TrainState, batch: Batch, *rest: Any) -> None:
    raise Caught(jax.device_get(batch.arrays['trained'] & batch.mask))

  trainer._update = catch
  prepare = trainer._prepare
  truncated = []

  def note(*arguments: Any) -> Any:
    (samples,) = (a for a in arguments if isinstance(a, Samples))
    truncated.append(jax.device_get(samples.truncated))
    return prepare(*arguments)

  trainer._prepare = note
  with pytest.raises(Caught) as caught:
    trainer.run()
  assert 0 < truncated[0].sum() < 16
  np.testing.assert_array_equal(caught.value.args[0].any(-1), ~truncated[0])


def test_supervised_run_on_texts(tmp_path: pathlib.Path) -> None:
  config = tiny.text(tmp_path)
  config.rl.num_iterations = 0
  config.sft.num_steps = 3
  config.sft.optimizer.learning_rate = 0.03
  run(config, tmp_path / 'run')
  found = rows(tmp_path / 'run')
  assert [row['step'] for row in found] == [0, 1, 2]
  assert found[2]['loss'] < found[0]['loss']
  assert not (tmp_path / 'run' / 'samples.jsonl').exists()
  exported = tmp_path / 'run' / 'export'
  assert (exported / 'tokenizer.json').is_file()
  # The export is a start for a run of its own.
  config.model = dict(name='pretrained', directory=str(exported))
  config.environment.tokenizer = dict(directory=str(exported))
  run(config, tmp_path / 'next')
  assert rows(tmp_path / 'next')[0]['loss'] < found[2]['loss']


def test_rewards_of_the_host(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = tiny.text(tmp_path)
  run(config, tmp_path / 'run')
  (row,) = rows(tmp_path / 'run')
  assert row['reward'] == pytest.approx(
    0.1 * row['reward/length'] + row['reward/finished']
  )
  for sample in rows(tmp_path / 'run', 'samples'):
    assert sample['reward/length'] == sample['length']
    assert sample['reward/finished'] == (not sample['truncated'])
    assert sample['prompt'][1::2] in ('+=', '+')
  # Processes of their own change nothing, and end with the run.
  with config.environment.unlocked():
    config.environment.num_workers = 1
  ended = []
  monkeypatch.setattr(
    grading._Worker, 'end', lambda this, _: ended.append(this._process.wait())
  )
  run(config, tmp_path / 'apart')
  assert ended == [0]
  for name in ('metrics', 'samples'):
    assert rows(tmp_path / 'apart', name) == rows(tmp_path / 'run', name)


def test_mesh_of_two_gives_the_same_first_step(tmp_path: pathlib.Path) -> None:
  found = {}
  for devices in (1, 2):
    config = sorting(rl__num_iterations=1, **KL)
    config.entropy_coef = 0.01
    config.mesh.data = devices
    run(config, tmp_path / str(devices))
    (found[devices],) = rows(tmp_path / str(devices))
  assert found[1].keys() == found[2].keys()
  for key, value in found[1].items():
    assert found[2][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_device_loop_gives_the_same_curve(tmp_path: pathlib.Path) -> None:
  config = sorting(
    seed=3, rl__num_minibatches=2, rl__num_epochs=2, kl__loss_coef=0.05,
    reference__update='refresh', reference__every=2,
  )  # fmt: skip
  run(config, tmp_path)
  _, figures = device_loop.run(config, seeds=jnp.array([3, 4]))
  for key in ('reward', 'reward/exact', 'sampler/entropy', 'gradient_norm'):
    curve = [row[key] for row in rows(tmp_path)]
    np.testing.assert_allclose(figures[key][0], curve, rtol=1e-4, atol=1e-6)
  assert not np.allclose(figures['reward'][0], figures['reward'][1])


def test_parts_of_a_rollout_change_no_draw(tmp_path: pathlib.Path) -> None:
  for num_parts in (1, 2):
    config = sorting(sampling__num_parts=num_parts, rl__num_iterations=1)
    run(config, tmp_path / str(num_parts))
  whole, parts = (rows(tmp_path / name, 'samples') for name in '12')
  assert len(whole) == len(parts) == 16
  for left, right in zip(whole, parts, strict=True):
    for key, value in left.items():
      same = value if isinstance(value, str) else pytest.approx(value, abs=1e-5)
      assert right[key] == same


def test_machine_is_no_part_of_a_run(tmp_path: pathlib.Path) -> None:
  run(sorting(rl__num_iterations=1), tmp_path)
  again = run(
    sorting(rl__num_iterations=1, machine__memory_limit=10**9), tmp_path
  )
  assert int(again.step) == 1
