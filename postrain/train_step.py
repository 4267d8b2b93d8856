"""One optimiser step: accumulate over micro-batches, then update."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from postrain.adapted import bases, rejoined, trainable
from postrain.batches import check_packing, cut_batch
from postrain.dtypes import promoted
from postrain.types import (
  Batch,
  Max,
  Mean,
  Metrics,
  Objective,
  Params,
  Sum,
  TrainState,
)


def make_train_step(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  num_micro_batches: int = 1,
  stop: Callable[[TrainState, Metrics], Any] | None = None,
  beside: Callable[[dict[str, Params], Any], tuple[Any, Metrics]] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Make ``train_step(state, frozen, batch, more=None) -> (state, metrics)``.

  Objectives are sums over units, so gradients of micro-batches add up to the
  gradient of the batch, in at least float32. An update whose gradient is not
  finite is left out whole: parameters and optimiser keep their bits, and
  ``skipped`` says so. Of `postrain.adapted` parameters the base stays out of
  it: ``opt_state`` is that of ``optimizer.init(trainable(params))``.

  With ``stop``, of the state and of the figures at its parameters, an update
  for which it holds is left out likewise, and ``stopped`` of state and figures
  says so.

  With ``beside``, of parameters and ``more``, its gradient is added before any
  norm is taken, and its figures to those of the same name.
  """

  def train_step(
    state: TrainState, frozen: dict[str, Params], batch: Batch,
    more: Any = None,
  ) -> tuple[TrainState, Metrics]:  # fmt: skip
    gradient, metrics = accumulate(
      objective, state.params, frozen, batch, num_micro_batches
    )
    if beside is not None:
      others = beside(state.params, more)
      gradient, metrics = _added((gradient, metrics), others)
    norm = optax.tree.norm(gradient)
    trained = trainable(state.params)
    gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, trained)
    with jax.numpy_dtype_promotion('standard'):  # Optax: rate ** integer count
      updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
    params = optax.apply_updates(trained, updates)
    applies = finite = jnp.isfinite(norm)
    stopped = None if stop is None else stop(state, metrics)
    if stopped is not None:
      applies = finite & ~stopped
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(applies, new, old),
      (params, opt_state),
      (trained, state.opt_state),
    )
    metrics = {name: _per_step(figure) for name, figure in metrics.items()}
    metrics |= {
      'gradient_norm': Mean(norm, jnp.float32(1)),
      'skipped': Sum(1 - finite.astype(jnp.float32)),
    }
    if stopped is not None:
      metrics['stopped'] = Sum(stopped.astype(jnp.float32))
    if len(gradient) > 1:
      metrics |= {
        f'gradient_norm/{role}': Mean(optax.tree.norm(part), jnp.float32(1))
        for role, part in gradient.items()
      }
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=rejoined(params, bases(state.params)),
      opt_state=opt_state,
      stopped=stopped,
    )
    return state, metrics

  return train_step


def accumulate(
  objective: Objective,
  params: dict[str, Params],
  frozen: dict[str, Params],
  batch: Batch,
  num_micro_batches: int,
) -> tuple[Any, Metrics]:
  """Sum gradients of what is trained, merge metrics, over micro-batches.

  Micro-batches are strided.
  """
  check_packing(batch.packing, num_micro_batches, batch.unit_size)
  trained, fixed = trainable(params), bases(params)

  def of_trained(trained: Any, batch: Batch) -> tuple[Any, Metrics]:
    return objective(rejoined(trained, fixed), frozen, batch)

  grad = jax.grad(of_trained, has_aux=True)
  if num_micro_batches == 1:
    return grad(trained, batch)

  structure = jax.tree.structure(batch)

  def add(total: Any, leaves: list) -> tuple[Any, Metrics]:
    micro = jax.tree.unflatten(structure, leaves)
    gradient, metrics = grad(trained, micro)
    return jax.tree.map(jnp.add, total, _widen(gradient)), metrics

  zeros = jax.tree.map(jnp.zeros_like, _widen(trained))
  micros = cut_batch(batch, num_micro_batches)
  gradient, stacked = jax.lax.scan(add, zeros, micros)
  return gradient, merge(stacked)


def _added(
  one: tuple[Any, Metrics], other: tuple[Any, Metrics]
) -> tuple[Any, Metrics]:
  """Sums of gradients, and of figures that both have."""
  gradient = jax.tree.map(jnp.add, _widen(one[0]), _widen(other[0]))
  both = {
    name: jax.tree.map(jnp.add, one[1][name], other[1][name])
    for name in one[1].keys() & other[1].keys()
  }
  return gradient, {**one[1], **other[1], **both}


def merge(stacked: Metrics) -> Metrics:
  """Merge figures along their leading axis, each by its own rule."""

  def reduce_figure(figure: Any) -> Any:
    rule = jnp.max if isinstance(figure, Max) else jnp.sum
    return type(figure)(*(rule(x, axis=0) for x in figure))

  return {name: reduce_figure(figure) for name, figure in stacked.items()}


def value(figure: Mean | Sum | Max) -> jax.Array:
  """Turn a typed figure into its number; a mean of nothing is 0."""
  if isinstance(figure, Mean):
    total, count = promoted(*figure)
    return total / jnp.where(count == 0, 1, count)
  return figure[0]


def finish(metrics: Metrics) -> dict[str, float]:
  """Turn typed figures into numbers, once, on the host."""
  with np.errstate(all='ignore'):
    return {k: _number(figure) for k, figure in jax.device_get(metrics).items()}


def _number(figure: Any) -> float:
  """`value` without the device, which may be busy with the next step."""
  first, *rest = (
    x if x.dtype == np.float64 else x.astype(np.float32)
    for x in map(np.asarray, figure)
  )
  return float(first / np.where(rest[0] == 0, 1, rest[0]) if rest else first)


def _per_step(figure: Any) -> Any:
  """A sum over micro-batches is one figure of this step."""
  if isinstance(figure, Sum):
    return Mean(figure.total, jnp.ones_like(figure.total))
  return figure


def _widen(tree: Any) -> Any:
  return jax.tree.map(lambda x: promoted(x)[0], tree)
