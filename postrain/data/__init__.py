"""Examples from files, their order, and their arrays.

Nothing here has a state: which examples an iteration uses is a pure function
of (seed, iteration), so a restarted run goes on where it was.
"""

from postrain.data.buckets import bucket, bucket_sizes
from postrain.data.demonstrations import (
  Demonstrations,
  encode_conversations,
  encode_demonstrations,
)
from postrain.data.jsonl import read_jsonl
from postrain.data.order import indices
from postrain.data.prompts import encode_prompts

__all__ = [
  'Demonstrations',
  'bucket',
  'bucket_sizes',
  'encode_conversations',
  'encode_demonstrations',
  'encode_prompts',
  'indices',
  'read_jsonl',
]
