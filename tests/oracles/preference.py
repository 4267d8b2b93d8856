"""Losses of pairs and of single completions."""

import numpy as np


def sigma(x):
  return 1 / (1 + np.exp(-x))


def logistic(x):
  """−log σ(x)."""
  return np.log(1 + np.exp(-x))


def rewards_of(logprobs, ref_logprobs, beta):
  pairs = zip(logprobs, ref_logprobs, strict=True)
  return np.array([beta * (a - b) for a, b in pairs])


def pair_metrics(won, lost, chosen):
  margin = [a - b for a, b in zip(won, lost, strict=True)]
  return {
    'chosen_reward': np.array(won),
    'rejected_reward': np.array(lost),
    'margin': np.array(margin),
    'accuracy': np.array([float(m > 0) for m in margin]),
    'chosen_logprob': np.array(chosen),
  }


def over_pairs(formula, chosen, rejected, ref_chosen, ref_rejected, beta):
  """``formula(x, y)`` of the two rewards of each pair."""
  won = rewards_of(chosen, ref_chosen, beta)
  lost = rewards_of(rejected, ref_rejected, beta)
  values = [formula(x, y) for x, y in zip(won, lost, strict=True)]
  return np.array(values), pair_metrics(won, lost, chosen)


def averages(logprobs, lengths):
  pairs = zip(logprobs, lengths, strict=True)
  return np.array([a / max(n, 1) for a, n in pairs])


def reward_of(u, beta, divergence, alpha, limit):
  if divergence in ('forward_kl', 'alpha_divergence') and limit is not None:
    u = min(max(u, -limit), limit)
  if divergence == 'reverse_kl':
    return beta * u
  if divergence == 'forward_kl':
    return beta * (1 - np.exp(-u))
  if divergence == 'jensen_shannon':
    t = np.exp(u)
    return beta * np.log(2 * t / (1 + t))
  return beta * (np.exp((alpha - 1) * u) - 1) / (alpha - 1)


def implicit_reward(
  logprobs,
  ref_logprobs,
  *,
  beta=0.1,
  divergence='reverse_kl',
  alpha=0.5,
  max_log_ratio=20.0,
):
  pairs = zip(logprobs, ref_logprobs, strict=True)
  return np.array(
    [reward_of(a - b, beta, divergence, alpha, max_log_ratio) for a, b in pairs]
  )


def robust_dpo(*arrays, beta=0.1, label_smoothing=0.1):
  e = label_smoothing

  def formula(x, y):
    kept, flipped = logistic(x - y), logistic(y - x)
    return ((1 - e) * kept - e * flipped) / (1 - 2 * e)

  return over_pairs(formula, *arrays, beta)


def f_dpo(
  chosen,
  rejected,
  ref_chosen,
  ref_rejected,
  *,
  beta=0.1,
  divergence='jensen_shannon',
  alpha=0.5,
  label_smoothing=0.0,
  max_log_ratio=20.0,
):
  options = dict(beta=beta, divergence=divergence, alpha=alpha)
  options['max_log_ratio'] = max_log_ratio
  won = implicit_reward(chosen, ref_chosen, **options)
  lost = implicit_reward(rejected, ref_rejected, **options)
  values = [
    (1 - label_smoothing) * logistic(x - y) + label_smoothing * logistic(y - x)
    for x, y in zip(won, lost, strict=True)
  ]
  return np.array(values), pair_metrics(won, lost, chosen)


def ipo(*arrays, beta=0.1):
  def formula(x, y):
    return ((x - y) / beta - 1 / (2 * beta)) ** 2

  return over_pairs(formula, *arrays, beta)


def per_token_arrays(chosen, rejected, ref_chosen, ref_rejected, long, short):
  return (
    averages(chosen, long),
    averages(rejected, short),
    averages(ref_chosen, long),
    averages(ref_rejected, short),
  )


def length_normalized_ipo(*arrays, beta=0.1):
  return ipo(*per_token_arrays(*arrays), beta=beta)


def length_normalized_dpo(*arrays, beta=5.0, label_smoothing=0.0):
  def formula(x, y):
    right, flipped = logistic(x - y), logistic(y - x)
    return (1 - label_smoothing) * right + label_smoothing * flipped

  return over_pairs(formula, *per_token_arrays(*arrays), beta)


def hinge(*arrays, beta=0.1):
  return over_pairs(lambda x, y: max(0.0, 1 - (x - y)), *arrays, beta)


