"""Objectives: a model, choices of losses, and terms under their own weights.

An objective is a sum of terms; a term is coefficient x sum(weights x values),
so that it is additive over units and nothing depends on how a batch is cut.

Where ``batch.arrays`` holds ``experts`` [B T L K], tokens visit those: the
routing of another pass is replayed, with live gates, so that the gradient
reaches the routers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from postrain.batches import call_by_name
from postrain.dtypes import promoted
from postrain.logprobs import token_entropy, token_logprobs
from postrain.losses import load_balance
from postrain.scoring import (
  map_logits,
  rerouted,
  routed_states,
  selected,
)
from postrain.soft_labels import mean_over_labels
from postrain.types import (
  Batch,
  Max,
  Mean,
  Metrics,
  Model,
  Objective,
  Params,
  Scalar,
  Sum,
)
from postrain.values import token_values


def masked_mean(values: Array, mask: Array) -> Mean:
  """Mean over the mask, in the making."""
  (values,) = promoted(values)
  return Mean(jnp.where(mask, values, 0).sum(), mask.sum(dtype=jnp.float32))


def sampler_gap(plain: Array, sampled: Array, mask: Array) -> Metrics:
  """How far the learner's log-probs of the plain model are from the sampler's.

  Both at temperature 1 and without filters.
  """
  gap = jnp.where(mask, jnp.abs(plain - sampled), 0)
  return {
    'sampler/logprob_gap_max': Max(gap.max()),
    'sampler/logprob_gap': masked_mean(gap, mask),
  }


def policy_gradient(
  model: Model,
  *,
  loss: Callable,
  kl: Callable | None = None,
  kl_coef: Scalar | None = None,
  entropy_coef: Scalar | None = None,
  value_loss: Callable | None = None,
  value_coef: Scalar | None = None,
  critic: Model | None = None,
  trunk: Callable[[Array], Array] | None = None,
  balance_coef: Scalar | None = None,
  temperature: Scalar = 1.0,
  chunk_size: int = 128,
) -> Objective:
  """The objective of policy-gradient methods.

  Σ w_policy·loss + kl_coef Σ w_kl·kl − entropy_coef Σ w_entropy·H
  + value_coef Σ w_value·value_loss + balance_coef Σ w_balance·load_balance. A
  coefficient of None removes its term from the graph.

  Args:
    model: of the role ``actor``.
    loss: of `postrain.losses`: (arrays by name) -> (values, metrics).
    kl: estimator of `postrain.kl` in (logprobs, ref_logprobs).
    kl_coef: coefficient of KL in the loss.
    entropy_coef: coefficient of the entropy bonus.
    value_loss: of `postrain.losses`.
    value_coef: its coefficient.
    critic: of the role ``critic``; its unembed gives one value.
    trunk: what it reads of the actor's states, for a critic that shares them;
      None for one that has a trunk of its own.
    balance_coef: coefficient of `postrain.losses.load_balance`, the mean over
      layers, for a mixture of experts. Shares of the load are those of
      `postrain.couplings.with_expert_shares` if the batch has them, else those
      of each sequence.
    temperature: at which the policy was sampled.
    chunk_size: time positions whose logits exist at once.

  Returns:
    objective(params, frozen, batch) -> (scalar, metrics).
  """
  if value_coef is not None and (critic is None or value_loss is None):
    raise ValueError(
      f'value_coef={value_coef} needs a critic and a value_loss: give both, or'
      ' value_coef=None'
    )

  def objective(
    params: dict[str, Params], frozen: dict[str, Params], batch: Batch
  ) -> tuple[Array, Metrics]:
    del frozen
    mask, weights = batch.mask, batch.weights
    (logprobs, entropy, plain), hidden, routing = _policy_figures(
      model,
      params['actor'],
      batch,
      temperature,
      chunk_size,
      entropy_coef is not None,
      balance_coef is not None or 'experts' in batch.arrays,
    )
    old = jax.lax.stop_gradient(logprobs)  # where none was scored before
    arrays = {'old_logprobs': old, **batch.arrays}
    arrays |= {'mask': mask, 'logprobs': logprobs}
    values, figures = call_by_name(loss, arrays)
    total = jnp.sum(weights['policy'] * values)
    metrics: Metrics = {'loss/policy': Sum(jax.lax.stop_gradient(total))}
    metrics |= {f'policy/{k}': masked_mean(v, mask) for k, v in figures.items()}
    metrics['policy/entropy'] = masked_mean(
      jax.lax.stop_gradient(entropy), mask
    )
    metrics |= _since_rollout(batch, old, plain)
    if entropy_coef is not None:
      bonus = jnp.sum(weights['entropy'] * jnp.where(mask, entropy, 0))
      total -= entropy_coef * bonus
    if kl is not None and kl_coef is not None:
      divergence = jnp.where(mask, call_by_name(kl, arrays), 0)
      total += kl_coef * jnp.sum(weights['kl'] * divergence)
      metrics['policy/kl_loss'] = masked_mean(divergence, mask)
    if value_coef is not None:
      term, value_metrics = _value_term(
        critic, params['critic'], batch, value_loss, chunk_size,
        None if trunk is None else trunk(hidden),
      )  # fmt: skip
      total += value_coef * term
      metrics |= value_metrics
    if 'experts' in batch.arrays:
      moved = rerouted(routing['experts'], selected(routing))
      metrics['policy/rerouted'] = masked_mean(moved, batch.valid)
    if balance_coef is not None:
      term, figures = _balance_term(batch, routing)
      total += balance_coef * term
      metrics |= figures
    metrics['loss'] = Sum(jax.lax.stop_gradient(total))
    return total, metrics

  return objective


def supervised(
  model: Model,
  *,
  loss: Callable,
  balance_coef: Scalar | None = None,
  chunk_size: int = 128,
) -> Objective:
  """The objective of supervised fine-tuning: Σ w_policy·loss(logprobs).

  With ``balance_coef`` also that of `policy_gradient`'s load balance.
  """

  def objective(
    params: dict[str, Params], frozen: dict[str, Params], batch: Batch
  ) -> tuple[Array, Metrics]:
    del frozen
    (logprobs, *_), _, routing = _policy_figures(
      model, params['actor'], batch, 1.0, chunk_size, False,
      balance_coef is not None,
    )  # fmt: skip
    arrays = {**batch.arrays, 'mask': batch.mask, 'logprobs': logprobs}
    values, figures = call_by_name(loss, arrays)
    total = jnp.sum(batch.weights['policy'] * values)
    metrics: Metrics = {
      f'sft/{k}': masked_mean(v, batch.mask) for k, v in figures.items()
    }
    if balance_coef is not None:
      term, figures = _balance_term(batch, routing)
      total += balance_coef * term
      metrics |= figures
    metrics['loss'] = Sum(jax.lax.stop_gradient(total))
    return total, metrics

  return objective


def preference(
  model: Model,
  *,
  loss: Callable,
  sft_coef: Scalar | None = None,
  chunk_size: int = 128,
) -> Objective:
  """The objective of direct preference methods on pairs.

  Σ w_preference·loss − sft_coef Σ w_sft·log π, the second without its term if
  the coefficient is None. Rows stand in units of two: chosen, rejected.
  ``batch.arrays`` holds ``ref_logprobs`` [B T] where the loss asks for
  references, and may hold soft labels, ``preference`` [B]: see
  `postrain.soft_labels`. The weights are those of
  `postrain.batches.weigh_units`.
  """

  def objective(
    params: dict[str, Params], frozen: dict[str, Params], batch: Batch
  ) -> tuple[Array, Metrics]:
    del frozen
    (logprobs, *_), *_ = _policy_figures(
      model, params['actor'], batch, 1.0, chunk_size, False
    )
    values, figures = mean_over_labels(loss, pair_arrays(logprobs, batch))
    weights = batch.weights['preference'].reshape(-1, 2)[:, 0]
    total = jnp.sum(weights * values)
    if sft_coef is not None:
      total -= sft_coef * jnp.sum(batch.weights['sft'] * logprobs)
    metrics: Metrics = {'loss': Sum(jax.lax.stop_gradient(total))}
    full = batch.mask.any(-1).reshape(-1, 2).any(-1)
    metrics |= {
      f'preference/{k}': masked_mean(v, full) for k, v in figures.items()
    }
    return total, metrics

  return objective


def pair_arrays(
  logprobs: Float[Array, 'B T'], batch: Batch
) -> dict[str, Array]:
  """What losses of pairs ask for: sums of log-probs, and lengths."""
  lengths = batch.mask.sum(-1).reshape(-1, 2)
  arrays = _pair_sums('', logprobs, batch.mask) | {
    'chosen_lengths': lengths[:, 0],
    'rejected_lengths': lengths[:, 1],
  }
  if 'ref_logprobs' in batch.arrays:
    arrays |= _pair_sums('ref_', batch.arrays['ref_logprobs'], batch.mask)
  if batch.arrays.get('preference') is not None:
    arrays['preference'] = batch.arrays['preference'][::2]
  return arrays


def unpaired(
  model: Model, *, loss: Callable, chunk_size: int = 128
) -> Objective:
  """The objective of methods on single completions, known good or bad.

  Σ w_preference·loss. ``batch.arrays`` holds ``desirable`` [B],
  ``ref_logprobs`` [B T] and, one for all, the ``reference_point`` [B] of
  `postrain.couplings.with_reference_point`.
  """

  def objective(
    params: dict[str, Params], frozen: dict[str, Params], batch: Batch
  ) -> tuple[Array, Metrics]:
    del frozen
    (logprobs, *_), *_ = _policy_figures(
      model, params['actor'], batch, 1.0, chunk_size, False
    )
    names = {'logprobs': logprobs, 'ref_logprobs': batch.arrays['ref_logprobs']}
    arrays = {k: jnp.where(batch.mask, v, 0).sum(-1) for k, v in names.items()}
    arrays['reference_point'] = batch.arrays['reference_point'][0]
    values, figures = call_by_name(loss, {**batch.arrays, **arrays})
    total = jnp.sum(batch.weights['preference'] * values)
    metrics: Metrics = {'loss': Sum(jax.lax.stop_gradient(total))}
    full = batch.mask.any(-1)
    metrics |= {
      f'preference/{k}': masked_mean(v, full) for k, v in figures.items()
    }
    return total, metrics

  return objective


def _pair_sums(prefix: str, logprobs: Array, mask: Array) -> dict[str, Array]:
  sums = jnp.where(mask, logprobs, 0).sum(-1).reshape(-1, 2)
  return {f'{prefix}chosen': sums[:, 0], f'{prefix}rejected': sums[:, 1]}


def _policy_figures(
  model: Model, params: Params, batch: Batch, temperature: Any,
  chunk_size: int, entropy_gradient: bool, record: bool = False,
) -> tuple[tuple[Array, Array, Array], Array, dict[str, Array]]:  # fmt: skip
  """Log-probs, entropy and plain log-probs, states and routing, in one pass.

  The plain ones are without gradient and at temperature 1.
  """
  hidden, routing = routed_states(
    model, params, batch.tokens, batch.valid, batch.mask, batch.packing,
    experts=batch.arrays.get('experts'), record=record,
  )  # fmt: skip

  same = isinstance(temperature, int | float) and temperature == 1

  def figures(logits: Array, tokens: Array) -> tuple[Array, Array, Array]:
    logprobs = token_logprobs(logits, tokens, temperature=temperature)
    fixed = jax.lax.stop_gradient(logits)
    plain = jax.lax.stop_gradient(logprobs)
    if not same and 'plain_logprobs' in batch.arrays:
      plain = token_logprobs(fixed, tokens)
    logits = logits if entropy_gradient else fixed
    entropy = token_entropy(logits, temperature=temperature)
    return logprobs, entropy, plain

  found = map_logits(
    figures, model, params, hidden, batch.tokens, chunk_size=chunk_size,
    packing=batch.packing,
  )  # fmt: skip
  return found, hidden, routing


def _since_rollout(batch: Batch, logprobs: Array, plain: Array) -> Metrics:
  """How far the policy is from that of the rollout, or from the sampler's."""
  metrics, arrays = {}, batch.arrays
  if 'old_logprobs' in arrays:
    k1 = arrays['old_logprobs'] - logprobs
    metrics['policy/old_k1'] = masked_mean(k1, batch.mask)
  if 'plain_logprobs' in arrays:
    metrics |= sampler_gap(plain, arrays['plain_logprobs'], batch.mask)
  return metrics


