"""Losses: unreduced values and metrics of the same shape.

A term of an objective is ``sum(weights * values)`` with the weights of
`postrain.aggregation`. Losses minimise, and stop the gradient where their
paper stops it. One topic, one file; all names are re-exported here.
"""

from postrain.losses.policy import cispo, gspo, gspo_token, ppo_clip, reinforce
from postrain.losses.preference import dpo
from postrain.losses.supervised import negative_log_likelihood
from postrain.losses.value import clipped_squared_error, squared_error

__all__ = [
  'cispo',
  'clipped_squared_error',
  'dpo',
  'gspo',
  'gspo_token',
  'negative_log_likelihood',
  'ppo_clip',
  'reinforce',
  'squared_error',
]
