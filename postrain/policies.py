"""A policy to talk to: from a directory or from the checkpoint of a run."""

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

from postrain import actors, hub, sharding, tokenizers
from postrain.algorithm import make_algorithm
from postrain.binding import bind
from postrain.checkpoints import Checkpoints
from postrain.learned_rewards import unjudged
from postrain.recipe import make_recipe
from postrain.states import States
from postrain.types import Model, Params


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model, its parameters on the host, and its tokenizer.

  Attributes:
    model: see `postrain.types.Model`.
    params: NumPy arrays.
    tokenizer: of its prompts and completions.
    stop_ids: end a completion.
    max_length: tokens of a prompt and its completion; None for any number.
    source: where it comes from, in words.
  """

  model: Model
  params: Params
  tokenizer: Any
  stop_ids: tuple[int, ...]
  max_length: int | None
  source: str

  # Never looked at: it fills slots that are masked.
  pad_id = 0

  def encode(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a plain text, or of messages up to the assistant's turn.

    Raises:
      ValueError: it has no tokens, or the tokenizer has no chat template.
    """
    if not isinstance(prompt, str):
      return tokenizers.encode_chat(self.tokenizer, prompt)
    ids = tokenizers.encode_text(self.tokenizer, prompt, start=True)
    if not ids:
      raise ValueError(f'prompt={prompt!r} has no tokens: write something')
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text of a completion, without the token that ended it."""
    ids = list(ids)
    if ids and ids[-1] in self.stop_ids:
      ids = ids[:-1]
    return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

  def room(self, max_new_tokens: int) -> int:
    """The longest prompt that leaves room for a completion.

    Raises:
      ValueError: none does.
    """
    if max_new_tokens < 1:
      raise ValueError(f'max_new_tokens={max_new_tokens}: at least 1 is needed')
    if self.max_length is None:
      return 2**20
    if max_new_tokens >= self.max_length:
      raise ValueError(
        f'max_new_tokens={max_new_tokens} leaves no room for a prompt: the'
        f' model was made for {self.max_length} tokens; lower it'
      )
    return self.max_length - max_new_tokens

  def fingerprint(self) -> str:
    """A digest of the parameters: other weights are another policy."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
      leaf = np.ascontiguousarray(leaf)
      digest.update(f'{path} {leaf.dtype} {leaf.shape}'.encode())
      digest.update(leaf.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def load(
  *, model: str | None, workdir: str | None, step: int | None, dtype: str
) -> Policy:
  """Load what a command line names: a directory or a run, one of the two.

  Raises:
    ValueError: ``step`` without a run; see `from_directory` and `from_run`.
  """
  if workdir is not None:
    return from_run(workdir, step=step)
  if step is not None:
    raise ValueError(
      f'step={step}: a directory has no checkpoints; name a run as the workdir'
    )
  return from_directory(str(model), dtype=dtype)


def from_directory(
  directory: str | os.PathLike[str], *, dtype: str = 'float32'
) -> Policy:
  """Load a Hugging Face directory, as `postrain.hub` does.

  A completion ends at the end-of-sequence token of the tokenizer and at those
  that ``generation_config.json`` names (the end of a turn, say).

  Raises:
    ValueError: see `postrain.hub.load` and `postrain.tokenizers.load`.
  """
  if not pathlib.Path(directory).is_dir():
    raise ValueError(
      f'model directory {str(directory)!r} does not exist: give a local'
      ' directory, nothing is downloaded'
    )
  tokenizer = tokenizers.load(directory)
  loaded = hub.load(directory, dtype=dtype)
  stop_ids = _stop_ids(pathlib.Path(directory), tokenizer)
  _check_vocabulary(tokenizer, stop_ids, loaded.model.vocab_size)
  return Policy(
    loaded.model, loaded.params, tokenizer, stop_ids, loaded.config.max_length,
    f'directory {directory}',
  )  # fmt: skip


def from_run(
  workdir: str | os.PathLike[str], *, step: int | None = None
) -> Policy:
  """Load the actor of a run from one of its checkpoints.

  The run may still go on: nothing of it is touched. Its data files are read
  again, for its tokenizer may be made of them.

  Args:
    workdir: of `postrain.trainer.Trainer`.
    step: of the checkpoint; None for the newest.

  Raises:
    ValueError: there is no such run, checkpoint or tokenizer.
  """
  recipe = make_recipe(_run_config(pathlib.Path(workdir)))
  directory = os.path.join(workdir, 'checkpoints')
  if not os.path.isdir(directory):
    raise ValueError(f'{workdir} has no checkpoint yet: train for longer')
  checkpoints = Checkpoints(directory, keep=None, read_only=True)
  with contextlib.closing(checkpoints):
    step = _existing_step(checkpoints.steps(), step, workdir)
    environment = unjudged(recipe)
    if environment.tokenizer is None:
      raise ValueError(
        f'{workdir} is a run of the environment'
        f' {recipe.environment["name"]!r}, whose tokens are no text: take a run'
        ' on texts'
      )
    actor = bind(actors, recipe.model)(environment)
    algorithm = make_algorithm(
      recipe, actor.model, pad_id=environment.pad_id,
      stop_ids=environment.stop_ids,
    )  # fmt: skip
    mesh = sharding.make_mesh()
    with sharding.on(mesh):
      like = States(recipe, actor, algorithm, mesh).stored(step)
      params = jax.device_get(checkpoints.restore(step, like).params['actor'])
  return Policy(
    actor.model, params, environment.tokenizer, tuple(environment.stop_ids),
    actor.max_length, f'run {workdir}, step {step}',
  )  # fmt: skip


def flags() -> argparse.ArgumentParser:
  """The flags of programs that take a policy and sample; a parent parser."""
  made = argparse.ArgumentParser(add_help=False)
  source = made.add_mutually_exclusive_group(required=True)
  source.add_argument('--model', help='a Hugging Face directory')
  source.add_argument('--workdir', help='a training run')
  made.add_argument('--step', type=int, help='of the checkpoint; the newest')
  made.add_argument('--dtype', default='float32', help='of a directory')
  made.add_argument('--system', help='the system message of a conversation')
  made.add_argument(
    '--thinking', choices=('on', 'off'), help='if the chat template knows it'
  )
  made.add_argument('--temperature', type=float, default=1.0)
  made.add_argument('--top_k', type=int)
  made.add_argument('--top_p', type=float)
  made.add_argument('--min_p', type=float)
  made.add_argument('--seed', type=int, default=0)
  return made


def from_flags(given: argparse.Namespace) -> Policy:
  """The policy that `flags` name.

  Raises:
    ValueError: see `load` and `set_thinking`.
  """
  policy = load(
    model=given.model,
    workdir=given.workdir,
    step=given.step,
    dtype=given.dtype,
  )
  if given.thinking is not None:
    set_thinking(policy, given.thinking == 'on')
  return policy


def set_thinking(policy: Policy, enabled: bool) -> None:
  """Have the chat template ask for thinking, or for none.

  Raises:
    ValueError: the template does not know ``enable_thinking``.
  """
  template = policy.tokenizer.chat_template
  if not isinstance(template, str) or 'enable_thinking' not in template:
    raise ValueError(
      f'the chat template of {policy.source} does not know enable_thinking:'
      ' leave the choice out'
    )
  choice = '{% set enable_thinking = ' + str(enabled).lower() + ' %}'
  policy.tokenizer.chat_template = choice + template


def check_sampling(
  *,
  seed: int,
  temperature: float,
  top_k: int | None,
  top_p: float | None,
  min_p: float | None,
) -> None:
  """Refuse numbers that would draw something else than asked for.

  Raises:
    ValueError: one is out of its range.
  """
  for name, value, right, expected in (
    ('seed', seed, 0 <= seed < 2**32, 'in [0, 2^32)'),
    ('temperature', temperature, 0 <= temperature < math.inf,
     'at least 0, which is greedy'),
    ('top_k', top_k, top_k is None or top_k >= 1, 'at least 1'),
    ('top_p', top_p, top_p is None or 0 < top_p <= 1, 'in (0, 1]'),
    ('min_p', min_p, min_p is None or 0 <= min_p <= 1, 'in [0, 1]'),
  ):  # fmt: skip
    if not right:
      raise ValueError(f'{name}={value}: it must be {expected}')


def _run_config(workdir: pathlib.Path) -> Mapping[str, Any]:
  path = workdir / 'config.json'
  try:
    return json.loads(path.read_text(encoding='utf-8'))['config']
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'{path} is no config of a run: give the workdir of a training run, or a'
      ' Hugging Face directory as the model'
    ) from error


