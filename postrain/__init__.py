"""Reinforcement learning on large language models as pure JAX functions.

Import the part you need; this package itself imports nothing heavy:

  postrain.losses, .kl, .advantages, .aggregation   mathematics on arrays
  postrain.sampling, .scoring, .objectives          models meet mathematics
  postrain.trainer, .device_loop                    assembled runs
"""

__version__ = '0.1.0'
