"""How often a weak judge is right about chains of a stronger policy: exactly.

A chain has K steps. It is sound, or m of its steps, any of them, are wrong. A
judge that checks a step says what it is with the chance ``accuracy``; of a
wrong step it may see less than of a sound one, for a stronger policy errs less
plainly (`caught`). A protocol is what the judge is shown; its accuracy here is
the mean over sound and wrong chains, ½ for who cannot see. Checks err
independently of each other.
"""

import math
from typing import NamedTuple

__all__ = ['alone', 'assisted', 'caught', 'debate', 'decomposed', 'voted']


class Verdict(NamedTuple):
  """What becomes of chains under a protocol.

  Attributes:
    accepted: the chance that a sound chain is accepted.
    rejected: the chance that a wrong one is rejected.
    checks: steps that the judge checks.
  """

  accepted: float
  rejected: float
  checks: int

  @property
  def accuracy(self) -> float:
    """Of the judge, where one chain of two is sound."""
    return (self.accepted + self.rejected) / 2


def caught(accuracy: float, strength: float) -> float:
  """The chance that a judge sees that a step of a policy is wrong.

      (1 − strength) accuracy + strength (1 − accuracy)

  A policy of strength 0 errs as plainly as the steps that the judge was
  measured on. Wrong steps of one of strength 1 look like sound ones, so that no
  protocol is right more than half of the time; beyond ½ votes mislead.
  """
  _check_shares(accuracy=accuracy, strength=strength)
  return (1 - strength) * accuracy + strength * (1 - accuracy)


def alone(
  num_steps: int, *, accuracy: float, caught: float | None = None,
  context: int = 1, num_wrong: int = 1,
) -> Verdict:  # fmt: skip
  """A judge that reads ``context`` of the steps, drawn at random.

  It rejects what looks wrong anywhere. With a context of 0 it accepts
  everything, and is the blind judge: an accuracy of ½.

  Args:
    num_steps: K.
    accuracy: of a check of a sound step.
    caught: of a wrong one; None for the same.
    context: steps that it can read, in [0, K].
    num_wrong: m, in [1, K].

  Raises:
    ValueError: a number out of range.
  """
  caught = _checked(num_steps, accuracy, caught, num_wrong)
  if not 0 <= context <= num_steps:
    raise ValueError(f'context={context}: choose it in [0, {num_steps}]')
  missed = 0.0  # summed over the wrong steps among those that it reads
  for seen in range(min(num_wrong, context) + 1):
    draws = math.comb(num_wrong, seen)
    draws *= math.comb(num_steps - num_wrong, context - seen)
    looks = (1 - caught) ** seen * accuracy ** (context - seen)
    missed += draws / math.comb(num_steps, context) * looks
  return Verdict(accuracy**context, 1 - missed, context)


def decomposed(
  num_steps: int, *, accuracy: float, caught: float | None = None,
  num_wrong: int = 1, num_votes: int = 1,
) -> Verdict:  # fmt: skip
  """The chain is split until the judge reads one step at a time; all count.

      accepted = q^K,   rejected = 1 − (1 − c)^m q^(K − m),   both ≥ q^K

  with q the accuracy and c what is caught, each of `voted` checks. It trusts
  nobody but the judge: false alarms add up, and votes pay for them.

  Args:
    num_steps, accuracy, caught, num_wrong: see `alone`.
    num_votes: checks of a step, odd; most of them decide.

  Raises:
    ValueError: a number out of range.

  References:
    Christiano, Shlegeris and Amodei, 2018, Supervising strong learners by
    amplifying weak experts, arXiv:1810.08575.
  """
  caught = _checked(num_steps, accuracy, caught, num_wrong)
  accuracy, caught = voted(accuracy, num_votes), voted(caught, num_votes)
  found = alone(
    num_steps, accuracy=accuracy, caught=caught, context=num_steps,
    num_wrong=num_wrong,
  )  # fmt: skip
  return found._replace(checks=num_steps * num_votes)


