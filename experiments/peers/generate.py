"""Losses and gradients of other trainers under their own defaults.

  python experiments/peers/generate.py tests/reference/presets.json

For an environment of its own with trl 1.16.0, verl 0.9.1 and google-tunix
0.1.7: their functions are called, not rewritten, on one rollout of two groups
with an empty row. `tests/test_presets.py` holds `configs/presets.py` against
the file. TRL computes advantages inside a method that also samples, so those
two lines stand here. Tunix works in float32.
"""

import argparse
from collections.abc import Callable
import importlib.metadata
import json
import os
import pathlib
import sys
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', '..'))

import numpy as np
import torch

from experiments.peers.stand_ins import grpo_trainer, verl_config

GROUPS, SAMPLES, LENGTH = 2, 4, 6
KL_COEF = 0.05
GSPO = dict(low=3e-4, high=4e-4)


def draw() -> dict[str, np.ndarray]:
  """One rollout; ratios on both sides of every bound, one above 20."""
  rng = np.random.default_rng(7)
  rows = GROUPS * SAMPLES
  lengths = np.array([6, 3, 1, 5, 4, 0, 6, 2])
  logprobs = -2 * rng.random((rows, LENGTH)) - 0.05
  old = logprobs + 0.3 * rng.standard_normal((rows, LENGTH))
  old[0, :4] = logprobs[0, :4] + [1.5, -1.5, 0.24, -0.24]
  old[3, :4] = logprobs[3, :4] + [1.5, -1.5, -2.5, 0.24]
  ref = logprobs + 0.4 * rng.standard_normal((rows, LENGTH))
  rewards = np.array([1, 0, 0, 1, 0.5, 0.25, -2, 3])
  return dict(
    logprobs=logprobs.round(6),
    old_logprobs=old.round(6),
    ref_logprobs=ref.round(6),
    mask=np.arange(LENGTH) < lengths[:, None],
    rewards=rewards,
  )


def differentiated(
  fn: Callable[[torch.Tensor], torch.Tensor], x: dict[str, torch.Tensor]
) -> dict[str, Any]:
  logprobs = x['logprobs'].clone().requires_grad_()
  loss = fn(logprobs)
  loss.backward()
  gradient = np.where(x['mask'].numpy(), logprobs.grad.numpy(), 0)
  return {'loss': float(loss), 'gradient': gradient.tolist()}


# TRL.


def trl_advantages(rewards: torch.Tensor, scale: bool) -> torch.Tensor:
  from trl.trainer.utils import nanstd

  grouped = rewards.view(GROUPS, SAMPLES)
  centered = grouped - grouped.nanmean(dim=1, keepdim=True)
  if scale:
    centered = centered / (nanstd(grouped, dim=1)[:, None] + 1e-4)
  return centered.reshape(-1)


def trl(
  x: dict[str, torch.Tensor], scale: bool = True, **changes: Any
) -> dict[str, Any]:
  from trl import GRPOTrainer

  inputs = trl_inputs(x) | {
    'advantages': trl_advantages(x['rewards'], scale),
    'num_items_in_batch': x['mask'].sum(),
  }
  return trl_loss(GRPOTrainer, inputs, x, **changes)


def trl_rloo(x: dict[str, torch.Tensor]) -> dict[str, Any]:
  from trl import RLOOTrainer

  gap = torch.where(x['mask'], x['old_logprobs'] - x['ref_logprobs'], 0.0)
  shaped = (x['rewards'] - KL_COEF * gap.sum(-1)).view(GROUPS, SAMPLES)
  others = (shaped.sum(1, keepdim=True) - shaped) / (SAMPLES - 1)
  advantages = (shaped - others).reshape(-1)
  inputs = trl_inputs(x) | {'advantages': advantages}
  found = trl_loss(RLOOTrainer, inputs, x)
  # An empty row adds −A to its mean, a constant without a gradient.
  empty = ~x['mask'].any(-1)
  found['loss'] += float(advantages[empty].sum() / len(empty))
  return found


