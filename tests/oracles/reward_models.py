"""Reward models of outcomes, rankings and steps."""

import itertools

import numpy as np

from oracles.preference import logistic, pair_metrics, sigma


def score_metrics(chosen, rejected):
  metrics = pair_metrics(chosen, rejected, chosen)
  del metrics['chosen_logprob']
  return metrics


def last_score(scores, mask):
  out = np.zeros(len(mask))
  for i, t in np.ndindex(mask.shape):
    if mask[i, t]:
      out[i] = scores[i, t]
  return out


def bradley_terry(chosen, rejected, margins=None):
  margins = np.zeros(len(chosen)) if margins is None else margins
  triples = zip(chosen, rejected, margins, strict=True)
  values = [logistic(a - b - m) for a, b, m in triples]
  return np.array(values), score_metrics(chosen, rejected)


def score_centering(chosen, rejected):
  pairs = list(zip(chosen, rejected, strict=True))
  return np.array([(a + b) ** 2 for a, b in pairs]), {
    'mean_reward': np.array([(a + b) / 2 for a, b in pairs])
  }


def soft_preference(chosen, rejected, preference):
  values, agrees = [], []
  for a, b, p in zip(chosen, rejected, preference, strict=True):
    values.append(-p * np.log(sigma(a - b)) - (1 - p) * np.log(sigma(b - a)))
    agrees.append(float((a > b and p > 0.5) or (a < b and p < 0.5)))
  metrics = score_metrics(chosen, rejected) | {'accuracy': np.array(agrees)}
  return np.array(values), metrics


def swap_averaged(forward, backward):
  pairs = zip(forward, backward, strict=True)
  return np.array([(a + b) / 2 for a, b in pairs])


def ranked_pairs(rewards, ranks, where=None):
  where = np.ones(rewards.shape, bool) if where is None else where
  values, accuracy = np.zeros(len(rewards)), np.zeros(len(rewards))
  for p in range(len(rewards)):
    shown = [k for k in range(rewards.shape[1]) if where[p, k]]
    pairs = [
      (i, j)
      for i, j in itertools.permutations(shown, 2)
      if ranks[p, i] < ranks[p, j]
    ]
    for i, j in pairs:
      distance = rewards[p, i] - rewards[p, j]
      values[p] += logistic(distance) / len(pairs)
      accuracy[p] += (distance > 0) / len(pairs)
  return values, {'accuracy': accuracy}


def plackett_luce(rewards, ranks, where=None):
  where = np.ones(rewards.shape, bool) if where is None else where
  values, accuracy = np.zeros(len(rewards)), np.zeros(len(rewards))
  for p in range(len(rewards)):
    shown = [k for k in range(rewards.shape[1]) if where[p, k]]
    for i in shown:
      left = [
        np.exp(rewards[p, j]) for j in shown if ranks[p, j] >= ranks[p, i]
      ]
      values[p] -= np.log(np.exp(rewards[p, i]) / sum(left))
    if shown:
      best = min(ranks[p, k] for k in shown)
      highest = max(rewards[p, k] for k in shown)
      accuracy[p] = any(
        ranks[p, k] == best and rewards[p, k] == highest for k in shown
      )
  return values, {'accuracy': accuracy}


def cross_entropy(score, label):
  p = sigma(score)
  return -label * np.log(p) - (1 - label) * np.log(1 - p)


def outcome_correctness(scores, labels):
  pairs = list(zip(scores, labels, strict=True))
  return np.array([cross_entropy(s, c) for s, c in pairs]), {
    'probability': np.array([sigma(s) for s in scores]),
    'accuracy': np.array([float((s > 0) == (c > 0.5)) for s, c in pairs]),
  }


def step_correctness(scores, labels, mask):
  values, accuracy, chance = (np.zeros(mask.shape) for _ in range(3))
  for i, t in np.ndindex(mask.shape):
    if mask[i, t]:
      s, c = scores[i, t], labels[i, t]
      values[i, t] = cross_entropy(s, c)
      chance[i, t] = sigma(s)
      accuracy[i, t] = (s > 0) == (c > 0.5)
  return values, {'probability': chance, 'accuracy': accuracy}


def monte_carlo_labels(correct, *, hard=False):
  out = np.zeros(correct.shape[:2])
  for i, s in np.ndindex(out.shape):
    draws = list(correct[i, s])
    out[i, s] = max(draws) if hard else sum(draws) / len(draws)
  return out


def until_first_error(correct, mask):
  out = np.zeros(mask.shape, bool)
  for i in range(len(mask)):
    for t in range(mask.shape[1]):
      out[i, t] = mask[i, t]
      if mask[i, t] and not correct[i, t]:
        break
  return out


def step_score(scores, mask, *, aggregate='min'):
  out = np.zeros(len(mask))
  for i in range(len(mask)):
    steps = [scores[i, t] for t in range(mask.shape[1]) if mask[i, t]]
    if steps:
      out[i] = {
        'min': min(steps),
        'product': float(np.prod(steps)),
        'sum': sum(steps),
        'mean': sum(steps) / len(steps),
        'last': steps[-1],
      }[aggregate]
  return out
