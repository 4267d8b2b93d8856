"""Losses of imitation, per token."""

from jax import Array
from jax.lax import stop_gradient
import jax.numpy as jnp
from jaxtyping import Bool, Float

from postrain.dtypes import promoted

__all__ = ['negative_log_likelihood']

Losses = tuple[Float[Array, 'B T'], dict[str, Float[Array, 'B T']]]


def negative_log_likelihood(
  logprobs: Float[Array, 'B T'], mask: Bool[Array, 'B T']
) -> Losses:
  """Cross-entropy of the tokens to imitate.

      ℓ_t = −log π(y_t)

  Pre-training masks nothing but padding; supervised fine-tuning also masks the
  prompt. With `token_mean` it is the mean over all tokens of the minibatch.

  Args:
    logprobs: of the given tokens; the gradient flows here.
    mask: tokens to imitate.

  Returns:
    Values and the metric 'probability' of the token, 0 off the mask.

  References:
    Ouyang et al., 2022, Training Language Models to Follow Instructions with
    Human Feedback, arXiv:2203.02155.
  """
  (logprobs,) = promoted(logprobs)
  logprobs = jnp.where(mask, logprobs, 0)
  probability = jnp.where(mask, jnp.exp(stop_gradient(logprobs)), 0)
  return -logprobs, {'probability': probability}
