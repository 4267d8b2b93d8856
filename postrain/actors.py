"""The networks of a run: from a config block to a model and its parameters."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
from typing import Any, Literal

import jax

from postrain import hub, peft
from postrain.adapted import Adapted
from postrain.binding import check_arguments
from postrain.compilation import make_jit
from postrain.environments import Environment
from postrain.models import families
from postrain.models.config import Config
from postrain.models.heads import with_labels
from postrain.models.lora import LoRA, merged
from postrain.models.lora import lora as make_lora
from postrain.models.transformer import transformer as make_transformer
from postrain.quantization import quantized, stored
from postrain.tasks.sort import toy_policy
from postrain.types import Model, Params

__all__ = ['pretrained', 'sort_policy', 'transformer']


@dataclasses.dataclass(frozen=True)
class Actor:
  """A model, where its parameters come from, and where they can go.

  Attributes:
    model: see `postrain.types.Model`.
    init: (key, shardings) -> params.
    max_length: positions that the model was made for, None for any number.
    export: (directory, params) -> None writes a Hugging Face directory; None
      where the model has no such form.
    export_scores: (directory, params, head [D 1]) -> None likewise writes one
      of the architecture, and other parameters, that gives a score.
  """

  model: Model
  init: Callable[[Any, Any], Params]
  max_length: int | None = None
  export: Callable[[str, Params], None] | None = None
  export_scores: Callable[[str, Params, Any], None] | None = None


def transformer(
  environment: Environment,
  *,
  num_layers: int,
  model_dim: int,
  mlp_dim: int,
  num_heads: int,
  num_kv_heads: int,
  head_dim: int,
  max_length: int,
  family: str = 'llama',
  rope_theta: float = 10_000.0,
  norm_eps: float = 1e-6,
  tie_embeddings: bool = True,
  qkv_bias: bool = False,
  qk_norm: bool = False,
  num_experts: int = 0,
  experts_per_token: int = 0,
  normalize_gates: bool = True,
  shared_mlp_dim: int = 0,
  head: str = 'language_model',
  num_labels: int = 0,
  dtype: str = 'float32',
  param_dtype: str = 'float32',
  remat: str | None = None,
  attention: str = 'auto',
  lora: dict[str, Any] | None = None,
  quantize: Literal['int8', 'nf4'] | None = None,
) -> Actor:
  """A decoder from scratch; see `postrain.models.config.Config`.

  With ``head='sequence_labels'`` and ``num_labels=1`` it is a reward model.
  With ``lora``, fields of `postrain.models.lora.LoRA`, only its adapters train,
  and ``quantize`` stores what they adapt in fewer bits.

  Raises:
    ValueError: the family, whose layout the export will have, lacks a feature.
  """
  config = Config(
    vocab_size=environment.vocab_size, num_layers=num_layers,
    model_dim=model_dim, mlp_dim=mlp_dim, num_heads=num_heads,
    num_kv_heads=num_kv_heads, head_dim=head_dim, max_length=max_length,
    family=family, rope_theta=rope_theta, norm_eps=norm_eps,
    tie_embeddings=tie_embeddings, qkv_bias=qkv_bias, qk_norm=qk_norm,
    num_experts=num_experts, experts_per_token=experts_per_token,
    normalize_gates=normalize_gates, shared_mlp_dim=shared_mlp_dim,
    head=head, num_labels=num_labels,
    dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention,
  )  # fmt: skip
  return _from_scratch(environment, config, lora, quantize)


def _from_scratch(
  environment: Environment, config: Config, lora: Any, quantize: Any
) -> Actor:
  # Refuses before anything is trained.
  families.to_huggingface(config, _source(environment, config, None))
  model = _model(config, lora, quantize)
  files = environment, config, None
  actor = Actor(
    model, jitted_init(model), config.max_length,
    functools.partial(_export, *files), _scoring(*files),
  )  # fmt: skip
  return _with_lora(actor, config, lora)


def pretrained(
  environment: Environment,
  *,
  directory: str,
  head: str = 'language_model',
  num_labels: int = 0,
  dtype: str = 'float32',
  remat: str | None = None,
  attention: str = 'auto',
  lora: dict[str, Any] | None = None,
  quantize: Literal['int8', 'nf4'] | None = None,
) -> Actor:
  """The model of a Hugging Face directory; see `postrain.hub`.

  The headers of its files are checked at once, so that most broken ones are
  known before anything else; the weights go into their shards when the run
  begins. With another ``head``, say 'sequence_labels' of ``num_labels=1``, a
  language model gets a new one, 0 at first. With ``lora``, fields of
  `postrain.models.lora.LoRA`, they stay as they are and its adapters train;
  ``quantize`` stores them in fewer bits.
  """
  opened = hub.open(directory, dtype=dtype, head=None)
  config = dataclasses.replace(
    _with_head(opened.config, directory, head, num_labels),
    remat=remat,
    attention=attention,
  )
  model = _model(config, lora, quantize)

  def init(_: Any, shardings: Any) -> Params:
    if config.head != opened.config.head:
      labels: Any = dict(num_labels=num_labels, head=head)
      _, params = with_labels(opened.config, hub.read(opened), **labels)
      return jax.device_put(params, shardings)
    if quantize is None:
      return hub.read(opened, shardings)
    # Matrix by matrix: the whole stays on the host.
    return jax.device_put(stored(model, hub.read(opened), quantize), shardings)

  files = environment, config, opened
  actor = Actor(
    model, init, config.max_length, functools.partial(_export, *files),
    _scoring(*files),
  )  # fmt: skip
  return _with_lora(actor, config, lora, base=directory)


def _with_head(
  config: Config, directory: str, head: str, num_labels: int
) -> Config:
  """The config of a directory, or with labels in place of words."""
  if config.head == 'language_model' != head:
    return dataclasses.replace(
      config, head=head, num_labels=num_labels, tie_embeddings=True
    )
  if (head, num_labels) != (config.head, config.num_labels):
    raise ValueError(
      f'{directory} has head={config.head!r} of num_labels={config.num_labels},'
      f' not {head!r} of {num_labels}: choose another directory, or set'
      ' model.head and model.num_labels to these'
    )
  return config


def _model(config: Config, lora: Any, quantize: Any) -> Model:
  model = make_transformer(config)
  if lora is not None and config.head != 'language_model':
    raise ValueError(
      f'model.lora of a model with head={config.head!r}: adapters alone would'
      ' train, and never the head; set model.lora=None'
    )
  if quantize is None:
    return model
  if lora is None:
    raise ValueError(
      f'model.quantize={quantize!r} without model.lora: what is quantised is'
      ' not trained; give it adapters, dict(rank=..., alpha=..., targets=...)'
    )
  return quantized(model, quantize)


def _with_lora(
  actor: Actor, config: Config, block: dict[str, Any] | None,
  base: str | None = None,
) -> Actor:  # fmt: skip
  """Adapters on an actor, exported merged and, in 'adapter', by themselves."""
  if block is None:
    return actor
  check_arguments(LoRA, block, 'model.lora')
  choices = LoRA(**block)
  model = make_lora(actor.model, choices)

  def init(key: Any, shardings: Any) -> Params:
    adapters = jax.jit(
      lambda key: model.init(key).adapters, out_shardings=shardings.adapters
    )(key)
    return Adapted(actor.init(key, shardings.base), adapters)

  def export(directory: str, params: Params) -> None:
    if actor.export is not None:
      actor.export(directory, merged(params, choices))
    peft.save(
      os.path.join(directory, 'adapter'), config, choices, params.adapters,
      base=base,
    )  # fmt: skip

  return Actor(model, init, actor.max_length, export)


def _source(
  environment: Environment, config: Config, origin: hub.Directory | None
) -> Mapping[str, Any] | None:
  """The config.json that an export goes on from.

  Readers of a model that scores find the token to score by the padding.
  """
  source = origin and origin.source
  if config.head == 'language_model':
    return source
  return {**(source or {}), 'pad_token_id': environment.pad_id}


def _export(
  environment: Environment, config: Config, origin: hub.Directory | None,
  directory: str, params: Params,
) -> None:  # fmt: skip
  hub.save(
    directory,
    config,
    params,
    source=_source(environment, config, origin),
    tokenizer=environment.tokenizer,
    generation_config=origin and origin.generation_config,
    overwrite=True,
  )


def _scoring(
  environment: Environment, config: Config, origin: hub.Directory | None
) -> Callable[[str, Params, Any], None] | None:
  """`Actor.export_scores` of a language model, if its family has the form."""
  labelled = dataclasses.replace(
    config, head='sequence_labels', num_labels=1, tie_embeddings=True
  )
  try:
    families.to_huggingface(labelled, _source(environment, labelled, origin))
  except ValueError:
    return None

  def export(directory: str, params: Params, head: Any) -> None:
    labelled, params = with_labels(config, params)
    params['score'] = head.astype(params['score'].dtype)
    _export(environment, labelled, origin, directory, params)

  return export


def sort_policy(environment: Environment, *, embed_dim: int) -> Actor:
  """The toy policy of the sort experiment; see `postrain.tasks.sort`."""
  task = environment.device_task
  if task is None:
    raise ValueError("model 'sort_policy' needs the environment of a sort task")
  model = toy_policy(
    vocab_size=task.vocab_size,
    length=task.completion_length,
    embed_dim=embed_dim,
  )
  return Actor(model, jitted_init(model))


def jitted_init(model: Model) -> Callable[[Any, Any], Params]:
  """Initialise under jit: eager bits differ."""
  return lambda key, shardings: make_jit(once=True)(
    model.init, out_shardings=shardings
  )(key)
