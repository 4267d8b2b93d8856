"""Examine a model on a data set; the same command again continues.

  python experiments/evaluate.py --model=DIR --data=gsm8k/test.jsonl \\
    --prompt_template=$'Question: {question}\\nAnswer:' --num_samples=8 \\
    --output=runs/gsm8k

DIR is a Hugging Face directory; --workdir=RUN (and --step) takes the checkpoint
of a training run. Prints greedy accuracy, mean@n, pass@k and maj@n with their
95% intervals; the output directory has every completion, its answer and its
grade. Data sets of GSM8K, SVAMP and others are known by their fields.
"""

import argparse
import dataclasses
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))

from absl import logging

from postrain import exam, policies
from postrain.compilation import use_cache


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    parents=[policies.flags()],
  )
  flags.add_argument('--data', required=True, help='JSON lines')
  flags.add_argument('--output', required=True, help='a directory')
  flags.add_argument('--layout', help='of the data; recognised')
  flags.add_argument('--question_field', help='instead of a layout')
  flags.add_argument('--answer_field', help='instead of a layout')
  flags.add_argument('--num_examples', type=int, help='the first; all')
  flags.add_argument('--style', choices=('plain', 'chat'), default='plain')
  flags.add_argument('--prompt_template', help='with {question} in it')
  flags.add_argument('--max_new_tokens', type=int, default=512)
  flags.add_argument('--num_samples', type=int, default=0)
  flags.add_argument(
    '--ks', help='of pass@k, with commas; the powers of two up to num_samples'
  )
  flags.add_argument('--batch_size', type=int, default=16, help='problems')
  flags.add_argument(
    '--grader', help='accuracy, choice, exact_match or another'
  )
  flags.add_argument(
    '--extract', default='any',
    choices=('any', 'marker', 'boxed', 'tags', 'phrase', 'last'),
  )  # fmt: skip
  flags.add_argument('--marker', default='####')
  return flags


def pass_counts(flags: argparse.Namespace) -> tuple[int, ...]:
  """The k of pass@k."""
  if flags.ks is None:
    powers = (2**i for i in range(max(flags.num_samples, 0).bit_length()))
    return tuple(powers)
  try:
    return tuple(int(k) for k in flags.ks.split(','))
  except ValueError as error:
    raise ValueError(f'--ks={flags.ks}: expected numbers like 1,2,4') from error


def run(flags: argparse.Namespace) -> None:
  """Read, examine, print."""
  problems, layout, grader = exam.read_problems(
    flags.data,
    layout=flags.layout,
    question_field=flags.question_field,
    answer_field=flags.answer_field,
    num_examples=flags.num_examples,
  )
  grader = flags.grader or grader
  note(
    f'{len(problems)} problems of {flags.data}: {layout}, graded by {grader}'
  )
  policy = policies.from_flags(flags)
  given = vars(flags) | {
    'template': flags.prompt_template,
    'ks': pass_counts(flags),
    'grader': grader,
  }
  names = [field.name for field in dataclasses.fields(exam.Settings)]
  settings = exam.Settings(**{name: given[name] for name in names})
  results = exam.examine(policy, problems, settings, flags.output, report=note)
  print(exam.table(results))


def note(line: str) -> None:
  """Tell how it goes."""
  print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
  """Parse the flags and run; a mistake is one line."""
  logging.set_verbosity(logging.WARNING)
  flags = parser().parse_args(argv)
  try:
    run(flags)
  except ValueError as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
  use_cache()
  main()
