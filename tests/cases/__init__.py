"""One or more calls of every public function of the mathematics.

The contract test runs each through all that a loss, estimator or advantage
must withstand.
"""

from cases import advantages as _advantages
from cases import aggregation as _aggregation
from cases import balance as _balance
from cases import distillation as _distillation
from cases import logprobs as _logprobs
from cases import losses as _losses
from cases import mismatch as _mismatch
from cases import policy_variants as _policy_variants
from cases import preference as _preference
from cases import reward_models as _reward_models
from cases import selection as _selection
from cases import shaping as _shaping
from cases.record import Case
from postrain import (
  advantages,
  aggregation,
  importance,
  kl,
  logprobs,
  losses,
  masks,
  shaping,
)

__all__ = ['MODULES', 'Case', 'cases']

MODULES = (
  advantages,
  aggregation,
  importance,
  kl,
  logprobs,
  losses,
  masks,
  shaping,
)


def cases() -> list[Case]:
  parts = (
    _advantages, _aggregation, _balance, _distillation, _logprobs, _losses,
    _mismatch, _policy_variants, _preference, _reward_models, _selection,
    _shaping,
  )  # fmt: skip
  return [case for part in parts for case in part.cases()]
