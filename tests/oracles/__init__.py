"""Every public function of the mathematics again, in loops over float64.

Written from the formulas, not from the library. Where the library stops a
gradient, the oracle takes the stopped quantity from ``stopped`` (a copy of the
first argument), so that central differences see only what is differentiated.
"""

# ruff: noqa: F403

from oracles.advantages import *
from oracles.aggregation import *
from oracles.balance import *
from oracles.distillation import *
from oracles.logprobs import *
from oracles.losses import *
from oracles.mismatch import *
from oracles.policy_variants import *
from oracles.preference import *
from oracles.reward_models import *
from oracles.selection import *
from oracles.shaping import *
