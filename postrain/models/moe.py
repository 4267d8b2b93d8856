"""Stub until the real one is merged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Routing(NamedTuple):
  experts: Int[Array, 'N K']
  gates: Float[Array, 'N K']
  logits: Float[Array, 'N E']


def route(logits, *, num_selected, normalize, experts=None):
  probs = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
  _, natural = jax.lax.top_k(probs, num_selected)
  experts = natural if experts is None else jnp.where(experts < 0, natural, experts)
  gates = jnp.take_along_axis(probs, experts, axis=-1)
  if normalize:
    gates /= gates.sum(-1, keepdims=True)
  return Routing(experts, gates, logits)


def experts_mlp(x, routing, gate, up, down, *, activation):
  h = activation(jnp.einsum('nd,edf->nef', x, gate)) * jnp.einsum('nd,edf->nef', x, up)
  out = jnp.einsum('nef,efd->ned', h, down)
  weights = jnp.zeros(routing.logits.shape, routing.gates.dtype).at[jnp.arange(x.shape[0])[:, None], routing.experts].set(routing.gates)
  return jnp.einsum('ned,ne->nd', out, weights.astype(out.dtype))