def _existing_step(
  steps: Sequence[int], step: int | None, workdir: str | os.PathLike[str]
) -> int:
  if not steps:
    raise ValueError(f'{workdir} has no checkpoint yet: train for longer')
  if step is not None and step not in steps:
    raise ValueError(
      f'step={step}: {workdir} has checkpoints of {", ".join(map(str, steps))}'
    )
  return max(steps) if step is None else step


def _stop_ids(directory: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
  path, found = directory / 'generation_config.json', None
  if path.is_file():
    try:
      found = json.loads(path.read_text(encoding='utf-8')).get('eos_token_id')
    except (ValueError, AttributeError) as error:
      raise ValueError(f'{path} is no JSON object: copy it again') from error
  stops = found if isinstance(found, list) else [found]
  stops = dict.fromkeys([tokenizer.eos_token_id, *stops])
  return tuple(stop for stop in stops if stop is not None)


def _check_vocabulary(
  tokenizer: Any, stop_ids: Sequence[int], vocab_size: int
) -> None:
  largest = max(tokenizer.get_vocab().values())
  wrong = [i for i in stop_ids if not isinstance(i, int) or i >= vocab_size]
  if largest >= vocab_size or wrong or not stop_ids:
    raise ValueError(
      f'the tokenizer has ids up to {largest} and ends at {tuple(stop_ids)},'
      f' the embedding has {vocab_size} rows: take the tokenizer that belongs'
      ' to the model, with an end-of-sequence token'
    )
