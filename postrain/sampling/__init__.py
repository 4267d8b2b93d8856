"""Completions from a model: prefill, decode loop, filters."""

from postrain.sampling.filters import draw, kept_candidates
from postrain.sampling.sampler import sample, sequence_keys

__all__ = ['draw', 'kept_candidates', 'sample', 'sequence_keys']
