"""The toy sort loop in PyTorch: `configs/sort_reproduction.py`, vectorised.

The peer of `benchmarks/device_loop.py`. All four positions are one product,
there is no Python loop over sequences or tokens, and what is constant over the
epochs is computed once.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMES = ('embedding', 'encoder', 'decoder', 'kernel', 'bias')


def logits(params: dict[str, Any], prompts: Any, num_samples: int) -> Any:
  """[B 4 10] of prompts [P 4]; the samples of a prompt share its state."""
  x = params['embedding'][prompts]
  h = torch.einsum('bld,lde->be', x, params['encoder'])
  h = h.repeat_interleave(num_samples, 0)
  z = torch.einsum('be,led->bld', h, params['decoder'])
  return z @ params['kernel'] + params['bias']


def reward(prompts: Any, completions: Any) -> Any:
  """How many prompt tokens are present, and how many pairs are in order."""
  present = (prompts[:, :, None] == completions[:, None]).any(-1)
  ordered = completions[:, :-1] <= completions[:, 1:]
  return (present.sum(-1) + ordered.sum(-1)).float()


def chosen(scores: Any, tokens: Any) -> Any:
  return scores.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def loss(
  params: dict[str, Any], prompts: Any, tokens: Any, old: Any, ref: Any,
  advantages: Any, config: Any,
) -> tuple[Any, Any]:  # fmt: skip
  """PPO's clip and k3 to the reference, and the entropy that is logged."""
  scores = logits(params, prompts, config.sampling.num_samples)
  scores = scores.log_softmax(-1)
  logp = scores.gather(-1, tokens[..., None])[..., 0]
  ratio = torch.exp(logp - old)
  low, high = 1 - config.loss.clip_low, 1 + config.loss.clip_high
  gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
  gap = ref - logp
  k3 = torch.expm1(gap) - gap
  entropy = -(scores.exp() * scores).sum(-1).mean().detach()
  penalty = config.kl.loss_coef * k3.sum(-1).mean()
  return penalty - gain.mean(-1).mean(), entropy


class Loop:
  """One run; ``how`` is eager or compiled."""

  def __init__(self, config: Any, how: str = 'eager') -> None:
    self.config = config
    wrap: Callable = torch.compile if how == 'compiled' else lambda fn: fn
    self.loss, self.logits, self.chosen, self.reward = map(
      wrap, (loss, logits, chosen, reward)
    )

  def start(self, params: dict[str, Any]) -> None:
    self.params = {
      k: torch.tensor(params[k], requires_grad=True) for k in NAMES
    }
    self.optimizer = torch.optim.Adam(
      [*self.params.values()],
      lr=self.config.rl.optimizer.learning_rate,
      fused=True,
    )
    self.reference = {k: v.detach().clone() for k, v in self.params.items()}

  def sample(self) -> tuple[Any, Any]:
    choices = self.config
    prompts = torch.randint(10, (choices.rl.num_prompts, 4))
    with torch.no_grad():
      scores = self.logits(self.params, prompts, 1)
      scores = scores.repeat_interleave(choices.sampling.num_samples, 0)
      tokens = (scores + gumbel_like(scores)).argmax(-1)
    return prompts, tokens

  def learn(self, prompts: Any, tokens: Any) -> Any:
    config = self.config
    num_samples = config.sampling.num_samples
    with torch.no_grad():
      repeated = prompts.repeat_interleave(num_samples, 0)
      rewards = self.reward(repeated, tokens)
      groups = rewards.view(-1, num_samples)
      advantages = (groups - groups.mean(-1, keepdim=True)).view(-1, 1)
      old, ref = (
        self.chosen(self.logits(p, prompts, num_samples), tokens)
        for p in (self.params, self.reference)
      )
    for _ in range(config.rl.num_epochs):
      value, _entropy = self.loss(
        self.params, prompts, tokens, old, ref, advantages, config
      )
      self.optimizer.zero_grad()
      value.backward()
      self.optimizer.step()
    return rewards.mean()

  def run(self, iterations: int) -> list[float]:
    rewards = []
    for iteration in range(iterations):
      rewards.append(self.learn(*self.sample()))
      if (iteration + 1) % self.config.reference.every == 0:
        self.reference = {k: v.detach().clone() for k, v in self.params.items()}
    return [float(x) for x in rewards]


def gumbel_like(x: Any) -> Any:
  return -torch.empty_like(x).exponential_().log()