def _balance_term(
  batch: Batch, routing: dict[str, Array]
) -> tuple[Array, Metrics]:
  """Σ w_balance · load_balance, the mean over layers."""
  shares = batch.arrays.get('expert_shares')
  each_layer = jax.vmap(load_balance, in_axes=(2, 2, None, 0))
  values, figures = jax.tree.map(
    lambda x: jnp.mean(x, axis=0),
    each_layer(
      routing['router_logits'], routing['experts'], batch.valid,
      None if shares is None else shares[0],
    ),
  )  # fmt: skip
  metrics: Metrics = {
    f'balance/{k}': masked_mean(jax.lax.stop_gradient(v), batch.valid)
    for k, v in {'loss': values, **figures}.items()
  }
  return jnp.sum(batch.weights['balance'] * values), metrics


def _value_term(
  critic: Any, params: Params, batch: Batch, value_loss: Any,
  chunk_size: int, states: Array | None,
) -> tuple[Array, Metrics]:  # fmt: skip
  values = token_values(
    critic, params, batch.tokens, batch.valid, batch.mask, batch.packing,
    chunk_size=chunk_size, states=states,
  )  # fmt: skip
  arrays = {**batch.arrays, 'mask': batch.mask, 'values': values}
  losses, figures = call_by_name(value_loss, arrays)
  total = jnp.sum(batch.weights['value'] * losses)
  metrics: Metrics = {'loss/value': Sum(jax.lax.stop_gradient(total))}
  return total, metrics | {
    f'value/{k}': masked_mean(v, batch.mask) for k, v in figures.items()
  }
