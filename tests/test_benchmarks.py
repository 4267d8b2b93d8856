"""The benchmarks: what they cover, and that they compare equals."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny import quick_compiler as quick_compiler

from benchmarks import collectives, device_loop, gpu, gpu_shapes
from benchmarks import losses as program
from benchmarks.formulas import NO_LOSS, ROWS, inputs
from configs import sort_reproduction
from postrain import losses

ROOT = pathlib.Path(__file__).parents[1]


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


def test_collectives_are_counted_by_kind():
  text = """
  %a = f32[2] all-reduce(%x), to_apply=%add
  %b = f32[2] all-gather-start(%x)
  %c = f32[2] all-gather-done(%b)
  %all-to-all.1 = f32[2] add(%x, %x)
  """
  assert collectives.count(text) == {'all-reduce': 1, 'all-gather': 1}


@pytest.mark.slow
def test_the_loop_in_pytorch_learns_the_same():
  pytest.importorskip('torch')
  from benchmarks.torch_sort import Loop

  config = sort_reproduction.get_config()
  assert device_loop.agree(config, Loop(config)) < 1e-4


@pytest.fixture
def kept_caches(monkeypatch):
  """Other tests need theirs."""
  monkeypatch.setattr(gpu.jax, 'clear_caches', lambda: None)


SIZES = gpu_shapes.Sizes(4, 2, 2, 6, 5, 4, 1, product=64)


@pytest.mark.slow
def test_a_model_is_measured_on_any_device(tmp_path):
  """In a process of its own: lowering fails under checked signatures."""
  flags = '--shapes=miniature', f'--results={tmp_path}'
  done = subprocess.run(
    [sys.executable, 'benchmarks/gpu.py', *flags],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  result = json.loads((tmp_path / 'gpu-miniature.json').read_text())
  assert 'error' not in str(result)
  assert all(value > 0 for value in result['step_s'].values())
  assert 'update_tok_s' in done.stdout


def test_a_phase_that_fails_leaves_the_others(kept_caches, monkeypatch):
  def fails(*args):
    raise RuntimeError('RESOURCE_EXHAUSTED: 9 GiB\nand a trace')

  for name in ('sampling', 'updating', 'peaks'):
    monkeypatch.setattr(gpu, name, fails)
  result = gpu.measure('tiny', gpu_shapes.MINIATURE['miniature'], SIZES)
  assert '9 GiB' in result['sampling']['error']
  assert result['step_s']['update'] is None
  assert result['step_s']['reference'] > 0


def test_parameters_of_the_shapes_are_those_of_the_models():
  counts = {k: gpu_shapes.num_params(c) for k, c in gpu_shapes.SHAPES.items()}
  assert counts == {
    'qwen2.5-0.5b': 494_032_768,
    'qwen2.5-1.5b': 1_543_714_304,
    'qwen2.5-7b': 7_615_616_512,
  }
