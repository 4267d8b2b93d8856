"""Losses of models that score a whole completion.

``chosen`` and ``rejected`` are the scores of a pair's two completions, read at
the last token (`last_score`). Only differences of scores on one prompt are
identified: any function of the prompt may be added to all of them.
"""

from jax import Array
from jax.lax import stop_gradient
from jax.nn import log_sigmoid, logsumexp, sigmoid, softplus
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from postrain.dtypes import promoted
from postrain.losses.pieces import reward_figures

__all__ = [
  'bradley_terry',
  'last_score',
  'outcome_correctness',
  'plackett_luce',
  'ranked_pairs',
  'score_centering',
  'soft_preference',
  'swap_averaged',
]

Losses = tuple[Float[Array, ' N'], dict[str, Float[Array, ' N']]]
GroupLosses = tuple[Float[Array, ' P'], dict[str, Float[Array, ' P']]]


def last_score(
  scores: Float[Array, 'B T'], mask: Bool[Array, 'B T']
) -> Float[Array, ' B']:
  """The score at the last real token, wherever the padding is.

      s = scores[max {t : m_t}]

  Column −1 would be padding for all but the longest row. A truncated response
  has no stop token: this reads its last token, and a reward model that never
  saw one cut off deserves no trust there.

  Args:
    scores: of a scalar head, at every token.
    mask: True on real tokens, of the completion at least.

  Returns:
    One score for each row, 0 for a row without tokens.
  """
  (scores,) = promoted(scores)
  last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
  picked = jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]
  return jnp.where(jnp.any(mask, axis=1), picked, 0)


def bradley_terry(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  margins: Float[Array, ' N'] | None = None,
) -> Losses:
  """Negative log-likelihood of a pair's order.

      ℓ = −log σ(s_w − s_l − m)

  Args:
    chosen, rejected: see the module; the gradient flows through both.
    margins: m ≥ 0, larger where the raters were surer; None for 0.

  Returns:
    Values (log 2 at equal scores), and metrics: 'chosen_reward',
    'rejected_reward', their 'margin', 'accuracy' (1 where it is above 0).

  References:
    Bradley and Terry, 1952, Rank Analysis of Incomplete Block Designs; Ouyang
    et al., 2022, InstructGPT, arXiv:2203.02155; Touvron et al., 2023, Llama 2
    (margin), arXiv:2307.09288.
  """
  chosen, rejected = promoted(chosen, rejected)
  distance = chosen - rejected
  if margins is not None:
    distance = distance - stop_gradient(margins).astype(distance.dtype)
  return softplus(-distance), reward_figures(chosen, rejected)


def score_centering(
  chosen: Float[Array, ' N'], rejected: Float[Array, ' N']
) -> Losses:
  """Pull the two scores of a pair towards a mean of 0.

      ℓ = (s_w + s_l)²

  A term of its own, with a small coefficient (0.01), beside `bradley_terry`,
  which leaves the mean free.

  Args:
    chosen, rejected: see the module; the gradient flows through both.

  Returns:
    Values, and the metric 'mean_reward'.

  References:
    Eisenstein et al., 2023, Helping or Herding? Reward Model Ensembles
    Mitigate but do not Eliminate Reward Hacking, arXiv:2312.09244.
  """
  chosen, rejected = promoted(chosen, rejected)
  total = chosen + rejected
  return jnp.square(total), {'mean_reward': stop_gradient(total / 2)}


def soft_preference(
  chosen: Float[Array, ' N'],
  rejected: Float[Array, ' N'],
  preference: Float[Array, ' N'],
) -> Losses:
  """Cross-entropy with the probability that a judge prefers the first.

      ℓ = −p log σ(d) − (1 − p) log σ(−d),   d = s_w − s_l

  p = ½ is a tie, p = 1 the hard label of `bradley_terry`. Implicit rewards in
  place of scores give DPO with soft labels.

  Args:
    chosen, rejected: scores of the first and second; the gradient flows here.
    preference: p in [0, 1], constants.

  Returns:
    Values (least at d = log p / (1 − p)), and metrics: 'chosen_reward',
    'rejected_reward', 'margin', 'accuracy' (d on the side of p).

  References:
    Lee et al., 2023, RLAIF: Scaling Reinforcement Learning from Human
    Feedback with AI Feedback, arXiv:2309.00267.
  """
  chosen, rejected, preference = promoted(chosen, rejected, preference)
  preference, d = stop_gradient(preference), chosen - rejected
  values = -preference * log_sigmoid(d) - (1 - preference) * log_sigmoid(-d)
  metrics = reward_figures(chosen, rejected)
  agrees = stop_gradient(d) * (preference - 0.5) > 0
  return values, metrics | {'accuracy': agrees.astype(d.dtype)}


