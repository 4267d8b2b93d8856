"""Examples from files, their order, and their arrays.

Nothing here has a state: which examples an iteration uses is a pure function
of (seed, iteration), so a restarted run goes on where it was.
"""

from postrain.data.buckets import bucket, bucket_sizes
from postrain.data.comparisons import (
  Labels,
  Pairs,
  Rankings,
  align_prompts,
  encode_labels,
  encode_pairs,
  encode_rankings,
)
from postrain.data.demonstrations import (
  Demonstrations,
  encode_conversations,
  encode_demonstrations,
)
from postrain.data.jsonl import read_jsonl
from postrain.data.order import indices
from postrain.data.preferences import Preference, preference, read_preferences
from postrain.data.prompts import encode_prompts
from postrain.data.solutions import solution_pairs
from postrain.data.transcripts import read_transcript

__all__ = [
  'Demonstrations',
  'Labels',
  'Pairs',
  'Preference',
  'Rankings',
  'align_prompts',
  'bucket',
  'bucket_sizes',
  'encode_conversations',
  'encode_demonstrations',
  'encode_labels',
  'encode_pairs',
  'encode_prompts',
  'encode_rankings',
  'indices',
  'preference',
  'read_jsonl',
  'read_preferences',
  'read_transcript',
  'solution_pairs',
]
