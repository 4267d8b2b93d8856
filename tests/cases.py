"""One or more calls of every public function of the mathematics.

The contract test runs each through all that a loss, estimator or advantage
must withstand.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracles

from postrain import (
  advantages,
  aggregation,
  importance,
  kl,
  logprobs,
  losses,
  masks,
)

MODULES = (
  advantages,
  aggregation,
  importance,
  kl,
  logprobs,
  losses,
  masks,
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A call: float64 inputs in order, and which of them are differentiated.

  ``stopped`` names the input whose copy the oracle holds fixed where the
  library stops the gradient.
  """

  name: str
  fn: Callable[..., Any]
  oracle: Callable[..., Any]
  inputs: dict[str, np.ndarray]
  options: dict[str, Any]
  gradients: tuple[str, ...]
  stopped: str | None

  def __str__(self) -> str:
    options = ','.join(f'{k}={v}' for k, v in self.options.items())
    return f'{self.name}({options})'


def draw() -> dict[str, np.ndarray]:
  """Inputs by the names of the vocabulary: gaps, an empty row, large ratios."""
  rng = np.random.default_rng(0)
  rows, length, vocab = 5, 6, 7
  mask = rng.random((rows, length)) < 0.7
  mask[0] = [False, True, True, False, True, True]
  mask[1] = False
  mask[2] = [False, False, True, False, False, False]
  logprobs = -2 * rng.random((rows, length)) - 0.05
  old = logprobs + 0.4 * rng.standard_normal((rows, length))
  old[3, 1:] = logprobs[3, 1:] + [3.0, -3.0, 1.5, -1.5, 25.0]
  where = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
  rewards = np.array([[1, 0, 0, 1], [0.5, 9, -2, 0.5], [3, 0.7, 4, 5]])
  kept = np.array([np.sort(rng.permutation(vocab)[:4]) for _ in range(30)])
  kept[::3, 3:] = -1
  kept[7] = -1
  tokens = kept[:, 1].copy()
  tokens[7] = 2

  def noise(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape)

  return {
    'logprobs': logprobs,
    'old_logprobs': old,
    'ref_logprobs': logprobs + 0.5 * noise(rows, length),
    'sampler_logprobs': logprobs + 0.8 * noise(rows, length),
    'advantages': noise(rows, length),
    'token_rewards': noise(rows, length),
    'values': noise(rows, length),
    'old_values': noise(rows, length),
    'returns': noise(rows, length),
    'weights': np.exp(noise(rows, length)),
    'mask': mask,
    'truncated': np.array([True, False, True, False, False]),
    'groups': np.array([4, 7, 4, 9, 9]),
    'bootstrap': noise(rows),
    'rewards': np.concatenate([rewards, noise(1, 4)]),
    'where': where.astype(bool),
    'logits': noise(rows, length, vocab),
    'ref_logits': noise(rows, length, vocab),
    'tokens': tokens.reshape(rows, length),
    'kept': kept.reshape(rows, length, 4),
    'hidden': noise(rows, length, 3),
    'unembedding': noise(3, vocab),
    'estimate': noise(rows, length),
    'gradient': noise(rows, length),
    'chosen': noise(rows),
    'rejected': noise(rows),
    'ref_chosen': noise(rows),
    'ref_rejected': noise(rows),
  }


DRAWN = draw()


def case(fn, names, *, gradients='', stopped=None, rename=None, **options):
  inputs = {}
  for name in names.split():
    inputs[(rename or {}).get(name, name)] = DRAWN[name]
  return Case(
    name=fn.__name__,
    fn=fn,
    oracle=getattr(oracles, fn.__name__),
    inputs=inputs,
    options=options,
    gradients=tuple(gradients.split()),
    stopped=stopped,
  )


def chunked_logprobs(hidden, unembedding, tokens, *, chunk_size):
  return logprobs.map_time_chunks(
    logprobs.token_logprobs,
    lambda h: jnp.einsum('btd,dv->btv', h, unembedding),
    hidden,
    tokens,
    chunk_size=chunk_size,
  )


def whole_logprobs(hidden, unembedding, tokens, *, chunk_size):
  return oracles.map_time_chunks(
    oracles.token_logprobs,
    lambda h: h @ unembedding,
    hidden,
    tokens,
    chunk_size=chunk_size,
  )


