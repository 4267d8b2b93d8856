"""Does a pretrained storyteller learn what a judge of texts prefers?

  python experiments/stories_preferences/run.py --directory=DIR \\
    --workdir=runs/talk

DIR is the Hugging Face directory of stories260K. The model tells stories, a
judge prefers those in which people talk, and its pairs teach the model twice:
by DPO, and by PPO against a reward model that learnt from them. Prints stories
and a table, writes results.json and curves.png; a run that stands in the
workdir is not run again.
"""

import argparse
import functools
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl import logging
import jax
import numpy as np

from configs import base, stories
from experiments.stories_preferences import texts
from postrain import hub, metrics, workdir
from postrain.compilation import use_cache
from postrain.evaluation import bootstrap_interval
from postrain.keys import run_key
from postrain.preparation import join_prompts
from postrain.sampling import sample
from postrain.scoring import score
from postrain.trainer import Trainer
from postrain.types import Params, Prompts, Samples

HERE = 'experiments.stories_preferences.texts'
LENGTH = 80  # tokens of a story
NEWLINE = 13  # its id: a story is a paragraph
NUM_STORIES = 32  # of an opening, to be judged
PAIRS = 16  # of a step
FIGURES = ('judged', 'kl_sequence', 'kl_token', 'length', 'ref_logprob',
           'repetition')  # fmt: skip
CURVES = (
  ('reward_model', 'loss'), ('dpo', 'loss'),
  ('ppo', 'reward/judged'), ('ppo', 'reference/kl_sequence'),
)  # fmt: skip


def config_of(directory: str, pairs: str | None = None) -> Any:
  """What all runs share: the openings of configs/stories.py, short stories."""
  config = stories.get_config()
  text = config.environment.to_dict()
  del text['name']
  text |= dict(tokenizer=dict(directory=directory), max_length=LENGTH + 32,
               stop_ids=(1, 2, NEWLINE))  # fmt: skip
  config.environment = dict(name=f'{HERE}:sampled', pairs=pairs, text=text)
  config.model.directory = directory
  config.rewards = dict(judged=dict(name=f'{HERE}:talking', weight=1.0))
  config.sampling.max_new_tokens = LENGTH
  config.rl.num_iterations = 0
  config.evaluation.update(every=0, grader='judged', num_samples=0)
  config.checkpoint.every = 1000
  return config


def offline(directory: str, pairs: str, num_steps: int, rate: float) -> Any:
  """A stage on pairs, by DPO."""
  config = config_of(directory, pairs)
  config.preference.num_steps = num_steps
  config.preference.batch_size = PAIRS
  config.preference.num_micro_batches = 2
  config.preference.optimizer = base.adamw(
    learning_rate=rate, schedule='linear', total_steps=num_steps
  )
  return config


def scoring(directory: str, pairs: str, num_steps: int) -> Any:
  """A reward model of the pairs, from the same weights."""
  config = offline(directory, pairs, num_steps, 1e-3)
  config.model.update(head='sequence_labels', num_labels=1)
  config.preference.learns = 'reward_model'
  config.preference.loss = dict(name='bradley_terry')
  config.evaluation.update(every=num_steps, num_prompts=64, batch_size=64)
  return config


def online(directory: str, judge: str, num_iterations: int) -> Any:
  """PPO with a critic against a reward model; the judge only looks on."""
  config = config_of(directory)
  config.rewards = dict(
    judge=dict(name='reward_model', directory=judge, weight=1.0),
    judged=dict(name=f'{HERE}:talking', weight=0.0),
  )
  config.advantage = dict(name='gae', discount=1.0, lambda_=0.95)
  config.whitening = dict(name='whiten')
  config.critic.network = dict(name='copied')
  config.critic.optimizer = base.adamw(learning_rate=1e-3)
  config.kl.update(estimator=dict(name='k1'), loss_coef=None, reward_coef=0.02)
  config.sampling.num_samples = 1
  config.rl.update(
    num_iterations=num_iterations, num_prompts=32, num_epochs=2,
    num_minibatches=2, num_micro_batches=2, num_score_slices=4,
    share_prompts=False,
  )  # fmt: skip
  config.rl.optimizer = base.adamw(learning_rate=5e-4)
  return config


