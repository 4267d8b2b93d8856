"""Where a critic comes from: its network, and its parameters at the start.

The critic has an optimiser and shardings of its own, and a trunk, unless it is
`shared`. Its values are of the state before each token, those of
`postrain.values.token_values`.
"""

from collections.abc import Callable
import dataclasses
import inspect
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from postrain import advantages, hub
from postrain.actors import Actor
from postrain.adapted import bases
from postrain.batches import asked
from postrain.binding import bind
from postrain.environments import Environment
from postrain.keys import run_key
from postrain.models.heads import scalar_head
from postrain.models.transformer import transformer
from postrain.recipe import Block, Recipe
from postrain.types import Model, Params

__all__ = ['copied', 'fresh', 'pretrained', 'shared']


@dataclasses.dataclass(frozen=True)
class Network:
  """A critic before its first step.

  Attributes:
    model: whose unembed gives one value.
    begin: actor's parameters -> params, traceable; None where ``read`` gives
      them.
    read: shardings -> params, from files.
    max_length: positions that the model was made for, None for any number.
    opened: the directory that it is read from.
    trunk: what its head reads of the actor's states, where it has no trunk.
  """

  model: Model
  begin: Callable[[Params], Params] | None = None
  read: Callable[[Any], Params] | None = None
  max_length: int | None = None
  opened: hub.Directory | None = None
  trunk: Callable[[Array], Array] | None = None


def copied(model: Model, seed: int | Int[Array, '']) -> Network:
  """The actor's trunk as it is when the online stage begins; values are 0.

  Args:
    model: of the actor.
    seed: of the run.

  Raises:
    ValueError: the actor has adapters.

  References:
    Ouyang et al., 2022, Training language models to follow instructions with
    human feedback, arXiv:2203.02155.
  """
  del seed
  _check_whole(model, 'copied')
  critic = scalar_head(model)

  def begin(actor: Params) -> Params:
    head = jnp.zeros_like(critic.shapes['head'])
    return {'backbone': jax.tree.map(jnp.copy, actor), 'head': head}

  return Network(critic, begin)


def fresh(model: Model, seed: int | Int[Array, '']) -> Network:
  """The actor's architecture with an initialisation of its own.

  Args:
    model: of the actor.
    seed: of the run.

  Raises:
    ValueError: the actor has adapters.
  """
  _check_whole(model, 'fresh')
  critic = scalar_head(model)
  return Network(critic, lambda actor: critic.init(run_key(seed, 'critic')))


def shared(
  model: Model, seed: int | Int[Array, ''], *, stop_gradient: bool = False
) -> Network:
  """A head on the states of the actor, whose trunk both losses train.

  The head alone has the critic's optimiser: ``critic.coef`` weighs what values
  ask of the trunk.

  Args:
    model: of the actor.
    seed: of the run.
    stop_gradient: whether values leave the trunk as it is.

  References:
    Schulman et al., 2017, Proximal Policy Optimization Algorithms,
    arXiv:1707.06347.
  """
  del seed
  whole = scalar_head(model)

  def init(key: Any = None) -> Params:
    del key
    return {'head': jnp.zeros_like(whole.shapes['head'])}

  head = dataclasses.replace(
    whole, init=init, logical_axes=lambda: {'head': ('width', None)}
  )
  trunk = jax.lax.stop_gradient if stop_gradient else lambda states: states
  return Network(head, lambda actor: init(), trunk=trunk)


def pretrained(
  model: Model,
  seed: int | Int[Array, ''],
  *,
  directory: str,
  dtype: str = 'float32',
  remat: str | None = None,
  attention: Literal['auto', 'xla', 'cudnn', 'splash'] = 'auto',
) -> Network:
  """A reward model of one score, as Hugging Face directories hold them.

  Args:
    model: of the actor.
    seed: of the run.
    directory: of a ``...ForSequenceClassification`` with one label.
    dtype: of parameters and activations.
    remat: see `postrain.models.config.Config`.
    attention: likewise.

  Raises:
    ValueError: it has several labels, or see `postrain.hub.open`.
  """
  del model, seed
  opened = hub.open(directory, dtype=dtype, head='sequence_labels')
  if opened.config.num_labels != 1:
    raise ValueError(
      f'{directory} has num_labels={opened.config.num_labels}, a value is one'
      ' number: take a reward model of one label'
    )
  config = dataclasses.replace(opened.config, remat=remat, attention=attention)
  return Network(
    transformer(config),
    read=lambda shardings: hub.read(opened, shardings),
    max_length=config.max_length,
    opened=dataclasses.replace(opened, config=config),
  )


def export(
  network: Network, actor: Actor, environment: Environment, directory: str,
  roles: dict[str, Params],
) -> None:  # fmt: skip
  """Write what `pretrained` reads, where the family of the actor has it."""
  params = roles['critic']
  if network.opened is not None:
    hub.save(
      directory, network.opened.config, params, source=network.opened.source,
      tokenizer=environment.tokenizer, overwrite=True,
    )  # fmt: skip
  elif actor.export_scores is not None:
    trunk = roles['actor'] if network.trunk else params['backbone']
    actor.export_scores(directory, trunk, params['head'])


def check_critic(recipe: Recipe) -> None:
  """Refuse an advantage without its values, and values that nobody reads.

  Raises:
    ValueError: names what does not fit and what would.
  """
  name, network = recipe.advantage['name'], recipe.critic.network
  reads = 'values' in asked(bind(advantages, recipe.advantage))
  if reads and network is None:
    raise ValueError(
      f'advantage {name!r} reads values, but critic.network=None: set'
      " critic.network=dict(name='copied'), or take an advantage of groups"
    )
  if network is None:
    return
  if not reads:
    raise ValueError(
      f'critic.network={network["name"]!r}, but advantage {name!r} reads no'
      " values: take advantage.name='gae', or set critic.network=None"
    )
  discounts = [
    _discount(block) for block in (recipe.advantage, recipe.critic.returns)
  ]
  if discounts[0] != discounts[1]:
    raise ValueError(
      f'advantage.discount={discounts[0]} with critic.returns.discount='
      f'{discounts[1]}: values of one would enter sums of the other; set both'
      ' to the same number'
    )


def _discount(block: Block) -> Any:
  """What a block of `advantages` discounts by, 1 where it does not say."""
  bound = inspect.signature(bind(advantages, block)).parameters
  return bound['discount'].default if 'discount' in bound else 1.0


def check_vocabulary(network: Network, vocab_size: int) -> None:
  """Refuse a critic that has no embedding for some token.

  Raises:
    ValueError: its vocabulary is smaller than that of the tokenizer.
  """
  if vocab_size > network.model.vocab_size:
    raise ValueError(
      f'the tokenizer has {vocab_size} ids, the embedding of the critic'
      f' {network.model.vocab_size} rows: take a critic of the same tokenizer'
    )


def _check_whole(model: Model, name: str) -> None:
  if bases(model.shapes):
    raise ValueError(
      f'critic.network {name!r} with model.lora: its trunk would be a second'
      " base; take network 'pretrained' with a directory, or model.lora=None"
    )
