"""Drawn inputs, derivatives and cases, for every part of the generator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Arrays = dict[str, Any]

EXACT = dict(rtol=1e-9, atol=1e-11)
# verl adds 1e-8 to counts and variances; the library does not.
PLUS_1E8 = dict(rtol=2e-7, atol=1e-7)
# The peer rounds to float32 on its way.
FLOAT32 = dict(rtol=5e-6, atol=1e-6)

SEQUENCE_MEAN = 'seq-mean-token-mean'
POLICY = ('logp', 'old_logp', 'advantages', 'mask')
LENGTHS = np.array([6, 3, 1, 5, 4, 2, 6, 2])
ADVANTAGES = np.array([1.25, -0.75, 0.0, 0.5, -1.5, 2.0, -0.25, 1.0])


def case(
  name: str,
  category: str,
  hyper: Arrays,
  inputs: Arrays,
  outputs: Arrays,
  tolerance: dict[str, float] = EXACT,
) -> Arrays:
  return dict(
    name=name,
    category=category,
    peer=name.rsplit('__')[-1],
    hyperparameters=hyper,
    inputs=inputs,
    outputs=outputs,
    tolerance={'f64': tolerance},
  )


def normal(seed: int, *shape: int) -> np.ndarray:
  """Six decimals, so that the text of a number is the number."""
  return np.random.default_rng(seed).standard_normal(shape).round(6)


def rollout(kind: str = 'main') -> Arrays:
  """Eight rows of six tokens, with junk where the mask is False.

  Row 1 (A < 0) lies above the upper clip, row 3 (A > 0) below the lower one;
  rows 0 and 4 have ratios on both sides, also above the dual clip. Of the
  kinds, `empty` blanks a row, `tool` leaves gaps, `on_policy` sets the old
  policy to the current one, and `extreme` has log-ratios of 10 to 25.
  """
  logprobs = (-np.abs(normal(1, 8, 6)) - 0.05).round(6)
  ratios = 0.25 * normal(2, 8, 6)
  ratios[0, :3] = ratios[4, :3] = [1.5, -1.5, 0.1]
  ratios[1], ratios[3] = 0.5 + 0.01 * ratios[1], -0.5 + 0.01 * ratios[3]
  mask = np.arange(6) < LENGTHS[:, None]
  if kind == 'empty':
    mask[5] = False
  elif kind == 'tool':
    mask[0, 2:4] = mask[3, 1] = mask[4, 0] = mask[6, 1:5] = False
  elif kind == 'on_policy':
    ratios[:] = 0
  elif kind == 'extreme':
    ratios[0, :2], ratios[4, :2] = [25, -25], [21, -12]
    ratios[1], ratios[7] = 12, 12.5
  return dict(
    logp=logprobs,
    old_logp=(logprobs - ratios).round(6),
    ref_logp=(logprobs + 0.4 * normal(3, 8, 6)).round(6),
    rollout_logp=(logprobs - ratios + 0.3 * normal(4, 8, 6)).round(6),
    advantages=ADVANTAGES,
    token_advantages=normal(5, 8, 6),
    mask=mask,
  )


def chosen(kind: str, *more: str, per_token: bool = False) -> Arrays:
  x = rollout(kind)
  if per_token:
    x['advantages'] = x['token_advantages']
  return {name: x[name] for name in (*POLICY, *more)}


def tensors(x: Arrays) -> Arrays:
  return {k: torch.as_tensor(v) for k, v in x.items()}


def differentiated(
  fn: Callable[[Arrays], torch.Tensor], x: Arrays, *names: str
) -> Arrays:
  """The loss and its gradient by each named input."""
  x = tensors(x)
  for name in names:
    x[name] = x[name].clone().requires_grad_()
  loss = fn(x)
  found = torch.autograd.grad(loss, [x[name] for name in names])
  grads = {f'grad_{n}': g.numpy() for n, g in zip(names, found, strict=True)}
  return {'loss': loss.item()} | grads


def token_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
  return torch.where(mask.bool(), values, 0.0).sum() / mask.sum()
