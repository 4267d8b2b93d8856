"""Rankings as one element each, or as pairs that are shuffled.

All pairs of a ranking in one update, where each response is read once; the same
pairs cut loose, so many in an update that there are as many updates, or that an
update reads as many responses; and the likelihood of the whole ranking.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.preferences.common import LENGTH, SCALE, spread
from postrain import losses, tasks
from postrain.batches import weigh_units
from postrain.keys import run_key
from postrain.models.heads import with_labels
from postrain.models.transformer import Config, transformer
from postrain.reward_models import completion_objective, completion_scores
from postrain.tasks.labels import candidates, rankings
from postrain.train_step import make_train_step
from postrain.types import Batch, TrainState

TASK = tasks.preference(completion_length=LENGTH)
RESPONSES = 6  # of a prompt
PAIRS = RESPONSES * (RESPONSES - 1) // 2
NUM_PROMPTS = NUM_HELD_OUT = 256
NUM_RANKINGS = 8  # of an update
NUM_EPOCHS, LEARNING_RATE = 12, 3e-3
CONFIG = Config(
  vocab_size=TASK.vocab_size, num_layers=2, model_dim=32, mlp_dim=64,
  num_heads=2, num_kv_heads=2, head_dim=16, max_length=8,
)  # fmt: skip


class Arm(NamedTuple):
  """The loss of a unit, its rows, and the units of an update."""

  loss: Any
  unit_size: int
  num_units: int

  @property
  def reads(self) -> int:
    """Responses that an epoch reads."""
    return NUM_PROMPTS * (RESPONSES if self.unit_size > 2 else 2 * PAIRS)

  @property
  def updates(self) -> int:
    """Those of an epoch."""
    return self.reads // self.unit_size // self.num_units


ARMS = {
  'rankings': Arm(losses.ranked_pairs, RESPONSES, NUM_RANKINGS),
  'pairs, as many updates': Arm(losses.bradley_terry, 2, NUM_RANKINGS * PAIRS),
  'pairs, as many responses': Arm(
    losses.bradley_terry, 2, NUM_RANKINGS * RESPONSES // 2
  ),
  'Plackett and Luce': Arm(losses.plackett_luce, RESPONSES, NUM_RANKINGS),
}


def ranked(seed: Any, num_prompts: int, held_out: bool) -> Batch:
  """Units of responses with the ranks of one rater."""
  purpose = 'held_out_preferences' if held_out else 'preferences'
  of_texts, of_ranks = jax.random.split(run_key(seed, purpose))
  drawn = candidates(
    TASK, of_texts, num_prompts=num_prompts, num_samples=RESPONSES,
    held_out=held_out,
  )  # fmt: skip
  return rankings(TASK, drawn, of_ranks, scale=SCALE)


def unit_rows(arm: Arm, ranks: Any) -> Any:
  """Rows of each unit, the better first in a pair."""
  rows = jnp.arange(ranks.size).reshape(-1, RESPONSES)
  if arm.unit_size == RESPONSES:
    return rows
  order = jnp.argsort(ranks.reshape(-1, RESPONSES), axis=1)
  rows = jnp.take_along_axis(rows, order, axis=1)
  return rows[:, np.stack(np.triu_indices(RESPONSES, 1), 1)].reshape(-1, 2)


def figures(model: Any, params: Any, batch: Batch) -> dict[str, Any]:
  """Loss and accuracy of all pairs of rankings."""
  scores = completion_scores(model, params, batch.tokens, batch.valid)
  values, told = losses.ranked_pairs(
    scores.reshape(-1, RESPONSES), batch.arrays['ranks'].reshape(-1, RESPONSES)
  )
  return {'loss': values.mean(), 'accuracy': told['accuracy'].mean()}


@functools.partial(jax.jit, static_argnums=0)
def curves(name: str, seed: Any) -> dict[str, Any]:
  """Figures of both sets before training and behind each epoch."""
  arm = ARMS[name]
  seen = ranked(seed, NUM_PROMPTS, False)
  sets = {'seen': seen, 'held out': ranked(seed, NUM_HELD_OUT, True)}
  units = unit_rows(arm, seen.arrays['ranks'])
  config, params = with_labels(
    CONFIG, transformer(CONFIG).init(run_key(seed, 'init'))
  )
  model = transformer(config)
  optimizer = optax.adam(LEARNING_RATE)
  train_step = make_train_step(
    completion_objective(model, loss=arm.loss), optimizer
  )

  def update(state: TrainState, rows: Any) -> tuple[TrainState, None]:
    rows = rows.reshape(-1)
    batch = Batch(
      seen.tokens[rows], seen.valid[rows], seen.mask[rows], {},
      {'ranks': seen.arrays['ranks'][rows]}, unit_size=arm.unit_size,
    )  # fmt: skip
    return train_step(state, {}, weigh_units(batch))[0], None

  def measured(state: TrainState) -> dict[str, Any]:
    learnt = state.params['reward_model']
    return {k: figures(model, learnt, batch) for k, batch in sets.items()}

  def epoch(state: TrainState, number: Any) -> tuple[TrainState, dict]:
    key = run_key(seed, 'minibatches', number)
    rows = jax.random.permutation(key, units).reshape(
      arm.updates, arm.num_units, arm.unit_size
    )
    state = jax.lax.scan(update, state, rows)[0]
    return state, measured(state)

  params = {'reward_model': params}
  start = TrainState(jnp.int32(0), params, optimizer.init(params))
  behind = jax.lax.scan(epoch, start, jnp.arange(NUM_EPOCHS))[1]
  return jax.tree.map(jnp.append, measured(start), behind)


def study(path: pathlib.Path, seeds: range) -> dict[str, Any]:
  path.mkdir(parents=True, exist_ok=True)
  found: dict[str, Any] = {}
  for name in ARMS:
    runs = [jax.device_get(curves(name, seed)) for seed in seeds]
    found[name] = jax.tree.map(lambda x: x.round(5).tolist(), runs)
    lasts = [f'{run["held out"]["loss"][-1]:.3f}' for run in found[name]]
    print(name, *lasts, flush=True)
  return found


def table(found: dict[str, Any]) -> str:
  lines = [
    '| | responses read, updates of an epoch | held-out loss of epoch 1 |'
    ' least, in epoch | last | last, of what is seen | accuracy, last |',
    '|' + ' --- |' * 7,
  ]
  for name, runs in found.items():
    loss = np.array([run['held out']['loss'] for run in runs])
    seen = [run['seen']['loss'][-1] for run in runs]
    right = [run['held out']['accuracy'][-1] for run in runs]
    epochs = ', '.join(map(str, loss.argmin(1)))
    cells = [
      f'{ARMS[name].reads:,}, {ARMS[name].updates}', spread(loss[:, 1]),
      f'{spread(loss.min(1))}, {epochs}', spread(loss[:, -1]), spread(seen),
      spread(right),
    ]  # fmt: skip
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((8.4, 3.2), layout='constrained')
  for number, name in enumerate(('held out', 'seen')):
    axes = figure.add_subplot(1, 2, number + 1)
    axes.set(title=f'loss of pairs, {name}', xlabel='epoch')
    axes.grid(alpha=0.3)
    for color, (label, runs) in enumerate(found.items()):
      for i, run in enumerate(runs):
        line = run[name]['loss']
        axes.plot(line, f'C{color}', lw=0.9, label=None if i else label)
    axes.legend(fontsize='x-small')
  figure.savefig(path, dpi=80)
