"""Losses: unreduced values and metrics of the same shape.

A term of an objective is ``sum(weights * values)`` with the weights of
`postrain.aggregation`. Losses minimise, and stop the gradient where their
paper stops it. One topic, one file; all names are re-exported here.
"""

from postrain.losses.policy import (
  cispo,
  gspo,
  gspo_token,
  ppo_clip,
  reinforce,
  sequence_clip,
)
from postrain.losses.preference import dpo
from postrain.losses.soft_clip import geometric_mean, sapo, vespo
from postrain.losses.supervised import negative_log_likelihood
from postrain.losses.trust_region import (
  dppo,
  dro,
  kl_cov,
  minirl,
  mirror_descent,
)
from postrain.losses.value import clipped_squared_error, squared_error

__all__ = [
  'cispo',
  'clipped_squared_error',
  'dpo',
  'dppo',
  'dro',
  'geometric_mean',
  'gspo',
  'gspo_token',
  'kl_cov',
  'minirl',
  'mirror_descent',
  'negative_log_likelihood',
  'ppo_clip',
  'reinforce',
  'sapo',
  'sequence_clip',
  'squared_error',
  'vespo',
]
