"""Principles as data, and a rule engine that criticises and revises by them.

A principle says what a text must not have, as a regular expression, and what
stands there after a revision. So a violation is a fact, and a critic can be as
blind as a study wants it to be.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any, NamedTuple

import numpy as np

from postrain.binding import check_arguments

__all__ = ['constitution', 'revised', 'violations']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Principle:
  """What a text must not have.

  Attributes:
    name: of reports.
    pattern: a regular expression; each match is a violation.
    replacement: what a revision puts there, which may name groups: ``\\1``.
    critique: what the critic says of a violation.
    weight: how often it is asked about, beside the others.
  """

  name: str
  pattern: str
  replacement: str = ''
  critique: str = ''
  weight: float = 1.0


class Round(NamedTuple):
  """One critique and the text after it."""

  principle: str
  critique: str  # empty where the critic saw nothing
  text: str


class Revision(NamedTuple):
  """How a text became another."""

  text: str
  rounds: tuple[Round, ...]


def constitution(blocks: Sequence[Mapping[str, Any]]) -> tuple[Principle, ...]:
  """Read principles from blocks with the fields of `Principle`.

  Raises:
    ValueError: none, a name twice, a field that is wrong, a pattern that is no
      regular expression or matches nothing at all (which is everywhere), a
      replacement that names a group which is not there.
  """
  found: dict[str, Principle] = {}
  for number, block in enumerate(blocks):
    where = f'principles[{number}]'
    check_arguments(Principle, block, where)
    principle = Principle(**block)
    if principle.name in found:
      raise ValueError(f'{where}: the name {principle.name!r} is taken')
    if not 0 <= principle.weight < np.inf:
      raise ValueError(f'{where}: weight={principle.weight}: choose it ≥ 0')
    _check_pattern(principle, where)
    found[principle.name] = principle
  if not sum(p.weight for p in found.values()) > 0:
    raise ValueError('no principle of a weight above 0: give one')
  return tuple(found.values())


def violations(principle: Principle, text: str) -> int:
  """How often a text has what it must not have."""
  return sum(1 for _ in re.finditer(principle.pattern, text))


def revised(
  principles: Sequence[Principle],
  text: str,
  draw: np.random.Generator,
  *,
  num_rounds: int,
  recall: float = 1.0,
) -> Revision:
  """Criticise and revise a text, each round by a principle that is drawn.

  The critic sees each violation with the chance ``recall``, and never one that
  is not there; the revision mends what the critic saw and nothing else.

  Args:
    principles: of `constitution`; drawn in proportion to their weights.
    text: a response.
    draw: of principles, and of what the critic sees.
    num_rounds: ≥ 0.
    recall: in [0, 1].

  Raises:
    ValueError: a number out of range.

  References:
    Bai et al., 2022, Constitutional AI: Harmlessness from AI Feedback,
    arXiv:2212.08073.
  """
  if num_rounds < 0 or not 0 <= recall <= 1:
    raise ValueError(
      f'num_rounds={num_rounds}, recall={recall}: choose at least 0 rounds, and'
      ' a recall in [0, 1]'
    )
  weights = np.array([p.weight for p in principles])
  rounds = []
  for _ in range(num_rounds):
    principle = principles[draw.choice(len(weights), p=weights / weights.sum())]
    text, seen = _mended(principle, text, draw, recall)
    found = ', '.join(map(repr, seen))
    critique = f'{principle.critique or principle.name}: {found}'
    rounds.append(Round(principle.name, critique if seen else '', text))
  return Revision(text, tuple(rounds))


def _mended(
  principle: Principle, text: str, draw: np.random.Generator, recall: float
) -> tuple[str, list[str]]:
  """A text without the violations that the critic saw, and these."""
  seen = []

  def mend(match: re.Match) -> str:
    if draw.random() >= recall:
      return match[0]
    seen.append(match[0])
    return match.expand(principle.replacement)

  return re.sub(principle.pattern, mend, text), seen


def _check_pattern(principle: Principle, where: str) -> None:
  try:
    pattern = re.compile(principle.pattern)
    groups = {int(n) for n in re.findall(r'\\(\d)', principle.replacement)}
  except re.error as error:
    raise ValueError(
      f'{where}: pattern={principle.pattern!r} is no regular expression'
      f' ({error})'
    ) from error
  if pattern.fullmatch(''):
    raise ValueError(
      f'{where}: pattern={principle.pattern!r} matches the empty text, so that'
      ' every text violates it: ask for a character'
    )
  if max(groups, default=0) > pattern.groups:
    raise ValueError(
      f'{where}: replacement={principle.replacement!r} names the group'
      f' {max(groups)} of {pattern.groups} in {principle.pattern!r}'
    )
