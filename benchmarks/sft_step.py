"""A supervised step by the trainer: its arithmetic and memory.

  python benchmarks/sft_step.py --shapes=tiny,small --micro_batches=4

On one thread, logging included. Arithmetic is that of the matrices: three
forwards.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from benchmarks.peers import alone

if __name__ == '__main__':
  alone.main(
    'sft',
    __doc__,
    tokens=lambda shape: (
      shape.num_rows * (shape.prompt_length + shape.completion_length)
    ),
    flops=lambda shape: 3 * alone.passed(shape, shape.num_rows),
  )
