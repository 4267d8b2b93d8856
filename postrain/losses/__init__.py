"""Losses: unreduced values and metrics of the same shape.

A term of an objective is ``sum(weights * values)`` with the weights of
`postrain.aggregation`. Losses minimise, and stop the gradient where their
paper stops it. One topic, one file; all names are re-exported here.
"""

from postrain.losses.anchored import (
  apo_down,
  apo_zero,
  bco_pair,
  nca_pair,
  sppo_hard,
)
from postrain.losses.balance import expert_shares, load_balance
from postrain.losses.distillation import (
  annealed_coef,
  forward_kl,
  generalized_jsd,
  reverse_kl,
  sampled_reverse_kl,
  top_candidates,
)
from postrain.losses.policy import (
  cispo,
  gspo,
  gspo_token,
  ppo_clip,
  reinforce,
  sequence_clip,
)
from postrain.losses.preference import (
  aot,
  discopop,
  dpo,
  exo_pair,
  f_dpo,
  hinge,
  implicit_reward,
  ipo,
  length_normalized_dpo,
  length_normalized_ipo,
  robust_dpo,
)
from postrain.losses.process import (
  monte_carlo_labels,
  step_correctness,
  step_score,
  until_first_error,
)
from postrain.losses.reference_free import cpo, orpo, simpo
from postrain.losses.reward_models import (
  bradley_terry,
  last_score,
  outcome_correctness,
  plackett_luce,
  ranked_pairs,
  score_centering,
  soft_preference,
  swap_averaged,
)
from postrain.losses.soft_clip import geometric_mean, sapo, vespo
from postrain.losses.supervised import negative_log_likelihood
from postrain.losses.trust_region import (
  dppo,
  dro,
  kl_cov,
  minirl,
  mirror_descent,
)
from postrain.losses.unpaired import kto, kto_reference_point
from postrain.losses.value import clipped_squared_error, squared_error

__all__ = [
  'annealed_coef',
  'aot',
  'apo_down',
  'apo_zero',
  'bco_pair',
  'bradley_terry',
  'cispo',
  'clipped_squared_error',
  'cpo',
  'discopop',
  'dpo',
  'dppo',
  'dro',
  'exo_pair',
  'expert_shares',
  'f_dpo',
  'forward_kl',
  'generalized_jsd',
  'geometric_mean',
  'gspo',
  'gspo_token',
  'hinge',
  'implicit_reward',
  'ipo',
  'kl_cov',
  'kto',
  'kto_reference_point',
  'last_score',
  'length_normalized_dpo',
  'length_normalized_ipo',
  'load_balance',
  'minirl',
  'mirror_descent',
  'monte_carlo_labels',
  'nca_pair',
  'negative_log_likelihood',
  'orpo',
  'outcome_correctness',
  'plackett_luce',
  'ppo_clip',
  'ranked_pairs',
  'reinforce',
  'reverse_kl',
  'robust_dpo',
  'sampled_reverse_kl',
  'sapo',
  'score_centering',
  'sequence_clip',
  'simpo',
  'soft_preference',
  'sppo_hard',
  'squared_error',
  'step_correctness',
  'step_score',
  'swap_averaged',
  'top_candidates',
  'until_first_error',
  'vespo',
]
