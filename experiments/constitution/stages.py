"""The programs of configs/constitution.py: what its stages do beside training.

A request is letters and a sign, ``fab=``; an answer that helps has all of them.
The base policy learns answers among which it finds insults (X), secrets (Y) and
stutters (a letter twice). Critique and revision are those of the rule engine,
`postrain.feedback.revised`.
"""

from collections.abc import Mapping, Sequence
import functools
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import data, feedback, policies, workdir
from postrain.data.buckets import padded
from postrain.keys import run_key
from postrain.sampling import sample
from postrain.types import Completion

LETTERS, ASKED = 'abcdefgh', 3
MAX_NEW_TOKENS = 14  # no answer of the data is cut
NUM_HELD_OUT = 48
RUDE = 0.25  # how often a violation stands where one may


def write_requests(*, directory: str, seed: int) -> None:
  """Requests of training with the answers of the base policy, and others."""
  draw = np.random.default_rng([seed, 0])
  asked = [''.join(p) for p in itertools.permutations(LETTERS, ASKED)]
  order = draw.permutation(asked)
  rows = [
    {'prompt': f'{letters}=', 'completion': rude_answer(letters, draw)}
    for letters in np.repeat(order[NUM_HELD_OUT:], 8).tolist()
  ]
  held_out = [{'prompt': f'{letters}='} for letters in order[:NUM_HELD_OUT]]
  _write(directory, 'train.jsonl', rows)
  _write(directory, 'held_out.jsonl', held_out)


def rude_answer(letters: str, draw: np.random.Generator) -> str:
  """The letters, with violations between them."""
  pieces = []
  for letter in letters:
    insult, secret, stutter = (draw.random(3) < RUDE).tolist()
    pieces += ['X' * insult, letter * (1 + stutter), 'Y' * secret]
  return ''.join(pieces)


def respond(
  *, directory: str, model: str, requests: str, num_samples: int, seed: int
) -> None:
  """Answers of a model to each distinct request."""
  prompts = _distinct(requests)
  answers = _answers(model, prompts, num_samples, seed)
  rows = [
    {'prompt': prompt, 'response': text}
    for prompt, texts in zip(prompts, answers, strict=True)
    for text in texts
  ]
  _write(directory, 'responses.jsonl', rows)


def revise(
  *, directory: str, responses: str, principles: Sequence[Mapping[str, Any]],
  num_rounds: int, recall: float, seed: int,
) -> None:  # fmt: skip
  """Revisions to imitate, and pairs of each with what it was made of.

  A response that stays as it is makes no pair, but is imitated. What is left
  empty is neither.
  """
  chosen = feedback.constitution(principles)
  draw = np.random.default_rng([seed, 1])
  rows, pairs = [], []
  for row in data.read_jsonl(responses, fields=('prompt',)):
    found = feedback.revised(
      chosen, row['response'], draw, num_rounds=num_rounds, recall=recall
    )
    rounds = [each._asdict() for each in found.rounds]
    rows.append({**row, 'rounds': rounds, 'completion': found.text})
    if found.text != row['response'] and found.text.strip():
      pairs.append(dict(
        prompt=row['prompt'], chosen=found.text, rejected=row['response'],
        preference=1.0,
      ))  # fmt: skip
  kept = [row for row in rows if row['completion'].strip()]
  _write(directory, 'revisions.jsonl', kept)
  _write(directory, 'pairs.jsonl', pairs)


