"""Number types that the mathematics accepts and the precision it works in."""

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Shaped

# A hyperparameter: a Python number, or an array of one element, traced too, so
# that ablations can be vmapped.
Scalar = float | int | Float[Array, '']


def promoted(*arrays: Shaped[Array, '...']) -> tuple[Array, ...]:
  """Casts arrays to their common float type, float32 at the least.

  bfloat16 becomes float32 and float64 stays float64: sums of thousands of
  log-probs need the digits, and nothing is ever cast down.
  """
  with jax.numpy_dtype_promotion('standard'):
    # Of their types, for a weakly typed float64 array would give way.
    dtype = jnp.result_type(jnp.float32, *(array.dtype for array in arrays))
  return tuple(array.astype(dtype) for array in arrays)
