"""Examine a policy on a data set: problems, answers, marks."""

from postrain.exam.examiner import Settings, examine
from postrain.exam.marks import marks, table
from postrain.exam.problems import Problem, read_problems

__all__ = [
  'Problem',
  'Settings',
  'examine',
  'marks',
  'read_problems',
  'table',
]
