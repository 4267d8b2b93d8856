"""Balance of a mixture of experts."""

from cases.record import Case, case
from postrain import losses


def cases() -> list[Case]:
  """Not padded: the axis of the experts cannot grow."""
  own = 'router_logits experts mask'
  return [
    case(
      losses.expert_shares, 'experts mask', decides=True, padded=False,
      num_experts=4,
    ),
    case(losses.load_balance, own, gradients='router_logits', padded=False),
    case(
      losses.load_balance, f'{own} expert_shares', gradients='router_logits',
      padded=False, rename={'expert_shares': 'shares'},
    ),
  ]  # fmt: skip
