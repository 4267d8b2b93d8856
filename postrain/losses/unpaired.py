"""Losses of single completions that are known to be good or bad."""

from jax import Array
from jax.lax import stop_gradient
from jax.nn import sigmoid
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.dtypes import Scalar, promoted

__all__ = ['kto', 'kto_reference_point']

Losses = tuple[Float[Array, ' N'], dict[str, Float[Array, ' N']]]


def kto(
  logprobs: Float[Array, ' N'],
  ref_logprobs: Float[Array, ' N'],
  desirable: Bool[Array, ' N'],
  reference_point: Float[Array, ''],
  *,
  beta: Scalar = 0.1,
  desirable_weight: Scalar = 1.0,
  undesirable_weight: Scalar = 1.0,
) -> Losses:
  """Kahneman-Tversky optimisation.

      ℓ = λ_D (1 − σ(β (u − z)))   desirable,   u = log π − log ref
      ℓ = λ_U (1 − σ(β (z − u)))   undesirable

  With n_D and n_U examples of each kind the paper wants λ_D n_D / (λ_U n_U)
  in [1, 4/3].

  Args:
    logprobs: of completions, summed; the gradient flows here.
    ref_logprobs: of the reference, constants.
    desirable: which completions are good.
    reference_point: z of the whole minibatch, a constant; see
      `kto_reference_point`.
    beta: β > 0; it enters once.
    desirable_weight: λ_D > 0.
    undesirable_weight: λ_U > 0.

  Returns:
    Values (λ / 2 at u = z), and metrics: 'reward' β u, 'margin' (β times the
    distance to z, in the wanted direction), 'accuracy' (1 where it is above 0).

  References:
    Ethayarajh et al., 2024, KTO: Model Alignment as Prospect Theoretic
    Optimization, arXiv:2402.01306.
  """
  logprobs, ref_logprobs, reference_point = promoted(
    logprobs, ref_logprobs, reference_point
  )
  reward = beta * (logprobs - stop_gradient(ref_logprobs))
  beyond = reward - beta * stop_gradient(reference_point)
  margin = jnp.where(desirable, beyond, -beyond)
  weights = jnp.where(desirable, desirable_weight, undesirable_weight)
  metrics = {
    'reward': reward,
    'margin': margin,
    'accuracy': (margin > 0).astype(margin.dtype),
  }
  values = weights.astype(margin.dtype) * sigmoid(-margin)
  return values, {k: stop_gradient(v) for k, v in metrics.items()}


def kto_reference_point(
  logprobs: Float[Array, ' N'],
  ref_logprobs: Float[Array, ' N'],
  where: Bool[Array, ' N'] | None = None,
) -> Float[Array, '']:
  """Estimate the divergence that KTO measures rewards against.

      z = max(0, mean(log π(y′|x) − log ref(y′|x)))

  y′ is a completion of another prompt, say of the next in the minibatch: with
  a prompt's own, z would be the mean of the rewards. It is a statistic of the
  whole minibatch; some trainers take it within a device, and so depend on the
  number of devices.

  Args:
    logprobs: of mismatched completions y′, summed.
    ref_logprobs: of the reference.
    where: which examples exist; None for all.

  Returns:
    One constant, at least 0; β is not in it.

  Raises:
    ValueError: fewer than two examples.

  References:
    Ethayarajh et al., 2024, KTO: Model Alignment as Prospect Theoretic
    Optimization, arXiv:2402.01306.
  """
  if len(logprobs) < 2:
    raise ValueError(
      f'{len(logprobs)} examples have no mismatched completions: the reference'
      ' point would be their own reward; use a minibatch of at least 2'
    )
  logprobs, ref_logprobs = promoted(logprobs, ref_logprobs)
  where = jnp.ones(logprobs.shape, bool) if where is None else where
  count = jnp.maximum(jnp.sum(where), 1).astype(logprobs.dtype)
  mean = jnp.sum(jnp.where(where, logprobs - ref_logprobs, 0)) / count
  return stop_gradient(jnp.maximum(mean, 0))
