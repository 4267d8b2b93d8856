"""Log-probs and entropy from logits."""

import numpy as np


def log_sum_exp(scores):
  top = max(scores)
  return top + np.log(sum(np.exp(z - top) for z in scores))


def token_logprobs(logits, tokens, *, temperature=1.0):
  out = np.zeros(tokens.shape)
  for i in np.ndindex(tokens.shape):
    scores = [z / temperature for z in logits[i]]
    out[i] = scores[tokens[i]] - log_sum_exp(scores)
  return out


def token_entropy(logits, *, temperature=1.0):
  out = np.zeros(logits.shape[:-1])
  for i in np.ndindex(out.shape):
    scores = [z / temperature for z in logits[i]]
    total = log_sum_exp(scores)
    for z in scores:
      if z > -np.inf:
        out[i] -= np.exp(z - total) * (z - total)
  return out


def kept_token_logprobs(logits, tokens, kept, *, temperature=1.0):
  out = np.zeros(tokens.shape)
  for i in np.ndindex(tokens.shape):
    ids = [v for v in kept[i] if v >= 0] or range(logits.shape[-1])
    scores = {v: logits[i][v] / temperature for v in ids}
    if tokens[i] in scores:
      out[i] = scores[tokens[i]] - log_sum_exp(list(scores.values()))
    else:
      out[i] = -np.inf
  return out


def map_time_chunks(fn, unembed, hidden, *arrays, chunk_size):
  return fn(unembed(hidden), *arrays)
