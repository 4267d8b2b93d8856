"""Balance of a mixture of experts."""

import numpy as np


def expert_shares(experts, mask, *, num_experts):
  counts = np.zeros(num_experts)
  for i, t in np.ndindex(mask.shape):
    if mask[i, t]:
      for expert in experts[i, t]:
        counts[expert] += 1
  return counts / max(counts.sum(), 1)


def load_balance(router_logits, experts, mask, shares=None):
  num_experts = router_logits.shape[-1]
  values, peak = np.zeros(mask.shape), np.zeros(mask.shape)
  for i, t in np.ndindex(mask.shape):
    if mask[i, t]:
      own = expert_shares(
        experts[i : i + 1], mask[i : i + 1], num_experts=num_experts
      )
      f = own if shares is None else shares
      odds = np.exp(router_logits[i, t])
      values[i, t] = num_experts * np.sum(f * odds) / odds.sum()
      peak[i, t] = num_experts * f.max()
  return values, {'peak_load': peak}
