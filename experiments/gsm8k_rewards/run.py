"""Does a small reward model tell right solutions of GSM8K from wrong ones?

  python experiments/gsm8k_rewards/run.py --data=DIR --workdir=runs/rewards

DIR holds train.jsonl and example_model_solutions.jsonl of GSM8K. The questions
that have right and wrong solutions are divided; a reward model from scratch
learns from the pairs of three fifths of them and is asked about those of the
others. Prints a table and writes results.json; a run that stands in the workdir
is not run again.
"""

import argparse
import functools
import json
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from postrain import data, hub, tokenizers, workdir
from postrain.compilation import use_cache
from postrain.data import Preference
from postrain.evaluation import bootstrap_interval
from postrain.reward_models import completion_scores
from postrain.trainer import Trainer

FILE = 'example_model_solutions.jsonl'
LIMIT = 256  # tokens of a question with a solution
LEARNT = 0.6  # of the questions; the others are held out
SIMILAR = 0.05  # of the length of a solution, to be called as long as another
BATCH = 64


def config_of(source: str, pairs: str, num_steps: int, seed: int) -> Any:
  """A reward model of two layers, by Bradley and Terry."""
  config = base.get_config()
  config.seed = seed
  config.environment = dict(
    name='text', train=f'{source}/train.jsonl', held_out=('none',),
    tokenizer=dict(name='train_bpe', vocab_size=1024), prompt='question',
    completion='answer', too_long='drop',
    preferences=dict(train=pairs, held_out=None, ties='error'),
    max_prompt_length=LIMIT, max_length=LIMIT,
  )  # fmt: skip
  config.model = dict(
    name='transformer', num_layers=2, model_dim=64, mlp_dim=128, num_heads=4,
    num_kv_heads=4, head_dim=16, max_length=LIMIT, head='sequence_labels',
    num_labels=1,
  )  # fmt: skip
  config.rewards = dict(length=dict(name='num_tokens', weight=1.0))
  config.preference.num_steps = num_steps
  config.preference.batch_size = 16
  config.preference.learns = 'reward_model'
  config.preference.loss = dict(name='bradley_terry')
  config.preference.optimizer = base.adamw(
    learning_rate=1e-3, schedule='linear', total_steps=num_steps,
    weight_decay=0.1,
  )  # fmt: skip
  config.evaluation.grader = 'length'
  config.checkpoint.every = num_steps
  return config


def divided(pairs: list[Preference], seed: int) -> list[list[Preference]]:
  """The pairs to learn and those held out; they share no question."""
  questions = sorted({str(pair.prompt) for pair in pairs})
  order = np.random.default_rng(seed).permutation(len(questions))
  first = {questions[i] for i in order[: int(LEARNT * len(questions))]}
  return [[p for p in pairs if (p.prompt in first) == side] for side in (1, 0)]


def train(
  pairs: list[Preference], source: str, path: pathlib.Path, num_steps: int
) -> str:
  """The directory of a reward model that knows these pairs alone."""
  path.mkdir(parents=True, exist_ok=True)
  rows = path / 'pairs.jsonl'
  rows.write_text(
    ''.join(
      json.dumps(dict(prompt=p.prompt, chosen=p.completions[0],
                      rejected=p.completions[1])) + '\n'
      for p in pairs
    )
  )  # fmt: skip
  config = config_of(source, str(rows), num_steps, seed=0)
  Trainer(config, str(path / 'run')).run()
  return str(path / 'run' / 'export')


def margins(directory: str, pairs: list[Preference]) -> np.ndarray:
  """By how much the model scores the right solution above the wrong one."""
  loaded = hub.load(directory, head='sequence_labels')
  tokens, valid = encoded(tokenizers.load(directory), pairs)[:2]
  score = jax.jit(functools.partial(completion_scores, loaded.model))
  more = -len(tokens) % BATCH
  tokens, valid = (np.pad(x, ((0, more), (0, 0))) for x in (tokens, valid))
  scores = np.concatenate([
    score(loaded.params, jnp.asarray(tokens[i:][:BATCH]), valid[i:][:BATCH])
    for i in range(0, len(tokens), BATCH)
  ])  # fmt: skip
  scores = scores[: 2 * len(pairs)]
  return scores[::2] - scores[1::2]


def encoded(tokenizer: Any, pairs: list[Preference]) -> data.Pairs:
  return data.encode_pairs(tokenizer, pairs, max_length=LIMIT)


