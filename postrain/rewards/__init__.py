"""Rewards of the host: text in, floats out.

Each function takes ``(completions, examples, *, ...)``, row ``i`` of both being
the same sequence, and returns one float per row. ``__all__`` lists what a
config may name; `postrain.rewards.scores` runs them and checks what they
return. A reward of your own is any function of this signature.
"""

from postrain.rewards.mathematics import (
  accuracy,
  answer_format,
  choice,
  exact_match,
)
from postrain.rewards.text import (
  animal_story,
  contains,
  finished,
  format_tags,
  length_penalty,
  mentions_any,
  names_animal,
  num_tokens,
)

__all__ = [
  'accuracy',
  'animal_story',
  'answer_format',
  'choice',
  'contains',
  'exact_match',
  'finished',
  'format_tags',
  'length_penalty',
  'mentions_any',
  'names_animal',
  'num_tokens',
]
