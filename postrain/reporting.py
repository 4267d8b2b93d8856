"""What a run tells people: figures, samples, screen, trackers."""

from collections.abc import Callable, Mapping
import contextlib
import os
from typing import Any

import numpy as np

from postrain import hosts, metrics
from postrain.types import Prompts, Samples
from postrain.workdir import FILES, die_at

HEADLINE = (
  'loss',
  'eval/greedy',
  'reward',
  'reward_std',
  'reward/exploited',
  'reference/kl_sequence',
  'sampler/entropy',
  'policy/clip_high',
  'value/explained_variance',
  'completion/length',
  'completion/truncated',
)
CURVES = (
  'eval/greedy',
  'reward',
  'completion/length',
  'sampler/entropy',
  'reference/kl_sequence',
  'value/explained_variance',
  'loss',
)


class Report(contextlib.ExitStack):
  """The files and the screen of a run, cut back to ``first_step`` and open.

  The first process alone has them; the others only keep time.

  Args:
    directory: the workdir.
    first_step: of this process; rows of later steps belong to a process that
      was killed before its next checkpoint, and are written again.
    num_steps: length of the run.
    logging: the block of the recipe.
    config: shown by trackers.
  """

  def __init__(
    self,
    directory: str,
    *,
    first_step: int,
    num_steps: int,
    logging: Any,
    config: Mapping[str, Any],
  ):
    super().__init__()
    self.timer = metrics.StepTimer()
    self._deferred: tuple[int, Callable[[], tuple]] | None = None
    self._writes = hosts.first()
    if not self._writes:
      return
    for name in FILES:
      metrics.truncate(os.path.join(directory, name), first_step)
    self._metrics, self._timings, self._samples = (
      metrics.JsonLines(os.path.join(directory, name)) for name in FILES
    )
    self._console = metrics.Console(
      num_steps, headline=HEADLINE, table_every=logging.table_every
    )
    self.callback(self._console.close)
    self._trackers = _trackers(directory, first_step, logging, config)
    for tracker in self._trackers:
      self.callback(tracker.close)

  def defer(self, step: int, tell: Callable[[], tuple]) -> None:
    """Write a step later: what it says is still being worked out.

    Args:
      step: number of the step.
      tell: gives what `write` takes beside it, and waits for it.
    """
    self.flush()
    self._deferred = step, tell

  def flush(self) -> None:
    """Write the step that was deferred.

    Before whatever depends on its being written: a checkpoint must not know
    more than the files say.
    """
    if self._deferred is not None:
      (step, tell), self._deferred = self._deferred, None
      self.write(step, *tell())

  def write(
    self,
    step: int,
    figures: Mapping[str, float],
    num_tokens: int | None = None,
    samples: list[dict[str, Any]] | None = None,
  ) -> None:
    """Write all that a step has to say."""
    timings = self.timer.finish(num_tokens)
    if not self._writes:
      return
    if samples:
      self._samples.append(*({'step': step, **row} for row in samples))
    die_at('between_files', step)
    self._metrics.write(step, figures)
    self._timings.write(step, timings)
    self._console.write(step, {**figures, **timings})
    if samples:
      self._console.table(step, samples)
    for tracker in self._trackers:
      tracker.write(step, {**figures, **timings})


def _trackers(
  directory: str, first_step: int, logging: Any, config: Mapping[str, Any]
) -> list[metrics.Writer]:
  trackers: list[metrics.Writer] = []
  if logging.tensorboard:
    path = os.path.join(directory, 'tensorboard')
    trackers += [metrics.TensorBoard(path, first_step=first_step)]
  if logging.wandb_project is not None:
    trackers += [
      metrics.WeightsAndBiases(
        directory,
        project=logging.wandb_project,
        name=os.path.basename(os.path.abspath(directory)),
        config=config,
      )
    ]
  return trackers