def cues(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Shallow rules, (question, solution) -> a number, larger is better."""
  written, right = {}, {}
  for row in rows:
    for name, value in row.items():
      if isinstance(value, dict):
        written.setdefault((row['question'], value['solution']), name)
        right.setdefault(name, []).append(value['is_correct'])

  def numbers(text: str) -> set[str]:
    return set(re.findall(r'\d+', text.replace(',', '')))

  return {
    'shorter is right': lambda q, s: -len(s),
    'fewer numbers that the question lacks': lambda q, s: (
      -len(numbers(s) - numbers(q))
    ),
    'more numbers of the question': lambda q, s: len(numbers(s) & numbers(q)),
    'the answer is whole': lambda q, s: -float('.' in s.split('A:')[-1]),
    'written by the better model': lambda q, s: np.mean(right[written[q, s]]),
  }


def by_question(
  pairs: list[Preference], values: np.ndarray
) -> tuple[float, float, float]:
  """The mean over questions of their pairs' mean, and its interval."""
  groups: dict[Any, list[float]] = {}
  for pair, value in zip(pairs, values, strict=True):
    groups.setdefault(pair.prompt, []).append(float(value))
  return bootstrap_interval(np.array([np.mean(v) for v in groups.values()]))


def won(margin: np.ndarray) -> np.ndarray:
  """1 where the right one is above, ½ where they are equal."""
  return (1 + np.sign(margin)) / 2


def summarise(
  rows: list[dict[str, Any]], pairs: list[Preference], margin: np.ndarray
) -> dict[str, Any]:
  """Accuracy of the model and of each cue, and how often they say the same."""
  lengths = np.array([[len(s) for s in p.completions] for p in pairs])
  alike = np.abs(lengths[:, 0] - lengths[:, 1]) <= SIMILAR * lengths.max(1)
  found: dict[str, Any] = {'the reward model': {'margin': margin}}
  for name, cue in cues(rows).items():
    found[name] = {'margin': np.array([
      cue(p.prompt, p.completions[0]) - cue(p.prompt, p.completions[1])
      for p in pairs
    ])}  # fmt: skip
  matched = [p for p, same in zip(pairs, alike, strict=True) if same]
  for each in found.values():
    own = each.pop('margin')
    each['accuracy'] = by_question(pairs, won(own))
    each['as_long'] = by_question(matched, won(own[alike]))
    decided = own != 0
    agrees = np.sign(own) == np.sign(margin)
    each['decides'] = float(decided.mean())
    each['agreement'] = float(agrees[decided].mean())
  return {
    'commit': workdir.commit(),
    'questions': len({p.prompt for p in pairs}),
    'pairs': len(pairs),
    'pairs_as_long': len(matched),
    'figures': found,
  }


def table(results: dict[str, Any]) -> str:
  lines = [
    '| | accuracy | of pairs as long | decides | agrees with the model |',
    '| --- | --- | --- | --- | --- |',
  ]
  for name, each in results['figures'].items():
    cells = [
      '{:.3f} [{:.3f}, {:.3f}]'.format(*each[k])
      for k in ('accuracy', 'as_long')
    ]
    cells += [f'{each[k]:.2f}' for k in ('decides', 'agreement')]
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def short_enough(pairs: list[Preference], source: str) -> list[Preference]:
  """Pairs whose longer row fits, in the tokens of the training questions."""
  tokenizer = tokenizers.train_bpe(
    [
      row[field]
      for field in ('question', 'answer')
      for row in data.read_jsonl(f'{source}/train.jsonl', fields=())
    ],
    vocab_size=1024,
  )
  arrays = data.encode_pairs(tokenizer, pairs, max_length=10_000)
  longest = arrays.valid.sum(1).reshape(-1, 2).max(1)
  return [p for p, n in zip(pairs, longest, strict=True) if n <= LIMIT]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', required=True, help='directory of GSM8K')
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=80)
  flags = parser.parse_args()
  logging.set_verbosity(logging.WARNING)
  use_cache()
  rows = [
    {**row, 'question': row['question'] + '\n'}
    for row in data.read_jsonl(f'{flags.data}/{FILE}', fields=('question',))
  ]
  every = data.solution_pairs(rows, num_pairs=None)
  kept = short_enough(every, flags.data)
  print(f'{len(kept)} of {len(every)} pairs have at most {LIMIT} tokens')
  learnt, held_out = divided(kept, seed=0)
  directory = train(learnt, flags.data, flags.workdir, flags.steps)
  results = summarise(rows, held_out, margins(directory, held_out))
  (flags.workdir / 'results.json').write_text(json.dumps(results, indent=2))
  print(table(results))


if __name__ == '__main__':
  main()
