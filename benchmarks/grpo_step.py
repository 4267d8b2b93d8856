"""A whole step of GRPO by the trainer: its phases, arithmetic and memory.

  python benchmarks/grpo_step.py --shapes=tiny,small --micro_batches=4

Sampling, a reward in Python, the scores of actor and reference, and one
update, on one thread, logging included. Arithmetic is that of the matrices: the
rollout, a forward for each of the two scores and three for the gradient, as if
every completion were run with a prompt of its own.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from benchmarks.peers import alone

if __name__ == '__main__':
  alone.main(
    'grpo',
    __doc__,
    tokens=lambda shape: shape.num_rows * shape.completion_length,
    flops=lambda shape: (
      alone.sampled(shape) + 5 * alone.passed(shape, shape.num_rows)
    ),
  )
