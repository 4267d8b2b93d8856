"""Does GRPO teach a pretrained storyteller to name an animal, and to end?

  python experiments/stories/run.py --directory=DIR --workdir=runs/stories

DIR is the Hugging Face directory of stories260K. Trains configs/stories.py with
each seed (started again, it continues), then samples every held-out opening
many times before and after. Prints stories, a table and the paired interval;
writes results.json and curves.png into the workdir.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl import logging
import jax
import numpy as np

from configs import stories
from postrain import hub, metrics, workdir
from postrain.evaluation import bootstrap_interval
from postrain.keys import run_key
from postrain.preparation import join_prompts
from postrain.sampling import sample
from postrain.scoring import score
from postrain.trainer import Trainer
from postrain.types import Params, Samples

FLUENT_QUANTILE = 0.05  # of the reference's own stories falls below
NGRAM = 4
NUM_SHOWN = 4
CURVES = ('reward/story', 'reference/kl_sequence', 'completion/length')
FIGURES = (
  'story', 'fluent_story', 'named', 'finished', 'length', 'kl_sequence',
  'kl_token', 'ref_logprob', 'repetition',
)  # fmt: skip


def evaluate(
  trainer: Trainer, params: Params, ref_params: Params, num_samples: int
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Figures [prompts, samples] on the held-out openings, and some stories."""
  recipe, environment = trainer.recipe, trainer.environment
  model = trainer.actor.model
  prompts = environment.held_out(recipe.evaluation.num_prompts)
  draw = functools.partial(
    sample, model, num_samples=num_samples,
    max_new_tokens=recipe.sampling.max_new_tokens,
    stop_ids=environment.stop_ids, pad_id=environment.pad_id,
    temperature=recipe.sampling.temperature,
  )  # fmt: skip
  # The same key before and after: the pairs share their random numbers.
  key = run_key(recipe.seed, 'evaluation')
  samples: Samples = jax.jit(draw)(params, prompts.tokens, prompts.mask, key)
  arrays = join_prompts(prompts.tokens, prompts.mask, samples)
  logprobs = jax.jit(
    functools.partial(
      score, model, num_slices=len(samples.tokens) // 8, chunk_size=128
    )
  )
  own = np.asarray(logprobs(params, *arrays).logprobs)
  ref = np.asarray(logprobs(ref_params, *arrays).logprobs)
  samples = jax.device_get(samples)
  length = samples.mask.sum(-1)
  kl = (own - ref).sum(-1)
  figures = {
    **environment.rewards(prompts, samples),
    'length': length,
    'kl_sequence': kl,
    'kl_token': kl / length,
    'ref_logprob': ref.sum(-1) / length,
    'repetition': np.array([
      repetition(row[mask].tolist())
      for row, mask in zip(samples.tokens, samples.mask, strict=True)
    ]),
  }  # fmt: skip
  shape = (len(prompts.tokens), num_samples)
  texts = [
    environment.text(prompts.tokens[p][prompts.mask[p]])
    + ' |'
    + environment.text(samples.tokens[b][samples.mask[b]])
    for p, b in enumerate(range(0, NUM_SHOWN * num_samples, num_samples))
  ]
  return {k: np.reshape(v, shape) for k, v in figures.items()}, texts


def repetition(tokens: list[int]) -> float:
  """Share of n-grams of tokens that stood earlier in the story."""
  grams = [tuple(tokens[i:][:NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
  return (len(grams) - len(set(grams))) / max(len(grams), 1)


def run_seed(
  seed: int, directory: str, path: pathlib.Path, num_samples: int
) -> dict[str, Any]:
  """Train one seed, or find it finished, and measure before and after."""
  config = stories.get_config()
  config.seed = seed
  config.model.directory = directory
  config.environment.tokenizer.directory = directory
  trainer = Trainer(config, str(path))
  state = trainer.run()
  base = hub.load(directory).params
  before, first = evaluate(trainer, base, base, num_samples)
  after, last = evaluate(trainer, state.params['actor'], base, num_samples)
  return {
    'before': before,
    'after': after,
    'stories': list(zip(first, last, strict=True)),
  }


def grade_fluency(runs: list[dict[str, Any]]) -> float:
  """Add ``fluent_story``: no less likely than the reference's own stories."""
  own = np.stack([run['before']['ref_logprob'] for run in runs])
  threshold = float(np.quantile(own, FLUENT_QUANTILE))
  for run in runs:
    for moment in ('before', 'after'):
      figures = run[moment]
      fluent = figures['ref_logprob'] >= threshold
      figures['fluent_story'] = figures['story'] * fluent
  return threshold


def summarise(runs: list[dict[str, Any]], num_samples: int) -> dict[str, Any]:
  """Means by seed and the paired interval, ready to be written."""
  threshold = grade_fluency(runs)
  rows = {
    name: {
      moment: [float(run[moment][name].mean()) for run in runs]
      for moment in ('before', 'after')
    }
    for name in FIGURES
  }
  gains = {
    name: bootstrap_interval(
      np.concatenate([
        (run['after'][name] - run['before'][name]).mean(-1) for run in runs
      ])
    )
    for name in ('story', 'fluent_story')
  }  # fmt: skip
  return {
    'seeds': list(range(len(runs))),
    'commit': workdir.commit(),
    'versions': {p: importlib.metadata.version(p) for p in workdir.PACKAGES},
    'num_prompts': len(runs[0]['before']['story']),
    'num_samples': num_samples,
    'fluent_from': threshold,
    'figures': rows,
    'paired_gain_95': gains,
    'stories': runs[0]['stories'],
  }


def table(results: dict[str, Any]) -> str:
  """Before and after by seed, in markdown."""
  lines = ['| figure | before | after |', '| --- | --- | --- |']
  for name, by_moment in results['figures'].items():
    cells = [
      f'{np.mean(x):.3f} ({", ".join(f"{v:.3f}" for v in x)})'
      for x in (by_moment['before'], by_moment['after'])
    ]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  for name, (mean, low, high) in results['paired_gain_95'].items():
    lines.append(f'| gain of {name} | | {mean:.3f} [{low:.3f}, {high:.3f}] |')
  return '\n'.join(lines)


def draw_curves(path: pathlib.Path, num_seeds: int) -> None:
  """One panel per figure, one line per seed; needs matplotlib."""
  from matplotlib.figure import Figure

  figure = Figure((5.6, 1.7 * len(CURVES)), layout='constrained')
  panels = figure.subplots(len(CURVES), sharex=True)
  for name, panel in zip(CURVES, panels, strict=True):
    for seed in range(num_seeds):
      rows = metrics.read(path / f'seed{seed}' / 'metrics.jsonl')
      points = [(row['step'], row[name]) for row in rows if name in row]
      panel.plot(*zip(*points, strict=True), linewidth=1, label=f'seed {seed}')
    panel.set_title(name, fontsize='medium')
    panel.grid(alpha=0.3)
  panels[0].legend()
  panels[-1].set_xlabel('step')
  figure.savefig(path / 'curves.png', dpi=80)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--directory', required=True)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--samples', type=int, default=32)
  flags = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  runs = [
    run_seed(
      seed, flags.directory, flags.workdir / f'seed{seed}', flags.samples
    )
    for seed in range(flags.seeds)
  ]
  results = summarise(runs, flags.samples)
  (flags.workdir / 'results.json').write_text(json.dumps(results, indent=2))
  for before, after in results['stories']:
    print(f'\nBEFORE  {before}\nAFTER   {after}')
  print(f'\n{table(results)}')
  draw_curves(flags.workdir, flags.seeds)


if __name__ == '__main__':
  main()