def trl_inputs(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  rows = len(x['rewards'])
  blank = torch.zeros((rows, 1), dtype=torch.long)
  return {
    'prompt_ids': blank,
    'prompt_mask': blank + 1,
    'completion_ids': torch.zeros((rows, LENGTH), dtype=torch.long),
    'completion_mask': x['mask'].long(),
    'old_per_token_logps': x['old_logprobs'],
    'old_logps': torch.where(x['mask'], x['old_logprobs'], 0.0).sum(-1),
  }


def trl_loss(
  kind: Any, inputs: dict, x: dict[str, torch.Tensor], **changes: Any
) -> dict[str, Any]:
  def fn(logprobs: torch.Tensor) -> torch.Tensor:
    trainer = grpo_trainer(LENGTH, **changes)
    entropies = torch.zeros_like(logprobs)
    scored = (logprobs, entropies, None)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: scored
    return kind._compute_loss(trainer, None, inputs)

  return differentiated(fn, x)


# verl.


def verl(
  x: dict[str, torch.Tensor],
  estimator: str = 'grpo',
  loss: str = 'vanilla',
  mode: str = 'token-mean',
  scale: bool = True,
  **changes: Any,
) -> dict[str, Any]:
  from verl.trainer.ppo import core_algos

  mask = x['mask'].double()
  last = (mask.sum(-1).long() - 1).clamp(min=0)
  token_rewards = torch.zeros_like(mask)
  token_rewards[torch.arange(len(last)), last] = x['rewards']
  options = {'norm_adv_by_std_in_grpo': scale} if estimator == 'grpo' else {}
  advantages, _ = core_algos.get_adv_estimator_fn(estimator)(
    token_level_rewards=token_rewards,
    response_mask=mask,
    index=np.repeat(np.arange(GROUPS), SAMPLES),
    **options,
  )
  config = verl_config(**changes)

  def fn(logprobs: torch.Tensor) -> torch.Tensor:
    return core_algos.get_policy_loss_fn(loss)(
      old_log_prob=x['old_logprobs'],
      log_prob=logprobs,
      advantages=advantages,
      response_mask=mask,
      loss_agg_mode=mode,
      config=config,
    )[0]

  return differentiated(fn, x)


# Tunix.


def tunix(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp
  from tunix.rl import algo_core
  from tunix.rl.grpo.grpo_learner import GRPOConfig

  advantages = algo_core.compute_advantages(arrays['rewards'], SAMPLES)
  rows = arrays['mask'].shape
  example = SimpleNamespace(
    prompt_ids=None,
    completion_ids=jnp.zeros(rows, jnp.int32),
    completion_mask=jnp.asarray(arrays['mask'], jnp.int32),
    advantages=jnp.asarray(advantages),
    old_per_token_logps=jnp.asarray(arrays['old_logprobs']),
    ref_per_token_logps=jnp.asarray(arrays['ref_logprobs']),
  )
  config = GRPOConfig(num_generations=SAMPLES)
  config.temperature = 1.0  # set by its learner, read by a function put aside
  algo_core.nnx = SimpleNamespace(split=lambda model: (None, None))

  def fn(logprobs: Any) -> Any:
    scored = (logprobs, jnp.zeros((*rows, 2)))
    algo_core.common.compute_per_token_logps = lambda *_, **__: scored
    return algo_core.grpo_loss_fn(None, example, config, 0, 1)[0]

  loss, gradient = jax.value_and_grad(fn)(jnp.asarray(arrays['logprobs']))
  gradient = np.where(arrays['mask'], gradient, 0)
  return {'loss': float(loss), 'gradient': gradient.tolist()}


def cases(x: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
  norm = 'seq-mean-token-sum-norm'
  wide = dict(clip_ratio_high=0.28)
  sequence = dict(
    importance_sampling_level='sequence',
    epsilon_low=GSPO['low'],
    epsilon_high=GSPO['high'],
  )
  gspo = dict(clip_ratio_low=GSPO['low'], clip_ratio_high=GSPO['high'])
  return {
    'grpo/trl': trl(x),
    'grpo/verl': verl(x),
    'dr_grpo/trl': trl(x, scale=False, loss_type='dr_grpo'),
    'dr_grpo/verl': verl(x, scale=False, mode=norm),
    'dapo/trl': trl(x, epsilon_high=0.28),
    'dapo/verl': verl(x, clip_ratio_c=10.0, **wide),
    'rloo/trl': trl_rloo(x),
    'rloo/verl': verl(x, estimator='rloo'),
    'gspo/trl': trl(x, **sequence),
    'gspo/verl': verl(x, loss='gspo', **gspo),
    'cispo/trl': trl(x, loss_type='cispo', epsilon_high=5.0),
    'cispo/verl': verl(x, loss='cispo', clip_ratio_low=10.0),
    'sapo/trl': trl(x, loss_type='sapo'),
    'sapo/verl': verl(x, loss='sapo'),
    'dppo/verl': verl(x, loss='dppo_tv', clip_ratio_c=20.0),
    'opo/verl': verl(x, estimator='opo'),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('file', type=pathlib.Path)
  file = parser.parse_args().file
  arrays = draw()
  x = {k: torch.as_tensor(v) for k, v in arrays.items()}
  found = cases(x) | {'grpo/tunix': tunix(arrays)}
  versions = {
    name: importlib.metadata.version(name)
    for name in ('trl', 'verl', 'google-tunix', 'torch')
  }
  inputs = {k: v.tolist() for k, v in arrays.items()}
  file.parent.mkdir(parents=True, exist_ok=True)
  written = dict(versions=versions, inputs=inputs, cases=found)
  file.write_text(json.dumps(written) + '\n')
  print(f'{file}: {len(found)} cases')


if __name__ == '__main__':
  main()