def swap_averaged(
  forward: Float[Array, ' N'], backward: Float[Array, ' N']
) -> Float[Array, ' N']:
  """A judge's preference without its taste for a position.

      p = ½ [p(a ≻ b | a first) + p(a ≻ b | b first)]

  A bias that adds to the judge's logit cancels to first order.

  Args:
    forward: probability of a over b, shown a first.
    backward: probability of a over b too, shown b first.

  Returns:
    Probabilities, constants.

  References:
    Lee et al., 2023, RLAIF: Scaling Reinforcement Learning from Human
    Feedback with AI Feedback, arXiv:2309.00267.
  """
  forward, backward = promoted(forward, backward)
  return stop_gradient((forward + backward) / 2)


def ranked_pairs(
  rewards: Float[Array, 'P K'],
  ranks: Int[Array, 'P K'],
  where: Bool[Array, 'P K'] | None = None,
) -> GroupLosses:
  """Bradley-Terry over all pairs of a prompt's K ranked responses.

      ℓ = mean over i ≻ j of −log σ(s_i − s_j)

  Each response is scored once, and a prompt weighs 1 whatever its K. Pairs cut
  loose into a shuffled data set overfit within an epoch.

  Args:
    rewards: scores s; the gradient flows here.
    ranks: smaller is better; responses of equal rank form no pair.
    where: which responses exist; None for all.

  Returns:
    One value for each prompt, 0 without pairs, and the metric 'accuracy', the
    share of pairs in the right order.

  References:
    Ouyang et al., 2022, Training Language Models to Follow Instructions with
    Human Feedback, arXiv:2203.02155.
  """
  rewards, where = _shown(rewards, where)
  better = ranks[:, :, None] < ranks[:, None, :]
  better &= where[:, :, None] & where[:, None, :]
  distance = rewards[:, :, None] - rewards[:, None, :]
  count = jnp.maximum(jnp.sum(better, axis=(1, 2)), 1).astype(rewards.dtype)
  losses = jnp.where(better, softplus(-distance), 0)
  right = jnp.sum(better & (distance > 0), axis=(1, 2)).astype(rewards.dtype)
  return jnp.sum(losses, axis=(1, 2)) / count, {'accuracy': right / count}


def plackett_luce(
  rewards: Float[Array, 'P K'],
  ranks: Int[Array, 'P K'],
  where: Bool[Array, 'P K'] | None = None,
) -> GroupLosses:
  """Negative log-likelihood of a whole ranking, best first.

      ℓ = −Σ_i (s_i − log Σ_{j: rank_j ≥ rank_i} exp s_j)

  Each response in turn is drawn from those that are left; K = 2 is
  `bradley_terry`. Equal ranks are drawn from the same set (Breslow's rule).

  Args:
    rewards: scores s; the gradient flows here.
    ranks: smaller is better.
    where: which responses exist; None for all.

  Returns:
    One value for each prompt (log K! at equal scores), and the metric
    'accuracy', 1 where the best response has the largest score.

  References:
    Plackett, 1975, The Analysis of Permutations; Luce, 1959, Individual
    Choice Behavior.
  """
  rewards, where = _shown(rewards, where)
  left = ranks[:, None, :] >= ranks[:, :, None]
  left &= where[:, None, :]
  # An empty set would put a NaN into the gradient of its log-sum-exp.
  left |= jnp.eye(rewards.shape[1], dtype=bool)[None]
  normalizer = logsumexp(jnp.where(left, rewards[:, None, :], -jnp.inf), axis=2)
  losses = jnp.where(where, normalizer - rewards, 0)
  highest = jnp.max(jnp.where(where, rewards, -jnp.inf), axis=1, keepdims=True)
  best = jnp.min(jnp.where(where, ranks, _LAST), axis=1, keepdims=True)
  right = jnp.any(where & (ranks == best) & (rewards == highest), axis=1)
  accuracy = stop_gradient(right.astype(rewards.dtype))
  return jnp.sum(losses, axis=1), {'accuracy': accuracy}


def outcome_correctness(
  scores: Float[Array, ' N'], labels: Float[Array, ' N']
) -> Losses:
  """Cross-entropy of an outcome reward model: is the final answer right?

      ℓ = −c log σ(s) − (1 − c) log σ(−s)

  At its minimum σ(s) is the chance of success. The variant that predicts at
  every token is `step_correctness` with the outcome repeated: it learns the
  value of each prefix.

  Args:
    scores: logits s at the last token; the gradient flows here.
    labels: c, 1 for right and 0 for wrong, or a share; constants.

  Returns:
    Values (log 2 at s = 0), and metrics: 'probability' σ(s), 'accuracy' (1
    where σ(s) is on the side of c).

  References:
    Cobbe et al., 2021, Training Verifiers to Solve Math Word Problems,
    arXiv:2110.14168.
  """
  scores, labels = promoted(scores, labels)
  labels = stop_gradient(labels)
  values = softplus(scores) - labels * scores
  right = (scores > 0) == (labels > 0.5)
  metrics = {
    'probability': stop_gradient(sigmoid(scores)),
    'accuracy': right.astype(scores.dtype),
  }
  return values, metrics


_LAST = jnp.iinfo(jnp.int32).max


def _shown(rewards: Array, where: Array | None) -> tuple[Array, Array]:
  (rewards,) = promoted(rewards)
  where = jnp.ones(rewards.shape, bool) if where is None else where
  return jnp.where(where, rewards, 0), where
