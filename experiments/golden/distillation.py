"""Distillation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.golden.common import (
  Arrays,
  differentiated,
)
from postrain import aggregation, logprobs, losses


def mean(values: jax.Array, mask: jax.Array) -> Arrays:
  weights = aggregation.token_mean(mask)
  return {'loss': jnp.sum(weights * values), 'per_token': values}


def divergence(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  """All of the vocabulary, or the student's top candidates."""
  beta = hyper.get('beta', hyper.get('alpha'))

  def fn(x):
    args = (x['student_logits'], x['teacher_logits'])
    options = {'temperature': hyper.get('temperature', 1.0)}
    if 'k' in hyper:
      tail = '_tail_' in case['name']
      args = losses.top_candidates(*args, k=hyper['k'], tail=tail)
    return mean(losses.generalized_jsd(*args, beta=beta, **options), x['mask'])

  return differentiated(fn, x, 'student_logits')


def sampled(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  def fn(x):
    own, teacher = (
      logprobs.token_logprobs(x[f'{name}_logits'], x['token_ids'])
      for name in ('student', 'teacher')
    )
    found = losses.sampled_reverse_kl(
      own, teacher, x['mask'], max_log_ratio=None
    )
    return mean(found[0], x['mask'])

  return differentiated(fn, x, 'student_logits')


def chunked(case: Arrays, hyper: Arrays, x: Arrays) -> Arrays:
  """From hidden states, two positions at a time."""
  temperature = hyper['temperature']

  def fn(x):
    def figures(logits, teacher_hidden):
      teacher_logits = teacher_hidden @ x['teacher_head'].T
      options = {'beta': hyper['beta'], 'temperature': temperature}
      return (
        losses.generalized_jsd(logits, teacher_logits, **options),
        logprobs.token_entropy(logits, temperature=temperature),
      )

    values, entropy = logprobs.map_time_chunks(
      figures,
      lambda hidden: hidden @ x['student_head'].T,
      x['student_hidden'],
      x['teacher_hidden'],
      chunk_size=2,
    )
    total = jnp.sum(jnp.where(x['mask'], entropy, 0))
    return mean(values, x['mask']) | {'entropy_sum': total}

  return differentiated(fn, x, 'student_hidden', 'student_head')


def handler(case: Arrays) -> Callable | None:
  if case['category'] != 'distillation':
    return None
  if 'chunked' in case['name']:
    return chunked
  return sampled if 'sampled' in case['name'] else divergence
