"""Log-probs and entropy from logits."""

import jax.numpy as jnp
import oracles

from cases.record import DRAWN, Case, case
from postrain import logprobs


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
  found = []

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
  return found
