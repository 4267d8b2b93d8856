"""Examine a policy on a data set: problems, answers, marks."""

from postrain.exam.examiner import examine
from postrain.exam.marks import marks, table
from postrain.exam.problems import Problem, read_problems
from postrain.exam.settings import Settings

__all__ = [
  'Problem',
  'Settings',
  'examine',
  'marks',
  'read_problems',
  'table',
]
