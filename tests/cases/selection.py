"""Which tokens and sequences take part."""

import functools

import jax
import oracles

from cases.record import DRAWN, Case, case
from postrain import masks


def with_key(fn):
  """The draw of one key; not an array of the batch, so not an input."""

  def called(*arrays, seed, **options):
    return fn(*arrays, jax.random.key(seed), **options)

  return called


def drawn(**options) -> Case:
  names = ('logprobs', 'old_logprobs', 'advantages', 'mask')
  return Case(
    name='covariance',
    fn=with_key(masks.covariance),
    oracle=with_key(oracles.covariance),
    inputs={k: DRAWN[k] for k in names},
    options=options,
    gradients=(),
    stopped=None,
    decides=True,
    by_place=True,
  )


def cases() -> list[Case]:
  decision = functools.partial(case, decides=True)
  sampler = 'old_logprobs sampler_logprobs mask'
  chosen = 'logprobs advantages mask'
  off_policy = 'logprobs sampler_logprobs advantages mask'
  found = [
    drawn(seed=0, low=0.05),
    drawn(seed=1, low=0.0, fraction=0.3),
    drawn(seed=2, low=-1.0, high=0.4, fraction=0.2, clip_low=0.2),
    drawn(seed=3, low=9.0, fraction=0.5),
    decision(masks.top_covariance, chosen),
    decision(masks.top_covariance, chosen, fraction=0.4),
    decision(masks.top_entropy, 'entropy mask'),
    decision(masks.top_entropy, 'entropy mask', fraction=0.55),
    decision(masks.off_policy_sequences, off_policy, threshold=0.05),
    decision(masks.unsolved, 'rewards where'),
    decision(masks.unsolved, 'rewards where', level='group', threshold=0.8),
    decision(masks.unsolved, 'rewards', level='group', threshold=0.8),
  ]
  for level in ('token', 'sum', 'mean', 'max'):
    options = {'level': level, 'high': 0.3}
    found += [
      decision(masks.matched, sampler, estimator='k1', low=-0.2, **options),
      decision(masks.matched, sampler, estimator='k2', **options),
      decision(masks.matched, sampler, **options),
    ]
  return found
