"""The benchmark of the losses: what it covers, and that it compares equals."""

import numpy as np
import pytest

from benchmarks import losses as program
from benchmarks.formulas import NO_LOSS, ROWS, inputs
from postrain import losses


def test_every_loss_has_a_row_or_the_reason_why_not():
  assert sorted([*ROWS, *NO_LOSS]) == sorted(losses.__all__)


def test_every_row_finds_its_inputs():
  x = inputs(4, 8, 5)
  assert not [
    k for row in ROWS.values() for k in row.inputs.split() if k not in x
  ]


def test_sides_that_differ_are_refused():
  right = np.float32(2.0), (np.ones(3, np.float32),)
  program.agree('dpo', 'torch', right, right)
  for value, gradient in ((2.01, 1.0), (2.0, 1.01)):
    wrong = np.float32(value), (np.full(3, gradient, np.float32),)
    with pytest.raises(ValueError, match='dpo: torch gives'):
      program.agree('dpo', 'torch', wrong, right)


def test_memory_of_pytorch_is_what_lives_beside_the_results():
  torch = pytest.importorskip('torch')
  x = torch.zeros(2**18, requires_grad=True)  # 1 MiB, as is what exp keeps

  def run():
    loss = x.exp().sum()
    return loss.detach(), torch.autograd.grad(loss, [x])

  assert program.torch_memory(run) == pytest.approx(1, abs=0.01)
