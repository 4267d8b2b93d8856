"""What every side of a measurement shares: flags, rows, and the pipe.

A side is a program that loads the weights, answers once when it is ready, and
then does one step for each line 'step' that it reads. An answer is a line of
JSON. This file needs the standard library alone.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import resource
import sys
import time
from typing import Any

from benchmarks.shapes import EOS, SHAPES

JOBS = ('generate', 'grpo', 'ppo', 'dpo', 'sft')
TRAJECTORY = 'dpo_sgd'  # compared, not timed
NUM_CHECKED = 8  # sequences whose log-probs are compared


def options() -> argparse.Namespace:
  """The flags of a side; ``shape`` becomes one of `SHAPES`."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--job', required=True)
  parser.add_argument('--shape', required=True, type=SHAPES.__getitem__)
  parser.add_argument('--folder', required=True, help='weights and rows')
  parser.add_argument('--workdir', required=True, help='of this side alone')
  parser.add_argument('--micro_batches', type=int, default=1)
  return parser.parse_args()


class Session:
  """The pipe to the driver, in place of the standard output."""

  def __init__(self) -> None:
    self._pipe = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what a library prints is no answer
    self._cpu, self._system, self._start = 0.0, 0.0, time.perf_counter()

  def answer(self, **figures: Any) -> None:
    """Report a step and wait for the next; the process may end here.

    CPU seconds count from answer to answer, so that work that goes on behind
    an answer belongs to the next one.
    """
    cpu, now = time.process_time(), time.perf_counter()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = {
      'cpu': cpu - self._cpu,
      'system': usage.ru_stime - self._system,  # of it; fresh pages, mostly
      'wall': now - self._start,
      'peak_mib': usage.ru_maxrss / 1024,
    }
    print(json.dumps(spent | figures), file=self._pipe, flush=True)
    if sys.stdin.readline() != 'step\n':
      os._exit(0)  # also from a thread, and without a last checkpoint
    self._cpu, self._system = cpu, usage.ru_stime
    self._start = time.perf_counter()


@functools.cache
def session() -> Session:
  """The one of this process."""
  return Session()


def rows(folder: str, name: str) -> list[dict[str, str]]:
  """The rows of a file of texts."""
  with open(os.path.join(folder, f'{name}.jsonl'), encoding='utf-8') as lines:
    return [json.loads(line) for line in lines]


def ids(text: str) -> list[int]:
  """The tokens of a text of words."""
  return [int(word[1:]) for word in text.split()]


def checked(folder: str) -> tuple[list[list[int]], list[list[int]]]:
  """Prompts and completions whose log-probs every side gives."""
  found = rows(folder, 'demonstrations')[:NUM_CHECKED]
  return [ids(r['prompt']) for r in found], [
    [*ids(r['completion']), EOS] for r in found
  ]


def even_share(text: str) -> float:
  """The reward: the share of words with an even number."""
  words = text.split()
  return sum(w[-1] in '02468' for w in words) / max(len(words), 1)


def versions(*packages: str) -> dict[str, str]:
  """What is installed of them."""
  return {name: importlib.metadata.version(name) for name in packages}
