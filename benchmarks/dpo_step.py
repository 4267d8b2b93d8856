"""A step of DPO: scores of the reference, then an update on pairs.

  python benchmarks/dpo_step.py --shapes=tiny,small --micro_batches=4

On one thread. Arithmetic is that of the matrices: a forward for the reference
and three for the gradient.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from benchmarks.peers import alone

if __name__ == '__main__':
  alone.main(
    'dpo',
    __doc__,
    tokens=lambda shape: (
      2 * shape.num_pairs * (shape.prompt_length + shape.completion_length)
    ),
    flops=lambda shape: 4 * alone.passed(shape, 2 * shape.num_pairs),
  )
