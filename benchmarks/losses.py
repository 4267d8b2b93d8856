"""Time and memory of losses, value and gradient, beside PyTorch.

  python benchmarks/losses.py

The main losses at [256, 2048] in float32 (distillation at [64, 32, 512],
preferences at [65536]): jitted; the same function not jitted, which is how a
loss is naively called; and a straightforward PyTorch formula, where PyTorch is
installed, eager and compiled (where a C++ compiler works). The sides take
turns; times are medians. Ratios are over the jitted time: above 1 the jitted
side is faster. Memory is what the jitted program needs beside its arguments;
that of PyTorch is not measured.
"""

import argparse
from collections.abc import Callable
import os
import sys
import time
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

import jax
import numpy as np

from postrain import losses

try:
  import torch
except ImportError:
  torch: Any = None


def inputs(rows: int, length: int, vocab: int) -> dict[str, np.ndarray]:
  """Arrays by name; those of distillation are [rows / 4, 32, vocab]."""
  draw = np.random.default_rng(0)

  def noise(*shape: int) -> np.ndarray:
    return draw.standard_normal(shape).astype(np.float32)

  shape = rows, length
  logprobs = -np.abs(noise(*shape))
  return dict(
    logprobs=logprobs,
    old_logprobs=logprobs + 0.1 * noise(*shape),
    advantages=noise(*shape),
    mask=draw.random(shape) < 0.8,
    values=noise(*shape),
    old_values=noise(*shape),
    returns=noise(*shape),
    chosen=noise(rows * 256),
    rejected=noise(rows * 256),
    ref_chosen=noise(rows * 256),
    ref_rejected=noise(rows * 256),
    logits=noise(rows // 4, 32, vocab),
    teacher_logits=noise(rows // 4, 32, vocab),
  )


# PyTorch formulas, as trainers write them.


def torch_ratio(p: Any, q: Any, m: Any) -> Any:
  return torch.exp(torch.clamp(p - q, -20, 20))


def torch_surrogate(r: Any, a: Any, m: Any, low: float, high: float) -> Any:
  clipped = torch.clamp(r, 1 - low, 1 + high)
  return -torch.min(r * a, clipped * a) * m


def torch_gspo(p: Any, q: Any, a: Any, m: Any) -> Any:
  mean = ((p - q) * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True)
  return torch_surrogate(torch.exp(mean), a, m, 3e-4, 4e-4)


def torch_cispo(p: Any, q: Any, a: Any, m: Any) -> Any:
  return -torch.clamp(torch_ratio(p, q, m), max=5.0).detach() * a * p * m


def torch_sapo(p: Any, q: Any, a: Any, m: Any) -> Any:
  tau = torch.where(a > 0, 1.0, 1.05)
  soft = torch.sigmoid(tau * (torch_ratio(p, q, m) - 1)) * 4 / tau
  return -soft * a * m


def torch_clipped_value(v: Any, old: Any, r: Any, m: Any) -> Any:
  clipped = old + torch.clamp(v - old, -0.2, 0.2)
  return torch.max((v - r) ** 2, (clipped - r) ** 2) / 2 * m


def torch_margin(c: Any, r: Any, rc: Any, rr: Any) -> Any:
  return (c - rc) - (r - rr)


def torch_divergence(a: Any, b: Any) -> Any:
  a, b = a.log_softmax(-1), b.log_softmax(-1)
  return (a.exp() * (a - b)).sum(-1)


POLICY = ('logprobs', 'old_logprobs', 'advantages', 'mask')
PAIR = ('chosen', 'rejected', 'ref_chosen', 'ref_rejected')
LOGITS = ('logits', 'teacher_logits')
FORMULAS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
  'reinforce': (POLICY, lambda p, q, a, m: -a * p * m),
  'ppo_clip': (
    POLICY,
    lambda p, q, a, m: torch_surrogate(torch_ratio(p, q, m), a, m, 0.2, 0.2),
  ),
  'gspo': (POLICY, torch_gspo),
  'cispo': (POLICY, torch_cispo),
  'sapo': (POLICY, torch_sapo),
  'clipped_squared_error': (
    ('values', 'old_values', 'returns', 'mask'),
    torch_clipped_value,
  ),
  'negative_log_likelihood': (('logprobs', 'mask'), lambda p, m: -p * m),
  'dpo': (
    PAIR,
    lambda *x: -torch.nn.functional.logsigmoid(0.1 * torch_margin(*x)),
  ),
  'ipo': (PAIR, lambda *x: (torch_margin(*x) - 1 / 0.2) ** 2),
  'hinge': (PAIR, lambda *x: torch.relu(1 - 0.1 * torch_margin(*x))),
  'forward_kl': (LOGITS, lambda s, t: torch_divergence(t, s)),
  'reverse_kl': (LOGITS, lambda s, t: torch_divergence(s, t)),
}


def jax_side(name: str) -> Callable[..., Any]:
  fn = getattr(losses, name)

  def total(*arrays: Any) -> Any:
    out = fn(*arrays)
    return (out[0] if isinstance(out, tuple) else out).sum()

  return jax.value_and_grad(total)


def torch_side(formula: Callable, arrays: list[np.ndarray], how: str) -> Any:
  tensors = [torch.as_tensor(x) for x in arrays]
  tensors = [t.float() if t.dtype == torch.bool else t for t in tensors]
  first = tensors[0].requires_grad_()
  total = lambda *x: formula(*x).sum()  # noqa: E731
  if how == 'compiled':
    torch.compiler.reset()  # each loss is a program of its own
    total = torch.compile(total)

  def run() -> Any:
    loss = total(*tensors)
    return loss, torch.autograd.grad(loss, first)

  run()
  return run


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> dict:
  times: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(rounds):
    for name, run in sides.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return {name: 1e3 * float(np.median(t)) for name, t in times.items()}


def measure(
  name: str, x: dict[str, np.ndarray], rounds: int, hows: list
) -> str:
  names, formula = FORMULAS[name]
  host = [x[k] for k in names]
  arrays = [jax.device_put(v) for v in host]
  fn = jax_side(name)
  compiled = jax.jit(fn).lower(*arrays).compile()
  sides = {'jit': lambda: compiled(*arrays), 'not jitted': lambda: fn(*arrays)}
  sides |= {f'torch {how}': torch_side(formula, host, how) for how in hows}
  for run in sides.values():
    jax.block_until_ready(run())
  times = medians(sides, rounds)
  memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
  cells = [f'`{name}`', f'{times.pop("jit"):.2f} ms', f'{memory:.1f} MiB']
  base = float(cells[1].split()[0])
  cells += [f'{t:.2f} ms (x {t / max(base, 1e-9):.1f})' for t in times.values()]
  return '| ' + ' | '.join(cells) + ' |'


def torch_hows() -> list[str]:
  """The ways in which PyTorch runs here."""
  if torch is None:
    print('PyTorch is not installed: its columns are left out')
    return []
  torch.set_num_threads(os.cpu_count() or 1)
  try:
    torch.compile(lambda v: v.sin() + 1)(torch.ones(4))
  except Exception as error:  # whatever a missing compiler raises
    print(f'torch.compile does not work here: {type(error).__name__}')
    return ['eager']
  return ['eager', 'compiled']


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--quick', action='store_true', help='small and few')
  flags = parser.parse_args()
  hows = torch_hows()
  x = inputs(16, 128, 64) if flags.quick else inputs(256, 2048, 512)
  heads = ['loss', 'jit', 'memory', 'not jitted', *(f'torch {h}' for h in hows)]
  print('| ' + ' | '.join(heads) + ' |')
  print('|' + ' --- |' * len(heads))
  for name in FORMULAS:
    print(measure(name, x, 3 if flags.quick else 15, hows), flush=True)


if __name__ == '__main__':
  main()
