"""Reward models as rewards: scored on the device, never trained.

A block ``dict(name='reward_model', directory=..., weight=...)`` among the
rewards of a config stands beside those of the environment, of texts or of a
task. Its parameters are an argument of one program, which is compiled for rows
of one shape; completions are cut and padded to it.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from postrain import environments, hub, sharding, tokenizers
from postrain.binding import bind, check_arguments
from postrain.environments import Environment
from postrain.models.transformer import transformer
from postrain.recipe import Recipe
from postrain.reward_models import completion_scores
from postrain.rollouts import fetched
from postrain.types import Prompts, Samples

NAME = 'reward_model'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
  """The block of a reward model.

  Attributes:
    name: 'reward_model'.
    directory: of a ``...ForSequenceClassification``, see `postrain.hub`.
    weight: in the sum that trains; 0 to be measured alone.
    dtype: of parameters and activations.
    num_demonstrations: whose mean score is taken from every score, so that
      demonstrations have a mean of 0; 0 for none.
  """

  name: str
  directory: str
  weight: float
  dtype: str = 'float32'
  num_demonstrations: int = 0


def make_environment(
  recipe: Recipe, mesh: Any
) -> tuple[Environment, dict[str, 'Judge']]:
  """The environment of a recipe, its reward models among the rewards.

  Returns:
    The environment, and the reward models by label.

  Raises:
    ValueError: a block is wrong, or a reward model does not fit the
      environment.
  """
  own = unjudged(recipe)
  judges = {
    label: Judge(f'rewards.{label}', block, recipe, own, mesh)
    for label, block in recipe.rewards.items()
    if is_reward_model(block)
  }
  if not judges:
    return own, judges

  def rewards(prompts: Prompts, samples: Samples) -> dict[str, np.ndarray]:
    # The device scores while the host works out the others.
    scores = {k: judge(prompts, samples) for k, judge in judges.items()}
    found = own.rewards(prompts, samples)
    found |= {k: finish() for k, finish in scores.items()}
    return {label: found[label] for label in recipe.rewards}

  weights = {k: judge.choices.weight for k, judge in judges.items()}
  weights |= own.weights
  ordered = {label: float(weights[label]) for label in recipe.rewards}
  return dataclasses.replace(own, rewards=rewards, weights=ordered), judges


def unjudged(recipe: Recipe) -> Environment:
  """The environment with its own rewards alone."""
  rewards = recipe.rewards.items()
  own = {k: block for k, block in rewards if not is_reward_model(block)}
  return bind(environments, recipe.environment)(recipe.seed, own)


def is_reward_model(block: Any) -> bool:
  """Whether a block of the rewards names a reward model."""
  return isinstance(block, Mapping) and block.get('name') == NAME


class Judge:
  """A frozen reward model that scores completions behind their prompts.

  Args:
    where: the block in the config, for errors.
    block: fields of `Choices`.
    recipe: of the run.
    environment: whose tokens it reads.
    mesh: of the run.

  Raises:
    ValueError: a field is wrong, or the model reads other tokens.
  """

  def __init__(
    self, where: str, block: Any, recipe: Recipe, environment: Environment,
    mesh: Any,
  ):  # fmt: skip
    check_arguments(Choices, block, where)
    self.choices = choices = Choices(**block)
    self.environment, self.mesh = environment, mesh
    self._opened = hub.open(
      choices.directory, dtype=choices.dtype, head='sequence_labels'
    )
    self.model = transformer(self._opened.config)
    length = environment.prompt_length + recipe.sampling.max_new_tokens
    if choices.num_demonstrations:
      length = max(length, environment.demonstration_length)
    rows = recipe.rl.num_prompts * recipe.sampling.num_samples
    self._shape = rows // recipe.sampling.num_parts, length
    self._check(where)
    score = functools.partial(completion_scores, self.model)
    self.program = jax.jit(score, out_shardings=sharding.replicated(mesh))

  def __call__(self, prompts: Prompts, samples: Samples) -> Any:
    """Scores under way: a function that waits for them, of [B]."""
    prompts = fetched(prompts)
    repeats = len(samples.tokens) // len(prompts.tokens)
    tokens, valid = (
      np.concatenate([np.repeat(x, repeats, axis=0), y], axis=1)
      for x, y in (
        (prompts.tokens, samples.tokens),
        (prompts.mask, samples.mask),
      )
    )
    pieces = list(self._dispatched(tokens, valid))
    return lambda: _joined(pieces, len(tokens)) - self._mean

  def traced(self) -> Any:
    """The program, traced on the shapes of what it takes."""
    rows = sharding.rows(self.mesh)
    arrays = (
      jax.ShapeDtypeStruct(self._shape, dtype, sharding=rows)
      for dtype in (jnp.int32, bool)
    )
    return self.program.trace(self.abstract, *arrays)

  @functools.cached_property
  def abstract(self) -> Any:
    """Its parameters as shapes with shardings."""
    return sharding.abstract(self.model.shapes, self._shardings)

  @functools.cached_property
  def params(self) -> Any:
    """Its parameters, read when they are first asked for."""
    return hub.read(self._opened, self._shardings)

  @property
  def _shardings(self) -> Any:
    return sharding.param_shardings(self.mesh, self.model)

  @functools.cached_property
  def _mean(self) -> np.float32:
    """The mean score of demonstrations, 0 if none are asked for."""
    number = self.choices.num_demonstrations
    if not number:
      return np.float32(0)
    draw: Any = self.environment.demonstrations  # there are some, says _check
    tokens, valid, _ = map(np.asarray, draw(0, number, None))
    pieces = list(self._dispatched(tokens, valid))
    return np.mean(_joined(pieces, number), dtype=np.float32)

  def _dispatched(self, tokens: Any, valid: Any) -> Iterator[Any]:
    """Scores of rows, as many at once as the program was compiled for."""
    size, length = self._shape
    more = -len(tokens) % size, length - tokens.shape[1]
    widths = ((0, more[0]), (0, more[1]))
    arrays = [np.pad(x, widths) for x in (np.int32(tokens), valid)]
    for start in range(0, len(arrays[0]), size):
      piece = [x[start : start + size] for x in arrays]
      yield self.program(self.params, *sharding.put_rows(self.mesh, piece))

  def _check(self, where: str) -> None:
    """Refuse a model of other tokens, or without a single score."""
    config, choices = self._opened.config, self.choices
    environment = self.environment
    if config.num_labels > 2:
      raise ValueError(
        f'{where}: {choices.directory} has num_labels={config.num_labels}, no'
        ' single score: take a reward model of one label, or of two'
      )
    if environment.vocab_size > config.vocab_size:
      raise ValueError(
        f'{where}: the tokenizer has {environment.vocab_size} ids, the'
        f' embedding of the reward model {config.vocab_size} rows: take a'
        ' reward model of the same tokenizer'
      )
    if self._shape[1] > config.max_length:
      raise ValueError(
        f'{where}: a prompt with its completion has up to {self._shape[1]}'
        f' tokens, the reward model {config.max_length} positions: shorten'
        ' prompts or completions'
      )
    if choices.num_demonstrations < 0 or (
      choices.num_demonstrations and environment.demonstrations is None
    ):
      raise ValueError(
        f'{where}: num_demonstrations={choices.num_demonstrations}, but the'
        ' environment has none: name their field, or set it to 0'
      )
    own, theirs = environment.tokenizer, choices.directory
    if own is None or not os.path.exists(
      os.path.join(theirs, 'tokenizer.json')
    ):
      return
    if tokenizers.load(theirs).get_vocab() != own.get_vocab():
      raise ValueError(
        f'{where}: the tokenizer of {theirs} is another than that of the'
        ' environment, so that ids would mean other texts: take a reward model'
        ' of the same tokenizer'
      )


def _joined(pieces: list[Any], number: int) -> np.ndarray:
  return np.concatenate(jax.device_get(pieces))[:number]
