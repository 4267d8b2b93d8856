"""Completions from a model: prefill, decode loop, filters."""

from postrain.sampling.engine import sample_in_slots
from postrain.sampling.extension import ended, extend
from postrain.sampling.filters import draw, kept_candidates
from postrain.sampling.sampler import sample, sequence_keys

__all__ = [
  'draw',
  'ended',
  'extend',
  'kept_candidates',
  'sample',
  'sample_in_slots',
  'sequence_keys',
]
