"""Who counts how much: masks become weights; a loss is Σ weights · values.

Compute the weights on the whole optimiser minibatch, before it is cut into
micro-batches or shards; then accumulation is a plain sum and the update does
not depend on the cut. All weights are 0 off the mask, and a batch without any
token gives 0, never NaN.

What peers disagree on is a choice here. Rows without a token change nothing,
unless ``count_empty`` says that they count in the denominator. Tokens that are
counted but not trained (filtered, rejected) keep their share of it:
``jnp.where(trained, token_mean(counted), 0)``; with ``token_mean(trained)`` the
rest takes their share over.
"""

from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.dtypes import Scalar

__all__ = [
  'constant_length',
  'group_token_mean',
  'sequence_mean',
  'sequence_sum',
  'token_mean',
]


def token_mean(mask: Bool[Array, 'B T']) -> Float[Array, 'B T']:
  """Every token of the minibatch counts the same; long responses dominate.

      w_{i,t} = 1 / Σ_j |y_j|

  The DAPO paper normalises within each group (`group_token_mean`), its
  implementations over the batch, as here.

  Args:
    mask: tokens that count.

  Returns:
    Weights that sum to 1.

  References:
    Yu et al., 2025, DAPO, arXiv:2503.14476.
  """
  counted = mask.astype(float)
  return counted / jnp.maximum(jnp.sum(counted), 1)


def sequence_mean(
  mask: Bool[Array, 'B T'], *, count_empty: bool = False
) -> Float[Array, 'B T']:
  """Every sequence counts the same; tokens of long responses count less.

      w_{i,t} = 1 / (N |y_i|)

  The objective of GRPO and GSPO. It favours short right answers and long
  wrong ones.

  Args:
    mask: tokens that count.
    count_empty: whether N counts sequences without a token.

  Returns:
    Weights that sum to 1 where every counted sequence has a token.

  References:
    Shao et al., 2024, DeepSeekMath, arXiv:2402.03300.
  """
  counted = mask.astype(float)
  lengths = jnp.sum(counted, axis=1, keepdims=True)
  return counted / jnp.maximum(lengths, 1) / _num_rows(mask, count_empty)


def sequence_sum(
  mask: Bool[Array, 'B T'], *, count_empty: bool = False
) -> Float[Array, 'B T']:
  """Mean over sequences of sums over tokens: the true policy gradient.

      w_{i,t} = 1 / N

  Args:
    mask: tokens that count.
    count_empty: whether N counts sequences without a token.

  Returns:
    Weights that sum to the mean length.

  References:
    Williams, 1992, Simple Statistical Gradient-Following Algorithms for
    Connectionist Reinforcement Learning.
  """
  return mask.astype(float) / _num_rows(mask, count_empty)


def constant_length(
  mask: Bool[Array, 'B T'], *, length: Scalar, count_empty: bool = False
) -> Float[Array, 'B T']:
  """Sums over tokens divided by a constant: no length bias, tame scale.

      w_{i,t} = 1 / (N C)

  One peer divides by the padded width of the batch when C is not given, so
  that its scale changes from step to step; here it must be given.

  Args:
    mask: tokens that count.
    length: C > 0, most naturally the limit of the completion length.
    count_empty: whether N counts sequences without a token.

  Returns:
    Weights that sum to the mean length over C.

  References:
    Liu et al., 2025, Understanding R1-Zero-Like Training: A Critical
    Perspective (Dr. GRPO), arXiv:2503.20783.
  """
  return sequence_sum(mask, count_empty=count_empty) / length


def group_token_mean(
  mask: Bool[Array, 'B T'],
  groups: Int[Array, ' B'],
  *,
  count_empty: bool = False,
) -> Float[Array, 'B T']:
  """Every group counts the same, and in it every token: DAPO as written.

      w_{i,t} = 1 / (P Σ_{j in the group of i} |y_j|)

  Args:
    mask: tokens that count.
    groups: number of each sequence's group; any ids, in any order.
    count_empty: whether P counts groups without a token.

  Returns:
    Weights that sum to 1 where every counted group has a token.

  References:
    Yu et al., 2025, DAPO, arXiv:2503.14476, equation 8.
  """
  counted = mask.astype(float)
  same = groups[:, None] == groups[None, :]
  lengths = jnp.sum(counted, axis=1, keepdims=True)
  # Lower precisions round lengths above 256 (bfloat16) or 2048 (TF32).
  tokens = jnp.matmul(same.astype(float), lengths, precision='highest')
  present = jnp.any(mask, axis=1) | count_empty
  # A group is counted at the first of its present rows.
  repeated = jnp.any(jnp.tril(same & present[None, :], -1), axis=1)
  num_groups = jnp.sum(present & ~repeated).astype(float)
  return counted / jnp.maximum(tokens, 1) / jnp.maximum(num_groups, 1)


def _num_rows(mask: Array, count_empty: bool) -> Array | float:
  if count_empty:
    return float(mask.shape[0])
  return jnp.maximum(jnp.sum(jnp.any(mask, axis=1)), 1).astype(float)