def exo_pair(*arrays, beta=0.1, label_smoothing=1e-3):
  def formula(x, y):
    q = sigma(x - y)
    right = q * np.log(q / (1 - label_smoothing))
    return right + (1 - q) * np.log((1 - q) / label_smoothing)

  return over_pairs(formula, *arrays, beta)


def discopop(*arrays, beta=0.1, temperature=0.05):
  def formula(x, y):
    s = sigma((x - y) / temperature)
    return (1 - s) * logistic(x - y) + s * np.exp(-(x - y))

  return over_pairs(formula, *arrays, beta)


def aot(
  chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0
):
  won = rewards_of(chosen, ref_chosen, beta)
  lost = rewards_of(rejected, ref_rejected, beta)
  gaps = [a - b for a, b in zip(chosen, rejected, strict=True)]
  ordered = sorted(a - b for a, b in zip(ref_chosen, ref_rejected, strict=True))
  values = []
  for gap in gaps:
    below = sum(other < gap for other in gaps)
    h = beta * (gap - ordered[below])
    right, flipped = logistic(h), logistic(-h)
    values.append((1 - label_smoothing) * right + label_smoothing * flipped)
  return np.array(values), pair_metrics(won, lost, chosen)


def apo_zero(*arrays, beta=0.1):
  return over_pairs(lambda x, y: 1 - sigma(x) + sigma(y), *arrays, beta)


def apo_down(*arrays, beta=0.1):
  return over_pairs(lambda x, y: sigma(x) + 1 - sigma(x - y), *arrays, beta)


def bco_pair(*arrays, beta=0.1, shift=0.0):
  def formula(x, y):
    return logistic(x - shift) + logistic(-(y - shift))

  return over_pairs(formula, *arrays, beta)


def nca_pair(*arrays, beta=0.1):
  def formula(x, y):
    return logistic(x) + logistic(-x) / 2 + logistic(-y) / 2

  return over_pairs(formula, *arrays, beta)


def sppo_hard(*arrays, beta=0.1):
  def formula(x, y):
    target = 1 / (2 * beta)
    return (x / beta - target) ** 2 + (y / beta + target) ** 2

  return over_pairs(formula, *arrays, beta)


def simpo(chosen, rejected, long, short, *, beta=2.0, gamma=1.0):
  won, lost = beta * averages(chosen, long), beta * averages(rejected, short)
  values = [logistic(x - y - gamma) for x, y in zip(won, lost, strict=True)]
  return np.array(values), pair_metrics(won, lost, chosen)


def orpo(chosen, rejected, long, short, *, coef=0.1):
  def odds(p):
    p = min(p, -1e-6)
    return np.log(np.exp(p) / (1 - np.exp(p)))

  likelihood = averages(chosen, long)
  won = [odds(p) for p in likelihood]
  lost = [odds(p) for p in averages(rejected, short)]
  penalty = [logistic(x - y) for x, y in zip(won, lost, strict=True)]
  values = [coef * a - p for a, p in zip(penalty, likelihood, strict=True)]
  metrics = pair_metrics(won, lost, chosen)
  return np.array(values), metrics | {'odds_ratio_loss': np.array(penalty)}


def cpo(chosen, rejected, *, beta=0.1, nll_coef=1.0):
  values = [
    logistic(beta * (a - b)) - (nll_coef or 0) * a
    for a, b in zip(chosen, rejected, strict=True)
  ]
  won = [beta * a for a in chosen]
  lost = [beta * b for b in rejected]
  return np.array(values), pair_metrics(won, lost, chosen)


def kto(
  logprobs,
  ref_logprobs,
  desirable,
  reference_point,
  *,
  beta=0.1,
  desirable_weight=1.0,
  undesirable_weight=1.0,
):
  values, rewards, margins = [], [], []
  for a, b, good in zip(logprobs, ref_logprobs, desirable, strict=True):
    u = a - b
    margin = (
      beta * (u - reference_point) if good else beta * (reference_point - u)
    )
    weight = desirable_weight if good else undesirable_weight
    values.append(weight * (1 - sigma(margin)))
    rewards.append(beta * u)
    margins.append(margin)
  return np.array(values), {
    'reward': np.array(rewards),
    'margin': np.array(margins),
    'accuracy': np.array([float(m > 0) for m in margins]),
  }


def kto_reference_point(logprobs, ref_logprobs, where=None):
  if where is not None:
    logprobs, ref_logprobs = logprobs[where], ref_logprobs[where]
  total = sum(a - b for a, b in zip(logprobs, ref_logprobs, strict=True))
  return np.asarray(max(0.0, total / len(logprobs)))
