"""A tabular autoregressive policy whose sequences are all enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, LENGTH = 3, 2
SEQUENCES = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)))
MASK = jnp.ones(SEQUENCES.shape, bool)


def random_policy(seed: int):
  """One row of logits for each prefix of each length."""
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.standard_normal((VOCAB**t, VOCAB))) for t in range(LENGTH)
  ]


def rewards(seed: int = 9):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(VOCAB**LENGTH))


def logits(policy):
  """Of each sequence at each position [N T V]."""
  prefix, rows = np.zeros(len(SEQUENCES), int), []
  for t in range(LENGTH):
    rows.append(policy[t][prefix])
    prefix = prefix * VOCAB + SEQUENCES[:, t]
  return jnp.stack(rows, axis=1)


def logprobs(policy):
  """Of each sequence's tokens [N T]."""
  logp = jax.nn.log_softmax(logits(policy))
  return jnp.take_along_axis(logp, SEQUENCES[..., None], axis=-1)[..., 0]


def probabilities(policy):
  return jnp.exp(jnp.sum(logprobs(policy), axis=1))


def expected_gradient(loss, policy):
  """E over the policy's sequences of the gradient of ``loss(logprobs)`` [N T].

  The sampling distribution is held fixed, as when a loss is minimised.
  """
  fixed = jax.lax.stop_gradient(probabilities(policy))
  return jax.grad(
    lambda p: jnp.sum(fixed * jnp.sum(loss(logprobs(p)), axis=1))
  )(policy)


def divergence(policy, ref):
  """KL of whole sequences."""
  delta = jnp.sum(logprobs(policy) - logprobs(ref), axis=1)
  return jnp.sum(probabilities(policy) * delta)


def tilted(ref, rewards, beta):
  """π* ∝ ref e^(r / β) of all sequences, and log Z."""
  scores = jnp.log(probabilities(ref)) + rewards / beta
  return jax.nn.softmax(scores), jax.nn.logsumexp(scores)


def of_probabilities(chance):
  """The policy under which the sequences have these probabilities."""
  return [
    jnp.log(jnp.sum(chance.reshape(VOCAB**t, VOCAB, -1), axis=-1))
    for t in range(LENGTH)
  ]


def gap(tree, other) -> float:
  """Largest absolute difference."""
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
