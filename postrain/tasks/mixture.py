"""A small mixture of experts, and a sampler whose routers err.

With `postrain.tasks.arithmetic` it is the setting in which sampler and learner
send tokens to different experts, although their parameters are nearly the same.
"""

from typing import Any

import jax
from jaxtyping import Array, Key

from postrain.dtypes import Scalar
from postrain.models.transformer import Config, transformer
from postrain.types import Model, Params


def mixture_policy(
  *,
  vocab_size: int,
  max_length: int,
  num_experts: int = 4,
  experts_per_token: int = 2,
) -> Model:
  """Make two layers of experts, 32 wide.

  Args:
    vocab_size: of the task.
    max_length: slots of a prompt and its completion.
    num_experts: of each layer.
    experts_per_token: that a token visits.
  """
  return transformer(
    Config(
      vocab_size=vocab_size, num_layers=2, model_dim=32, mlp_dim=64,
      num_heads=2, num_kv_heads=2, head_dim=16, max_length=max_length,
      num_experts=num_experts, experts_per_token=experts_per_token,
    )
  )  # fmt: skip


def with_router_noise(
  params: Params, key: Key[Array, ''], *, scale: Scalar
) -> Params:
  """Perturb the routers of a `mixture_policy`, and nothing else.

  w + scale · std(w) · ε, ε normal: router logits then err by about ``scale``
  times their own spread, as those of an engine of its own do.
  """
  layers: Any = params['layers']
  router = layers['router']
  noise = jax.random.normal(key, router.shape, router.dtype)
  noisy = router + scale * router.std() * noise
  return {**params, 'layers': {**layers, 'router': noisy}}
