"""Grade completions with a reward, and keep the answers that they state."""

from collections.abc import Sequence
from typing import Any

from postrain import rewards
from postrain.binding import bind
from postrain.exam.problems import Problem
from postrain.exam.settings import Settings
from postrain.rewards.answers import READERS, make_reader, reference_answer
from postrain.types import Completion


class Grader:
  """Answers of completions, and whether they are right.

  Raises:
    ValueError: there is no such grader, or it would run what a model wrote; a
      reference that it cannot read.
  """

  def __init__(self, settings: Settings, problems: Sequence[Problem]):
    name, self._read = settings.grader, None
    if name in ('code', 'humaneval', 'mbpp', 'unit_tests'):
      raise ValueError(
        f'grader={name!r} would run code that a model wrote, and there is no'
        f' sandbox: take one of {", ".join(READERS)}'
      )
    if name in READERS:
      marker = settings.marker
      self._read = make_reader(name, extract=settings.extract, marker=marker)
      self.references = [
        str(
          reference_answer(
            name, problem._asdict(), row, field='answer', marker=marker
          )
        )
        for row, problem in enumerate(problems, start=1)
      ]
    else:
      self._reward = bind(rewards, {'name': name})
      self._examples = [problem._asdict() for problem in problems]
      self.references = [problem.answer for problem in problems]

  @property
  def votes(self) -> bool:
    """Whether there are answers, which can be counted."""
    return self._read is not None

  def __call__(self, completion: Completion, index: int) -> dict[str, Any]:
    """The answer as text, None if there is none, and whether it is right."""
    if self._read is None:
      [reward] = self._reward([completion], [self._examples[index]])
      return {'answer': None, 'correct': bool(reward >= 1)}
    answer = self._read(completion.text)
    answer = None if answer is None else str(answer)
    return {'answer': answer, 'correct': answer == self.references[index]}