@functools.cache
def drawn(trainer: Trainer, num_samples: int) -> Any:
  """The compiled sampler of a number of stories of each opening."""
  environment = trainer.environment
  return jax.jit(
    functools.partial(
      sample, trainer.actor.model, num_samples=num_samples,
      max_new_tokens=LENGTH, stop_ids=environment.stop_ids,
      pad_id=environment.pad_id,
    )
  )  # fmt: skip


def tell(
  trainer: Trainer, params: Params, prompts: Prompts, purpose: str, number: int
) -> tuple[Samples, tuple, np.ndarray]:
  """Stories, with their openings as rows, and what the judge says [P, G]."""
  draw = drawn(trainer, number)
  samples = draw(params, prompts.tokens, prompts.mask, run_key(0, purpose))
  arrays = join_prompts(prompts.tokens, prompts.mask, samples)
  samples = jax.device_get(samples)
  judged = trainer.environment.rewards(prompts, samples)['judged']
  return samples, arrays, judged.reshape(-1, number)


def judged_pairs(trainer: Trainer, params: Params) -> dict[str, tuple]:
  """Stories of the training openings and of others, in pairs of the judge."""
  environment, found = trainer.environment, {}
  for part, prompts in (
    ('train', environment.prompts(0, 64)),
    ('held_out', environment.held_out(16)),
  ):
    _, arrays, judged = tell(trainer, params, prompts, 'sample', NUM_STORIES)
    found[part] = texts.pairs_of(arrays, judged)
  return found