def group_figures(
  samples: Samples, informative: np.ndarray, num_prompts: int, iteration: int
) -> dict[str, float]:
  """Which groups differ within; and, of versions, how many train and how late.

  Groups without a token are still under way.
  """
  finished = samples.mask.reshape(num_prompts, -1).any(-1)
  unfinished = int((~finished).sum())
  share = informative.sum() / (len(informative) - unfinished)
  figures = {'groups/informative': float(share)}
  if samples.version is None:
    return figures
  staleness = (iteration - samples.version)[samples.mask]
  return figures | {
    'groups/finished': float(finished.sum()),
    'groups/unfinished': float(unfinished),
    'rollout/staleness': float(staleness.mean()),
    'rollout/staleness_max': float(staleness.max()),
  }


def rollout_figures(
  samples: Samples, rewards: Mapping[str, np.ndarray], total: np.ndarray,
  choices: Any = None,
) -> dict[str, float]:  # fmt: skip
  """Rewards and lengths of a rollout; ``reward`` is the weighted sum.

  Rows without a token are of groups still under way. ``reward/exploited`` is
  the share of the others that training pays as if they were right, and the
  grader calls wrong; ``choices`` are those of `postrain.schema.Evaluation`.
  """
  rows = samples.mask.any(-1)
  lengths = samples.mask[rows].sum(-1)
  each = {f'reward/{k}': float(np.mean(v[rows])) for k, v in rewards.items()}
  return {
    'reward': float(np.mean(total[rows])),
    'reward_std': float(np.std(total[rows])),
    **each,
    **_exploited(
      {k: v[rows] for k, v in rewards.items()}, total[rows], choices
    ),
    'completion/length': float(lengths.mean()),
    'completion/length_max': float(lengths.max()),
    'completion/truncated': float(np.mean(samples.truncated[rows])),
    **_variety(samples),
  }


def _exploited(
  rewards: Mapping[str, np.ndarray], total: np.ndarray, choices: Any
) -> dict[str, float]:
  if choices is None or choices.exploit_threshold is None:
    return {}
  paid = total >= choices.exploit_threshold
  wrong = rewards[choices.grader] < choices.threshold
  return {'reward/exploited': float(np.mean(paid & wrong))}


def _variety(samples: Samples) -> dict[str, float]:
  """Pairs of neighbouring tokens: what completions say again.

  Of all pairs the share that its completion had before, and the number of
  distinct ones by the number of all.
  """
  there = samples.mask[:, 1:] & samples.mask[:, :-1]
  if not there.any():
    return {}
  pairs = np.stack([samples.tokens[:, :-1], samples.tokens[:, 1:]], -1)[there]
  own = np.column_stack([np.nonzero(there)[0], pairs])
  of_rows, of_all = (len(np.unique(x, axis=0)) for x in (own, pairs))
  return {
    'completion/repetition': 1 - of_rows / len(pairs),
    'completion/distinct_2': of_all / len(pairs),
  }


def sample_rows(
  prompts: Prompts,
  samples: Samples,
  rewards: Mapping[str, np.ndarray],
  total: np.ndarray,
  columns: Mapping[str, np.ndarray],
  text: Any,
) -> list[dict[str, Any]]:
  """One row per completion that trains, with every figure that belongs to it.

  Rows without a token are of groups still under way.
  """
  num_samples = len(samples.tokens) // len(prompts.tokens)
  shown = [
    text(tokens[mask])
    for tokens, mask in zip(prompts.tokens, prompts.mask, strict=True)
  ]
  return [
    {
      'prompt': shown[b // num_samples],
      'completion': text(samples.tokens[b][samples.mask[b]]),
      'reward': float(total[b]),
      **{f'reward/{k}': float(v[b]) for k, v in rewards.items()},
      **{k: float(v[b]) for k, v in columns.items()},
      'length': int(samples.mask[b].sum()),
      'truncated': bool(samples.truncated[b]),
    }
    for b in np.flatnonzero(samples.mask.any(-1))
  ]