def cases() -> list[Case]:
  policy = 'logprobs old_logprobs advantages mask'
  sampler = 'old_logprobs sampler_logprobs mask'
  group = 'rewards where'
  tokens = {'token_rewards': 'rewards'}
  found = []

  for fn in (kl.k1, kl.k2, kl.k3, kl.absolute, importance.log_ratio):
    found += [
      case(fn, 'logprobs ref_logprobs mask', gradients='logprobs'),
      case(fn, 'logprobs ref_logprobs', gradients='logprobs'),
      case(
        fn,
        'logprobs ref_logprobs mask',
        gradients='logprobs',
        max_log_ratio=0.4,
      ),
    ]
  found += [
    case(importance.limit_hits, 'logprobs old_logprobs mask'),
    case(importance.limit_hits, 'logprobs old_logprobs', max_log_ratio=None),
    case(kl.exact, 'logits ref_logits', gradients='logits'),
    case(
      kl.straight_through,
      'gradient estimate',
      rename={'gradient': 'value', 'estimate': 'gradient'},
      gradients='gradient',
      stopped='gradient',
    ),
    case(
      kl.importance_weighted,
      'estimate logprobs old_logprobs mask',
      gradients='estimate logprobs',
    ),
  ]

  for fn in (importance.ratio, importance.sequence_ratio):
    for limit in (20.0, 0.5, None):
      found.append(
        case(
          fn,
          'logprobs old_logprobs mask',
          gradients='logprobs',
          max_log_ratio=limit,
        )
      )
  found += [
    case(
      importance.sequence_log_ratio,
      'logprobs old_logprobs mask',
      gradients='logprobs',
    ),
    case(importance.mismatch_metrics, sampler),
    case(importance.mismatch_metrics, sampler, max_log_ratio=0.7),
    case(importance.effective_sample_size, 'weights mask'),
  ]
  for level in ('token', 'sequence', 'geometric'):
    found += [
      case(importance.truncated, sampler, cap=1.3, level=level),
      case(importance.masked, sampler, low=0.7, high=1.8, level=level),
    ]

  for singleton in ('zero', 'raw'):
    found += [
      case(advantages.group_centered, group, singleton=singleton),
      case(advantages.group_normalized, group, ddof=1, singleton=singleton),
      case(advantages.leave_one_out, group, singleton=singleton),
    ]
  found += [
    case(advantages.group_normalized, 'rewards', eps=1e-4),
    case(advantages.group_centered, 'rewards'),
    case(advantages.leave_one_out, 'rewards'),
    case(advantages.max_only, group),
    case(advantages.max_only, 'rewards'),
    case(
      advantages.discounted_returns,
      'token_rewards mask',
      rename=tokens,
      discount=0.9,
    ),
    case(advantages.whiten, 'advantages mask'),
    case(advantages.whiten, 'advantages mask', keep_mean=True, ddof=0),
  ]
  for fn in (advantages.gae, advantages.lambda_returns):
    found += [
      case(fn, 'token_rewards values mask', rename=tokens),
      case(
        fn,
        'token_rewards values mask bootstrap',
        rename=tokens,
        discount=0.9,
        lambda_=0.7,
      ),
    ]

  found += [
    case(aggregation.token_mean, 'mask'),
    case(aggregation.constant_length, 'mask', length=8),
    case(aggregation.constant_length, 'mask', length=8.0, count_empty=True),
    case(aggregation.group_token_mean, 'mask groups'),
    case(aggregation.group_token_mean, 'mask groups', count_empty=True),
    case(masks.overlong, 'mask truncated'),
    case(masks.informative_groups, group),
    case(masks.informative_groups, group, low=0.0, high=0.6),
  ]
  for fn in (aggregation.sequence_mean, aggregation.sequence_sum):
    found += [case(fn, 'mask'), case(fn, 'mask', count_empty=True)]

  for temperature in (1.0, 0.7):
    found += [
      case(
        logprobs.token_logprobs,
        'logits tokens',
        gradients='logits',
        temperature=temperature,
      ),
      case(
        logprobs.token_entropy,
        'logits',
        gradients='logits',
        temperature=temperature,
      ),
      case(
        logprobs.kept_token_logprobs,
        'logits tokens kept',
        gradients='logits',
        temperature=temperature,
      ),
    ]
  for chunk_size in (1, 4, 64):
    found.append(
      Case(
        name='map_time_chunks',
        fn=chunked_logprobs,
        oracle=whole_logprobs,
        inputs={k: DRAWN[k] for k in ('hidden', 'unembedding', 'tokens')},
        options={'chunk_size': chunk_size},
        gradients=('hidden', 'unembedding'),
        stopped=None,
      )
    )

  for options in ({}, {'clip_high': 0.28, 'dual_clip': 3.0}):
    found.append(case(losses.ppo_clip, policy, gradients='logprobs', **options))
  for options in ({}, {'clip_low': 0.3, 'clip_high': 0.2}):
    found.append(
      case(
        losses.cispo,
        policy,
        gradients='logprobs',
        stopped='logprobs',
        **options,
      )
    )
  for options in ({}, {'clip_low': 0.1, 'clip_high': 0.2}):
    found += [
      case(losses.gspo, policy, gradients='logprobs', **options),
      case(
        losses.gspo_token,
        policy,
        gradients='logprobs',
        stopped='logprobs',
        **options,
      ),
    ]
  limit = {'max_log_ratio': 0.3}
  found += [
    case(losses.reinforce, policy, gradients='logprobs'),
    case(losses.ppo_clip, policy, gradients='logprobs', **limit),
    case(losses.gspo, policy, gradients='logprobs', **limit),
    case(
      losses.gspo_token,
      policy,
      gradients='logprobs',
      stopped='logprobs',
      **limit,
    ),
    case(losses.squared_error, 'values returns mask', gradients='values'),
    case(
      losses.clipped_squared_error,
      'values old_values returns mask',
      gradients='values',
    ),
    case(losses.negative_log_likelihood, 'logprobs mask', gradients='logprobs'),
  ]
  for smoothing in (0.0, 0.1):
    found.append(
      case(
        losses.dpo,
        'chosen rejected ref_chosen ref_rejected',
        gradients='chosen rejected',
        label_smoothing=smoothing,
      )
    )
  return found
