"""Losses of distillation, per position, from whole next-token distributions.

``logits`` of the student let the gradient through, ``teacher_logits`` are
constants; both have one vocabulary. They compose with
`postrain.logprobs.map_time_chunks`, so that the ``[B T V]`` logits never exist:
hand it the teacher's hidden states as an array, and unembed them in the
function. On the teacher's or the data's sequences this is off-policy
distillation, on the student's own on-policy distillation: where the tokens
come from is not the loss's business, and the state's distribution has no
gradient. A candidate that a filter excluded (logit −inf) counts as one of
probability e⁻¹⁰⁰, so that the other side may use it at a high, finite price.
"""

import jax
from jax import Array
from jax.lax import stop_gradient
from jax.nn import log_softmax, logsumexp
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.dtypes import Scalar, promoted
from postrain.importance import log_ratio
from postrain.losses.pieces import log1mexp

__all__ = [
  'annealed_coef',
  'forward_kl',
  'generalized_jsd',
  'reverse_kl',
  'sampled_reverse_kl',
  'top_candidates',
]

Losses = tuple[Float[Array, 'B T'], dict[str, Float[Array, 'B T']]]


def forward_kl(
  logits: Float[Array, '*n V'],
  teacher_logits: Float[Array, '*n V'],
  *,
  temperature: Scalar = 1.0,
) -> Float[Array, '*n']:
  """Divergence of the student from the teacher: covers all its modes.

      KL(p‖π) = Σ_v p_v (log p_v − log π_v),   p, π = softmax(z / τ)

  Its gradient by z / τ is π − p. No factor τ²: multiply the coefficient by it
  where gradients of different temperatures are to be compared.

  Args:
    logits, teacher_logits: see the module.
    temperature: τ > 0 of both.

  Returns:
    Divergences in nats, at least 0.

  References:
    Hinton et al., 2015, Distilling the Knowledge in a Neural Network,
    arXiv:1503.02531.
  """
  return _kl(*reversed(_pair(logits, teacher_logits, temperature)))


def reverse_kl(
  logits: Float[Array, '*n V'],
  teacher_logits: Float[Array, '*n V'],
  *,
  temperature: Scalar = 1.0,
) -> Float[Array, '*n']:
  """Divergence of the teacher from the student: seeks one of its modes.

      KL(π‖p) = Σ_v π_v (log π_v − log p_v),   p, π = softmax(z / τ)

  Args:
    logits, teacher_logits: see the module.
    temperature: τ > 0 of both.

  Returns:
    Divergences in nats, at least 0.

  References:
    Gu et al., 2023, MiniLLM: Knowledge Distillation of Large Language Models,
    arXiv:2306.08543.
  """
  return _kl(*_pair(logits, teacher_logits, temperature))


def generalized_jsd(
  logits: Float[Array, '*n V'],
  teacher_logits: Float[Array, '*n V'],
  *,
  beta: Scalar = 0.5,
  temperature: Scalar = 1.0,
) -> Float[Array, '*n']:
  """Jensen-Shannon divergence with unequal weights.

      JSD_β = β KL(p‖m) + (1 − β) KL(π‖m),   m = β p + (1 − β) π

  By convention β = 0 is `forward_kl` and β = 1 `reverse_kl`: the limits of
  JSD_β / β and JSD_β / (1 − β). JSD_β itself tends to 0 at either end, so that
  a β near an end asks for a larger coefficient. Some implementations swap the
  weights of the mixture.

  Args:
    logits, teacher_logits: see the module.
    beta: β in [0, 1], the teacher's weight.
    temperature: τ > 0 of both.

  Returns:
    Divergences in nats, at least 0.

  References:
    Agarwal et al., 2023, On-Policy Distillation of Language Models: Learning
    from Self-Generated Mistakes (GKD), arXiv:2306.13649.
  """
  student, teacher = _pair(logits, teacher_logits, temperature)
  beta = jnp.asarray(beta, student.dtype)

  def mixed(student: Array, teacher: Array) -> Array:
    # Inside the interval also where an end is asked for: log 0 has no gradient.
    weight = jnp.where((beta > 0) & (beta < 1), beta, 0.5)
    mixture = jnp.logaddexp(
      jnp.log(weight) + teacher, jnp.log1p(-weight) + student
    )
    return weight * _kl(teacher, mixture) + (1 - weight) * _kl(student, mixture)

  branch = jnp.where(beta <= 0, 0, jnp.where(beta >= 1, 2, 1))
  branches = (lambda s, t: _kl(t, s), mixed, _kl)
  return jax.lax.switch(branch, branches, student, teacher)