def assisted(
  num_steps: int, *, accuracy: float, caught: float | None = None,
  critic: float, num_wrong: int = 1, num_votes: int = 1,
) -> Verdict:  # fmt: skip
  """A critic reads all steps and points to one; the judge checks that one.

  The critic's view of each step is right with the chance ``critic``; it points
  to one of those that look wrong to it, or to any if none does.

  Args:
    num_steps, accuracy, caught, num_wrong, num_votes: see `decomposed`.
    critic: in [0, 1].

  Raises:
    ValueError: a number out of range.

  References:
    Saunders et al., 2022, Self-critiquing models for assisting human
    evaluators, arXiv:2206.05802.
  """
  caught = _checked(num_steps, accuracy, caught, num_wrong)
  _check_shares(critic=critic)
  hit = 0.0
  for true in range(num_wrong + 1):
    for false in range(num_steps - num_wrong + 1):
      chance = _binomial(num_wrong, true, critic)
      chance *= _binomial(num_steps - num_wrong, false, 1 - critic)
      seen = true + false
      hit += chance * (true / seen if seen else num_wrong / num_steps)
  return _pointed(hit, accuracy, caught, num_votes)


def debate(
  num_steps: int, *, accuracy: float, caught: float | None = None,
  debater: float, num_wrong: int = 1, num_votes: int = 1,
) -> Verdict:  # fmt: skip
  """Two debaters halve what they disagree on; the judge checks what is left.

  One holds that the chain is sound, the other that it is not, and says in which
  half, then in which half of that, ⌈log₂ K⌉ times, each time rightly with the
  chance ``debater``. After a wrong turn there is nothing to be found.

      hit = debater^⌈log₂ K⌉

  where one step is wrong; more of them make it easier, which is not counted.

  Args:
    num_steps, accuracy, caught, num_wrong, num_votes: see `decomposed`.
    debater: in [0, 1].

  Raises:
    ValueError: a number out of range.

  References:
    Irving, Christiano and Amodei, 2018, AI safety via debate,
    arXiv:1805.00899.
  """
  caught = _checked(num_steps, accuracy, caught, num_wrong)
  _check_shares(debater=debater)
  hit = debater ** math.ceil(math.log2(num_steps))
  return _pointed(hit, accuracy, caught, num_votes)


def voted(chance: float, num_votes: int) -> float:
  """The chance that most of so many independent checks say what one says.

  Raises:
    ValueError: an even number of votes, or none.
  """
  if num_votes < 1 or num_votes % 2 == 0:
    raise ValueError(f'num_votes={num_votes}: choose an odd number')
  most = range(num_votes // 2 + 1, num_votes + 1)
  return sum(_binomial(num_votes, n, chance) for n in most)


def _pointed(
  hit: float, accuracy: float, caught: float, num_votes: int
) -> Verdict:
  """The judge checks one step; with the chance ``hit`` a wrong one if any."""
  accuracy, caught = voted(accuracy, num_votes), voted(caught, num_votes)
  rejected = hit * caught + (1 - hit) * (1 - accuracy)
  return Verdict(accuracy, rejected, num_votes)


def _binomial(trials: int, successes: int, chance: float) -> float:
  ways = math.comb(trials, successes)
  return ways * chance**successes * (1 - chance) ** (trials - successes)


def _checked(
  num_steps: int, accuracy: float, caught: float | None, num_wrong: int
) -> float:
  """What is caught, where nothing is out of range."""
  caught = accuracy if caught is None else caught
  _check_shares(accuracy=accuracy, caught=caught)
  if not 1 <= num_wrong <= num_steps:
    raise ValueError(
      f'num_wrong={num_wrong} of num_steps={num_steps}: choose at least one of'
      ' each, and no more wrong ones than there are'
    )
  return caught


def _check_shares(**shares: float) -> None:
  for name, value in shares.items():
    if not 0 <= value <= 1:
      raise ValueError(f'{name}={value}: it is a chance, choose it in [0, 1]')
