"""Protocols of oversight, against every outcome of every check."""

import itertools
from typing import Any

import pytest

from postrain.feedback import oversight
from postrain.feedback.oversight import (
  Verdict,
  alone,
  assisted,
  caught,
  debate,
  decomposed,
  voted,
)


def outcomes(chances: list[float]) -> Any:
  """Each way that checks can turn out, with its chance."""
  for way in itertools.product((True, False), repeat=len(chances)):
    chance = 1.0
    for right, p in zip(way, chances, strict=True):
      chance *= p if right else 1 - p
    yield way, chance


@pytest.mark.parametrize('num_wrong', [1, 2, 4])
@pytest.mark.parametrize('context', [0, 1, 3, 4])
def test_m21_a_judge_alone_is_its_enumeration(
  context: int, num_wrong: int
) -> None:
  q, c, steps = 0.8, 0.7, 4
  found = alone(
    steps, accuracy=q, caught=c, context=context, num_wrong=num_wrong
  )
  reads = list(itertools.combinations(range(steps), context))
  rejected = 0.0
  for read in reads:
    chances = [c if step < num_wrong else 1 - q for step in read]
    rejected += sum(
      chance for alarms, chance in outcomes(chances) if any(alarms)
    ) / len(reads)
  assert found.rejected == pytest.approx(rejected)
  assert found.accepted == pytest.approx(q**context)


def test_m21_who_cannot_see_is_right_half_of_the_time() -> None:
  """Shown nothing, guessing, or before errors that look like sound steps."""
  assert alone(5, accuracy=0.9, context=0).accuracy == 0.5
  for accuracy, seen in ((0.5, 0.5), (0.9, caught(0.9, 1.0))):
    judge: Any = dict(accuracy=accuracy, caught=seen)
    for verdict in (
      alone(5, context=3, **judge),
      assisted(5, critic=1.0, **judge),
      debate(5, debater=1.0, **judge),
      decomposed(5, num_votes=3, **judge),
    ):
      assert verdict.accuracy == pytest.approx(0.5)


@pytest.mark.parametrize('steps', [1, 2, 5, 12])
@pytest.mark.parametrize('accuracy', [0.6, 0.9, 0.99])
def test_m21_a_decomposed_judge_is_right_of_each_chain_at_q_to_the_k(
  accuracy: float, steps: int
) -> None:
  for num_wrong in range(1, steps + 1):
    found = decomposed(steps, accuracy=accuracy, num_wrong=num_wrong)
    least = accuracy**steps - 1e-12
    assert min(found.accepted, found.rejected) >= least
    assert found.accuracy >= max(0.5, accuracy**steps)
    assert found.checks == steps


@pytest.mark.parametrize('num_wrong', [1, 2])
def test_m21_a_critic_is_its_enumeration(num_wrong: int) -> None:
  q, c, critic, steps = 0.8, 0.7, 0.75, 4
  rejected = 0.0
  for rights, chance in outcomes([critic] * steps):
    wrong = [step < num_wrong for step in range(steps)]
    flagged = [right == bad for right, bad in zip(rights, wrong, strict=True)]
    shown = [s for s in range(steps) if flagged[s]] or range(steps)
    sees = [c if wrong[step] else 1 - q for step in shown]
    rejected += chance * sum(sees) / len(sees)
  found = assisted(
    steps, accuracy=q, caught=c, critic=critic, num_wrong=num_wrong
  )
  assert found == pytest.approx(Verdict(q, rejected, 1))


def test_m21_a_debate_that_never_errs_leaves_one_check() -> None:
  for steps in (1, 7, 64):
    found = debate(steps, accuracy=0.8, debater=1.0)
    assert found.accuracy == pytest.approx(0.8)
  lost = debate(8, accuracy=0.8, caught=0.7, debater=0.9)
  hit = 0.9**3
  assert lost.rejected == pytest.approx(hit * 0.7 + (1 - hit) * 0.2)


def test_m21_votes_are_a_majority_and_a_strong_policy_is_not_caught() -> None:
  assert voted(0.8, 1) == pytest.approx(0.8)
  assert voted(0.8, 3) == pytest.approx(0.8**3 + 3 * 0.8**2 * 0.2)
  assert voted(0.5, 5) == pytest.approx(0.5)
  assert caught(0.9, 0.0) == pytest.approx(0.9)
  assert caught(0.9, 0.5) == pytest.approx(0.5)
  one, five = (decomposed(9, accuracy=0.9, num_votes=n) for n in (1, 5))
  assert five.accuracy > one.accuracy
  assert five.checks == 45


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: alone(3, accuracy=1.2), 'accuracy=1.2'),
    (lambda: alone(3, accuracy=0.9, context=4), 'context=4'),
    (lambda: alone(3, accuracy=0.9, num_wrong=0), 'num_wrong=0'),
    (lambda: alone(3, accuracy=0.9, num_wrong=4), 'num_wrong=4'),
    (lambda: alone(3, accuracy=0.9, caught=-0.1), 'caught=-0.1'),
    (lambda: decomposed(3, accuracy=0.9, num_votes=2), 'num_votes=2'),
    (lambda: assisted(3, accuracy=0.9, critic=2.0), 'critic=2.0'),
    (lambda: debate(3, accuracy=0.9, debater=-1.0), 'debater=-1.0'),
    (lambda: oversight.caught(0.9, 2.0), 'strength=2.0'),
  ],
)
def test_m21_mistakes_are_named(make: Any, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    make()
