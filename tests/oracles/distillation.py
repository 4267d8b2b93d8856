"""Losses of distillation."""

import numpy as np

from oracles.losses import over_tokens
from oracles.mismatch import limited


def probabilities(logits, temperature):
  weights = [np.exp(z / temperature) for z in logits]
  return [w / sum(weights) for w in weights]


def divergence(p, q):
  return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def over_positions(formula, logits, teacher_logits, temperature):
  out = np.zeros(logits.shape[:-1])
  for n in np.ndindex(out.shape):
    student = probabilities(logits[n], temperature)
    out[n] = formula(student, probabilities(teacher_logits[n], temperature))
  return out


def forward_kl(logits, teacher_logits, *, temperature=1.0):
  def formula(student, teacher):
    return divergence(teacher, student)

  return over_positions(formula, logits, teacher_logits, temperature)


def reverse_kl(logits, teacher_logits, *, temperature=1.0):
  return over_positions(divergence, logits, teacher_logits, temperature)


def generalized_jsd(logits, teacher_logits, *, beta=0.5, temperature=1.0):
  def formula(student, teacher):
    if beta == 0:
      return divergence(teacher, student)
    if beta == 1:
      return divergence(student, teacher)
    pairs = zip(student, teacher, strict=True)
    mixture = [beta * t + (1 - beta) * s for s, t in pairs]
    outer = beta * divergence(teacher, mixture)
    return outer + (1 - beta) * divergence(student, mixture)

  return over_positions(formula, logits, teacher_logits, temperature)


def top_candidates(
  logits, teacher_logits, *, k=100, tail=True, temperature=1.0
):
  found = []
  for array in (logits, teacher_logits):
    out = np.zeros((*logits.shape[:-1], k + tail))
    for n in np.ndindex(logits.shape[:-1]):
      kept = np.argsort(-logits[n])[:k]
      p = probabilities(array[n], temperature)
      inside = [p[v] for v in kept]
      out[n] = np.log([*inside, 1 - sum(inside)] if tail else inside)
    found.append(out)
  return tuple(found)


def sampled_reverse_kl(
  logprobs, teacher_logprobs, mask, *, max_log_ratio=20.0, stopped=None
):
  stopped = logprobs if stopped is None else stopped

  def excess(i, t):
    return limited(stopped[i, t] - teacher_logprobs[i, t], max_log_ratio)

  values = over_tokens(mask, lambda i, t: excess(i, t) * logprobs[i, t])
  return values, {'kl': over_tokens(mask, excess)}


def annealed_coef(step, *, start=5e-3, decrement=5e-5, end=1e-3):
  return np.array([max(start - decrement * s, end) for s in step])
