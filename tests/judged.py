"""Rewards of the tests of workers, which import this file: it stays light."""

import os
import time


def process(completions: list, examples: list) -> list[int]:
  """Who graded."""
  return [os.getpid()] * len(completions)


def position(completions: list, examples: list) -> list[float]:
  """The place of a completion among those of its prompt; odd values."""
  return [i + len(c.text) / 3 for i, c in enumerate(completions)]


def fickle(completions: list, examples: list) -> list[float | None]:
  """What the examples ask for."""
  rewards: list[float | None] = []
  for example in examples:
    wish = example.get('wish')
    if wish == 'raise':
      raise KeyError('answer')
    if wish == 'exit':
      os._exit(3)
    if wish == 'sleep':
      time.sleep(60)
    rewards.append(None if wish == 'none' else 1.0)
  return rewards
