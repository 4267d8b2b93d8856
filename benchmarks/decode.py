"""Sampling alone: tokens a second, and how much of the machine's arithmetic.

  python benchmarks/decode.py --shapes=tiny,small

By the function that the trainer compiles, on one thread. Arithmetic is that of
the matrices, the prompt run once for its group.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from benchmarks.peers import alone

if __name__ == '__main__':
  alone.main(
    'generate',
    __doc__,
    tokens=lambda shape: shape.num_rows * shape.completion_length,
    flops=alone.sampled,
  )