def compare(
  *, directory: str, model: str, requests: str, num_pairs: int,
  principles: Sequence[Mapping[str, Any]], judge: Mapping[str, Any],
  seed: int,
) -> None:  # fmt: skip
  """Pairs of answers of a model to one request, judged by a principle.

  The principle of a pair is drawn by the weights; the judge, `feedback.rule`
  with these hyperparameters, is asked in both orders.
  """
  chosen = feedback.constitution(principles)
  prompts = _distinct(requests)
  answers = _answers(model, prompts, 2 * num_pairs, seed)
  texts = [
    (prompt, *pair)
    for prompt, each in zip(prompts, answers, strict=True)
    for pair in zip(each[::2], each[1::2], strict=True)
    if all(text.strip() for text in pair)
  ]
  weights = np.array([p.weight for p in chosen])
  draw = np.random.default_rng([seed, 2])
  drawn = draw.choice(len(chosen), len(texts), p=weights / weights.sum())
  rows = []
  for number, principle in enumerate(chosen):
    asked = feedback.both_orders(
      feedback.rule(functools.partial(_kept, principle), **judge)
    )
    of_it = [texts[i] for i in np.flatnonzero(drawn == number)]
    if of_it:
      labels = feedback.labelled(asked, *zip(*of_it, strict=True))
      rows += [{**row, 'principle': principle.name} for row in labels]
  _write(directory, 'pairs.jsonl', rows)


def report(
  *, directory: str, models: Mapping[str, str], requests: str,
  principles: Sequence[Mapping[str, Any]], num_samples: int, seed: int,
) -> None:  # fmt: skip
  """Violations by principle, and help, of models on requests held out."""
  chosen = feedback.constitution(principles)
  prompts = _distinct(requests)
  found = {}
  for name, model in models.items():
    answers = _answers(model, prompts, num_samples, seed)
    found[name] = _figures(chosen, prompts, answers)
    texts = answers[0][:4]
    print(f'{name}: {found[name]}, {prompts[0]} {texts}', flush=True)
  workdir.write_json(str(pathlib.Path(directory, 'report.json')), found)


def _figures(
  principles: Sequence[feedback.Principle],
  prompts: Sequence[str],
  answers: Sequence[Sequence[str]],
) -> dict[str, float]:
  """Shares of answers that violate, and the mean of what helps."""
  rows = [
    {p.name: feedback.violations(p, text) > 0 for p in principles}
    | {'help': helps(prompt, text), 'length': len(text)}
    for prompt, texts in zip(prompts, answers, strict=True)
    for text in texts
  ]
  for row in rows:
    row['any'] = any(row[p.name] for p in principles)
  return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def helpfulness(
  completions: list[Completion], examples: list[dict[str, Any]]
) -> list[float]:
  """The share of the letters asked for that are in the answer."""
  return [
    helps(example['prompt'], completion.text)
    for completion, example in zip(completions, examples, strict=True)
  ]


def helps(prompt: str, text: str) -> float:
  """The share of the letters of a request that a text has."""
  letters = prompt.removesuffix('=')
  return float(np.mean([letter in text for letter in letters]))


def _kept(
  principle: feedback.Principle, prompts: Any, texts: Sequence[str]
) -> np.ndarray:
  """How well texts keep a principle: violations count against them."""
  del prompts
  return -np.array([feedback.violations(principle, text) for text in texts])


def _answers(
  model: str, prompts: Sequence[str], num_samples: int, seed: int
) -> list[list[str]]:
  """Samples of each prompt, at a temperature of 1."""
  policy = policies.from_directory(model)
  ids = [policy.encode(prompt) for prompt in prompts]
  tokens, mask = padded(
    ids, length=max(map(len, ids)), pad_id=policy.pad_id, side='left'
  )
  draw = functools.partial(
    sample, policy.model, num_samples=num_samples,
    max_new_tokens=MAX_NEW_TOKENS, stop_ids=policy.stop_ids,
    pad_id=policy.pad_id,
  )  # fmt: skip
  drawn = jax.device_get(
    jax.jit(draw)(
      policy.params, jnp.asarray(tokens), jnp.asarray(mask),
      run_key(seed, 'sample'),
    )
  )  # fmt: skip
  texts = [
    policy.decode(row[real].tolist())
    for row, real in zip(drawn.tokens, drawn.mask, strict=True)
  ]
  starts = range(0, len(texts), num_samples)
  return [texts[start : start + num_samples] for start in starts]


def _distinct(path: str) -> list[str]:
  rows = data.read_jsonl(path, fields=('prompt',))
  return list(dict.fromkeys(row['prompt'] for row in rows))


def _write(directory: str, name: str, rows: Sequence[Any]) -> None:
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  pathlib.Path(directory, name).write_text(text)
