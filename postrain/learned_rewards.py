"""Reward models as rewards: scored on the device, never trained.

A block ``dict(name='reward_model', directory=..., weight=...)`` among the
rewards of a config stands beside those of the environment, of texts or of a
task; with ``directories`` in place of ``directory`` several models give one
reward. Parameters are an argument of one program, which is compiled for rows of
one shape; completions are cut and padded to it.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from postrain import environments, hub, sharding, tokenizers
from postrain.binding import bind, check_arguments
from postrain.environments import Environment
from postrain.models.transformer import Config, transformer
from postrain.recipe import Recipe
from postrain.reward_models import completion_scores, ensemble
from postrain.rollouts import fetched
from postrain.types import Prompts, Samples

NAME = 'reward_model'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
  """The block of a reward model.

  Attributes:
    name: 'reward_model'.
    directory: of a ``...ForSequenceClassification``, see `postrain.hub`.
    directories: of several, in its place.
    weight: in the sum that trains; 0 to be measured alone.
    aggregate: of several, see `postrain.reward_models.ensemble`.
    coef: likewise.
    dtype: of parameters and activations.
    num_demonstrations: whose mean score is taken from every score of a model,
      so that demonstrations have a mean of 0 by each; 0 for none.
  """

  name: str
  weight: float
  directory: str | None = None
  directories: tuple[str, ...] = ()
  aggregate: Literal['mean', 'min', 'lower'] = 'mean'
  coef: float = 1.0
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
  """Frozen reward models that score completions behind their prompts.

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
    _check_choices(where, choices)
    self._opened = {
      path: hub.open(path, dtype=choices.dtype, head='sequence_labels')
      for path in choices.directories or [str(choices.directory)]
    }
    self.models = tuple(
      transformer(opened.config) for opened in self._opened.values()
    )
    length = environment.prompt_length + recipe.sampling.max_new_tokens
    if choices.num_demonstrations:
      length = max(length, environment.demonstration_length)
    rows = recipe.rl.num_prompts * recipe.sampling.num_samples
    self._shape = rows // recipe.sampling.num_parts, length
    for directory, opened in self._opened.items():
      self._check(where, directory, opened.config)
    self.program = jax.jit(
      self._completion_scores, out_shardings=sharding.replicated(mesh)
    )

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
    pieces = list(self._dispatched(tokens, valid, self._means))
    return lambda: _joined(pieces, len(tokens))[0]

  def traced(self) -> Any:
    """The program, traced on the shapes of what it takes."""
    rows = sharding.rows(self.mesh)
    arrays = (
      jax.ShapeDtypeStruct(self._shape, dtype, sharding=rows)
      for dtype in (jnp.int32, bool)
    )
    return self.program.trace(self.abstract, self._zeros, *arrays)

  @functools.cached_property
  def abstract(self) -> Any:
    """Parameters of each model as shapes with shardings."""
    return tuple(
      sharding.abstract(model.shapes, placed)
      for model, placed in zip(self.models, self._shardings, strict=True)
    )

  @functools.cached_property
  def params(self) -> Any:
    """Parameters of each model, read when they are first asked for."""
    return tuple(map(hub.read, self._opened.values(), self._shardings))

  @property
  def _shardings(self) -> list[Any]:
    return [sharding.param_shardings(self.mesh, m) for m in self.models]

  def _completion_scores(
    self, params: Any, means: Any, tokens: Any, valid: Any
  ) -> tuple[Any, Any]:
    """The reward of rows, and what each model says of them [M N]."""
    scores = jnp.stack([
      completion_scores(model, own, tokens, valid)
      for model, own in zip(self.models, params, strict=True)
    ])  # fmt: skip
    choices = self.choices
    reward = ensemble(
      scores - means[:, None], aggregate=choices.aggregate, coef=choices.coef
    )
    return reward, scores

  @property
  def _zeros(self) -> np.ndarray:
    return np.zeros(len(self.models), np.float32)

  @functools.cached_property
  def _means(self) -> np.ndarray:
    """Mean scores of demonstrations by each, 0 if none are asked for."""
    number = self.choices.num_demonstrations
    if not number:
      return self._zeros
    draw: Any = self.environment.demonstrations  # there are some, says _check
    tokens, valid, _ = map(np.asarray, draw(0, number, None))
    pieces = list(self._dispatched(tokens, valid, self._zeros))
    return np.asarray(_joined(pieces, number)[1].mean(axis=1), np.float32)

  def _dispatched(
    self, tokens: Any, valid: Any, means: np.ndarray
  ) -> Iterator[Any]:
    """Scores of rows, as many at once as the program was compiled for."""
    size, length = self._shape
    more = -len(tokens) % size, length - tokens.shape[1]
    widths = ((0, more[0]), (0, more[1]))
    arrays = [np.pad(x, widths) for x in (np.int32(tokens), valid)]
    for start in range(0, len(arrays[0]), size):
      piece = [x[start : start + size] for x in arrays]
      rows = sharding.put_rows(self.mesh, piece)
      yield self.program(self.params, means, *rows)

  def _check(self, where: str, directory: str, config: Config) -> None:
    """Refuse a model of other tokens, or without a single score."""
    choices, environment = self.choices, self.environment
    if config.num_labels > 2:
      raise ValueError(
        f'{where}: {directory} has num_labels={config.num_labels}, no'
        ' single score: take a reward model of one label, or of two'
      )
    if environment.vocab_size > config.vocab_size:
      raise ValueError(
        f'{where}: the tokenizer has {environment.vocab_size} ids, the'
        f' embedding of the reward model {config.vocab_size} rows in'
        f' {directory}: take a reward model of the same tokenizer'
      )
    if self._shape[1] > config.max_length:
      raise ValueError(
        f'{where}: a prompt with its completion has up to {self._shape[1]}'
        f' tokens, the reward model {config.max_length} positions in'
        f' {directory}: shorten prompts or completions'
      )
    if choices.num_demonstrations < 0 or (
      choices.num_demonstrations and environment.demonstrations is None
    ):
      raise ValueError(
        f'{where}: num_demonstrations={choices.num_demonstrations}, but the'
        ' environment has none: name their field, or set it to 0'
      )
    own = environment.tokenizer
    if own is None or not os.path.exists(
      os.path.join(directory, 'tokenizer.json')
    ):
      return
    if tokenizers.load(directory).get_vocab() != own.get_vocab():
      raise ValueError(
        f'{where}: the tokenizer of {directory} is another than that of the'
        ' environment, so that ids would mean other texts: take a reward model'
        ' of the same tokenizer'
      )


def _check_choices(where: str, choices: Choices) -> None:
  """Refuse a block that names no model, or several without need.

  Raises:
    ValueError: names the fields and what they may be.
  """
  paths = choices.directories
  if (choices.directory is None) == (not paths) or len({*paths}) < len(paths):
    raise ValueError(
      f'{where}: directory={choices.directory!r} with directories={paths!r}:'
      ' name one reward model by directory, or several, each once, by'
      ' directories'
    )
  if choices.coef < 0:
    raise ValueError(
      f'{where}: coef={choices.coef}, it must be at least 0: what is taken off'
      ' where models disagree'
    )


def _joined(pieces: list[Any], number: int) -> list[np.ndarray]:
  """Rewards and scores of so many rows."""
  return [
    np.concatenate(parts, axis=-1)[..., :number]
    for parts in zip(*jax.device_get(pieces), strict=True)
  ]