def top_candidates(
  logits: Float[Array, '*n V'],
  teacher_logits: Float[Array, '*n V'],
  *,
  k: int = 100,
  tail: bool = True,
  temperature: Scalar = 1.0,
) -> tuple[Float[Array, '*n K'], Float[Array, '*n K']]:
  """Both distributions on the student's k likeliest candidates.

      S = top_k(π),   (log π_S, log Σ_{v∉S} π_v)  and the same of p

  For any divergence above in place of the logits (at temperature 1). With the
  tail the rest of the vocabulary is one more candidate, and the divergence a
  lower bound of the full one; without it both are renormalised on S, and mass
  outside of S costs nothing. Swap the arguments for the teacher's candidates.

  Args:
    logits: they choose the candidates; which ones has no gradient.
    teacher_logits: read at the same candidates.
    k: number of candidates, at most V.
    tail: whether the rest is a candidate of its own.
    temperature: τ > 0 of both.

  Returns:
    Log-probs of student and teacher, k or k + 1 of each, to be normalised by
    the divergence.

  References:
    Kullback and Leibler, 1951, On Information and Sufficiency (coarser
    partitions).
  """
  logits, teacher_logits = promoted(logits, teacher_logits)
  student = _log_probs(logits, temperature)
  teacher = _log_probs(teacher_logits, temperature)
  _, kept = jax.lax.top_k(stop_gradient(student), k)

  def reduced(logp: Array) -> Array:
    picked = jnp.take_along_axis(logp, kept, axis=-1)
    if not tail:
      return picked
    # Rounding may leave no rest at all.
    inside = jnp.minimum(logsumexp(picked, axis=-1, keepdims=True), -1e-7)
    return jnp.concatenate([picked, log1mexp(inside)], axis=-1)

  return reduced(student), reduced(teacher)


def sampled_reverse_kl(
  logprobs: Float[Array, 'B T'],
  teacher_logprobs: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  max_log_ratio: Scalar | None = 20.0,
) -> Losses:
  """Policy gradient whose advantage is the teacher's surprise, per token.

      ℓ_t = sg(log π(y_t) − log p(y_t)) log π(y_t)

  On tokens that the student sampled its expected gradient at a state is that
  of `reverse_kl`; it needs the teacher's log-prob of one token only. The value
  is no divergence: the metric 'kl' is the estimate.

  Args:
    logprobs: of the student on its own tokens; the gradient flows here.
    teacher_logprobs: of the teacher on the same tokens, constants.
    mask: tokens that the student chose.
    max_log_ratio: limit of the advantage; None for none.

  Returns:
    Values, and the metric 'kl' (k1), 0 off the mask.

  References:
    Lu and Thinking Machines Lab, 2025, On-Policy Distillation (blog).
  """
  logprobs, teacher_logprobs = promoted(logprobs, teacher_logprobs)
  excess = stop_gradient(
    log_ratio(logprobs, teacher_logprobs, mask, max_log_ratio=max_log_ratio)
  )
  return excess * jnp.where(mask, logprobs, 0), {'kl': excess}


def annealed_coef(
  step: Float[Array, '*n'] | Int[Array, '*n'],
  *,
  start: Scalar = 5e-3,
  decrement: Scalar = 5e-5,
  end: Scalar = 1e-3,
) -> Float[Array, '*n']:
  """Coefficient that falls linearly to a floor: teacher first, reward later.

      β = max(β₀ − δ · step, β_min)

  KDRL's, for the k2 of student and teacher beside a policy loss.

  Args:
    step: of the optimiser, from 0.
    start: β₀.
    decrement: δ per step.
    end: β_min.

  Returns:
    Coefficients in [β_min, β₀].

  References:
    Xu et al., 2025, KDRL: Post-Training Reasoning LLMs via Unified Knowledge
    Distillation and Reinforcement Learning.
  """
  (step,) = promoted(stop_gradient(step))
  return jnp.maximum(start - decrement * step, end)


_EXCLUDED = -100.0


def _log_probs(logits: Array, temperature: Scalar) -> Array:
  logp = log_softmax(logits / temperature)
  return jnp.where(jnp.isneginf(logits), _EXCLUDED, logp)


def _pair(
  logits: Array, teacher_logits: Array, temperature: Scalar
) -> tuple[Array, Array]:
  logits, teacher_logits = promoted(logits, stop_gradient(teacher_logits))
  student = _log_probs(logits, temperature)
  return student, _log_probs(teacher_logits, temperature)


def _kl(logp: Array, logq: Array) -> Array:
  return jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)
