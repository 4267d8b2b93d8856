"""From rewards to advantages. All results are constants for the gradient.

For groups, ``rewards`` are those of the G samples of each prompt, and ``where``
says which samples exist (None for all; the others give 0, whatever they hold).
Along tokens, ``mask`` is True on those that the policy chose, and ``groups``
numbers the group of each sequence (any ids, in any order). Statistics span the
rollout: compute them before it is cut into minibatches. One idea, one file; all
names are re-exported here.
"""

from postrain.advantages.baselines import (
  optimal_baseline,
  optimal_token_baseline,
  remax,
)
from postrain.advantages.best import (
  group_pass_at_k,
  leave_one_out_max,
  max_only,
)
from postrain.advantages.compound import differential_smoothing, gdpo
from postrain.advantages.groups import (
  batch_normalized,
  gpg,
  group_centered,
  group_normalized,
  leave_one_out,
)
from postrain.advantages.process import group_process, turn_gae, turn_returns
from postrain.advantages.tokens import (
  discounted_returns,
  gae,
  lambda_returns,
  reinforce_plus_plus,
  reinforce_plus_plus_baseline,
  whiten,
)

__all__ = [
  'batch_normalized',
  'differential_smoothing',
  'discounted_returns',
  'gae',
  'gdpo',
  'gpg',
  'group_centered',
  'group_normalized',
  'group_pass_at_k',
  'group_process',
  'lambda_returns',
  'leave_one_out',
  'leave_one_out_max',
  'max_only',
  'optimal_baseline',
  'optimal_token_baseline',
  'reinforce_plus_plus',
  'reinforce_plus_plus_baseline',
  'remax',
  'turn_gae',
  'turn_returns',
  'whiten',
]