def evaluate(
  trainer: Trainer, params: Params, ref_params: Params, num_samples: int
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Figures [prompts, samples] on the held-out openings, and some stories."""
  environment = trainer.environment
  prompts = environment.held_out(16)
  # The same key for all policies: they share their random numbers.
  samples, arrays, judged = tell(
    trainer, params, prompts, 'evaluation', num_samples
  )
  own, ref = (
    np.asarray(scored(trainer)(p, *arrays).logprobs)
    for p in (params, ref_params)
  )
  length, kl = samples.mask.sum(-1), (own - ref).sum(-1)
  rows = [
    row[mask].tolist()
    for row, mask in zip(samples.tokens, samples.mask, strict=True)
  ]
  figures = {
    'judged': judged,
    'length': length,
    'kl_sequence': kl,
    'kl_token': kl / length,
    'ref_logprob': ref.sum(-1) / length,
    'repetition': np.array([repetition(row) for row in rows]),
  }
  told = [
    f'{environment.text(prompts.tokens[p][prompts.mask[p]])} |'
    f'{environment.text(rows[p * num_samples])}'
    for p in range(len(prompts.tokens))
  ]
  return {k: np.reshape(v, judged.shape) for k, v in figures.items()}, told


@functools.cache
def scored(trainer: Trainer) -> Any:
  """The compiled log-probs of stories."""
  return jax.jit(
    functools.partial(score, trainer.actor.model, num_slices=8, chunk_size=128)
  )


def repetition(tokens: list[int]) -> float:
  """Share of 4-grams of tokens that stood earlier in the story."""
  grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
  return (len(grams) - len(set(grams))) / max(len(grams), 1)


def learn(directory: str, path: pathlib.Path, flags: Any) -> dict[str, Any]:
  """The parameters of the three policies, and how many pairs taught them."""
  config = config_of(directory)
  config.rl.num_iterations = 1  # never run: for its environment and sampler
  trainer = Trainer(config, str(path / 'start'))
  reference = hub.load(directory).params
  pairs = path / 'pairs.npz'
  if not pairs.exists():
    texts.write(str(pairs), **judged_pairs(trainer, reference))
  runs = {
    'dpo': offline(directory, str(pairs), flags.dpo_steps, 2e-4),
    'reward_model': scoring(directory, str(pairs), flags.score_steps),
    'ppo': online(
      directory, str(path / 'reward_model' / 'export'), flags.iterations
    ),
  }
  states = {
    name: Trainer(config, str(path / name)).run()
    for name, config in runs.items()
  }
  policies = {'reference': reference}
  policies |= {n: states[n].params['actor'] for n in ('dpo', 'ppo')}
  with np.load(pairs) as arrays:
    sizes = {
      part: len(arrays[f'{part}_tokens']) // 2 for part in ('train', 'held_out')
    }
  return {'trainer': trainer, 'policies': policies, 'pairs': sizes}


def compare(learnt: dict[str, Any], num_samples: int) -> dict[str, Any]:
  """Figures of each policy on held-out openings, and who wins."""
  trainer, policies = learnt['trainer'], learnt['policies']
  found, told = {}, {}
  for name, params in policies.items():
    found[name], told[name] = evaluate(
      trainer, params, policies['reference'], num_samples
    )
  results: dict[str, Any] = {}
  before = found['reference']['judged']
  for name, figures in found.items():
    results[name] = {k: float(figures[k].mean()) for k in FIGURES}
    # The judge reads one story at a time: no order of presentation to swap.
    wins = (1 + np.sign(figures['judged'] - before)) / 2
    results[name]['win_rate'] = bootstrap_interval(wins.mean(-1))
    results[name]['decided'] = float((figures['judged'] != before).mean())
  return {'figures': results, 'stories': told}


def table(figures: dict[str, Any]) -> str:
  names = list(figures)
  lines = [f'| | {" | ".join(names)} |', '|' + ' --- |' * (1 + len(names))]
  for row in ('win_rate', 'decided', *FIGURES):
    cells = [
      '{:.3f} [{:.3f}, {:.3f}]'.format(*value)
      if isinstance(value := figures[name][row], tuple)
      else f'{value:.3f}'
      for name in names
    ]
    lines.append(f'| {row} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def draw_curves(path: pathlib.Path) -> None:
  """One panel for each curve; needs matplotlib."""
  from matplotlib.figure import Figure

  figure = Figure((8.4, 4.2), layout='constrained')
  panels = figure.subplots(2, 2).reshape(-1)
  for (run, name), panel in zip(CURVES, panels, strict=True):
    rows = metrics.read(path / run / 'metrics.jsonl')
    points = [(row['step'], row[name]) for row in rows if name in row]
    panel.plot(*zip(*points, strict=True), linewidth=1)
    panel.set_title(f'{run}: {name}', fontsize='medium')
    panel.grid(alpha=0.3)
  figure.savefig(path / 'curves.png', dpi=80)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--directory', required=True)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--dpo_steps', type=int, default=40)
  parser.add_argument('--score_steps', type=int, default=40)
  parser.add_argument('--iterations', type=int, default=16)
  parser.add_argument('--samples', type=int, default=16)
  flags = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  use_cache()
  learnt = learn(flags.directory, flags.workdir, flags)
  results = compare(learnt, flags.samples)
  rows = list(metrics.read(flags.workdir / 'reward_model' / 'metrics.jsonl'))
  results |= {
    'commit': workdir.commit(),
    'pairs': learnt['pairs'],
    'reward_model_accuracy': rows[-1]['eval/pair_accuracy'],
  }
  (flags.workdir / 'results.json').write_text(json.dumps(results, indent=2))
  for name, told in results['stories'].items():
    print(f'\n{name.upper()}\n' + '\n'.join(told[::5]))
  print(f'\n{table(results["figures"])}')
  print(f'pairs {results["pairs"]}, held-out accuracy of the reward model'
        f' {results["reward_model_accuracy"]:.3f}')  # fmt: skip
  draw_curves(flags.workdir)


if __name__ == '__main__':
  main()
