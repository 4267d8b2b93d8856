"""Sample from a model, or talk to it; the text comes as it is decoded.

  python experiments/sample.py --model=DIR --prompt='Once upon a time'
  python experiments/sample.py --workdir=runs/RUN --chat

DIR is a Hugging Face directory, RUN a training run (of which --step names a
checkpoint). A prompt is taken as it is; --chat, and --prompt with --system, use
the chat template. The text goes to standard output, why it ended to standard
error. The same seed gives the same text, that of postrain.sampling.sample.
"""

import argparse
from collections.abc import Iterable, Iterator
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))

from absl import logging

from postrain import policies
from postrain.compilation import use_cache
from postrain.keys import run_key
from postrain.streaming import TextStream, make_streamer


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    parents=[policies.flags()],
  )
  what = flags.add_mutually_exclusive_group(required=True)
  what.add_argument('--prompt', help='a text to continue')
  what.add_argument(
    '--chat', action='store_true', help='talk: a message a line'
  )
  flags.add_argument('--max_new_tokens', type=int, default=256)
  flags.add_argument('--num_samples', type=int, default=1)
  return flags


def run(flags: argparse.Namespace, lines: Iterable[str]) -> None:
  """Answer the prompt, or each line."""
  policies.check_sampling(**{
    name: getattr(flags, name)
    for name in ('temperature', 'top_k', 'top_p', 'min_p', 'seed')
  })  # fmt: skip
  if flags.num_samples < 1 or (flags.chat and flags.num_samples > 1):
    raise ValueError(
      f'--num_samples={flags.num_samples}: it must be at least 1, and with'
      ' --chat no more'
    )
  policy = policies.from_flags(flags)
  stream = make_streamer(
    policy,
    max_new_tokens=flags.max_new_tokens,
    temperature=flags.temperature,
    top_k=flags.top_k,
    top_p=flags.top_p,
    min_p=flags.min_p,
  )

  def answer(ids: list[int], turn: int, sample: int = 0) -> str:
    key = run_key(flags.seed, 'sample', turn)
    return show(TextStream(policy), stream(ids, key, sample), flags)

  system = [] if flags.system is None else [_message('system', flags.system)]
  if not flags.chat:
    prompt = flags.prompt
    if system or flags.thinking is not None:
      prompt = [*system, _message('user', flags.prompt)]
    ids = policy.encode(prompt)
    for sample in range(flags.num_samples):
      answer(ids, 0, sample)
    return
  messages = list(system)
  for turn, line in enumerate(line for line in lines if line.strip()):
    messages.append(_message('user', line.strip()))
    text = answer(policy.encode(messages), turn)
    messages.append(_message('assistant', text))


def _message(role: str, content: str) -> dict[str, str]:
  return {'role': role, 'content': content}


def show(
  text: TextStream, tokens: Iterator[int], flags: argparse.Namespace
) -> str:
  """Write a completion as it comes, and say why it ended."""
  for token in tokens:
    write(text.push(token))
  write(text.flush())
  write('\n')
  reason = (
    'stop token' if text.stopped else f'--max_new_tokens={flags.max_new_tokens}'
  )
  print(f'[{text.num_tokens} tokens, ended by {reason}]', file=sys.stderr)
  return text.text


def write(text: str) -> None:
  """Write text, on a terminal without what would steer it."""
  if sys.stdout.isatty():
    text = ''.join(
      c if c.isprintable() or c in '\n\t' else ascii(c)[1:-1] for c in text
    )
  sys.stdout.write(text)
  sys.stdout.flush()


def terminal_lines() -> Iterator[str]:
  """Lines of standard input, with a prompt where a person types them."""
  while True:
    try:
      yield input('> ') if sys.stdin.isatty() else next(sys.stdin)
    except (EOFError, StopIteration):
      return


def main(argv: list[str] | None = None) -> None:
  """Parse the flags and run; a mistake is one line."""
  logging.set_verbosity(logging.WARNING)
  flags = parser().parse_args(argv)
  try:
    run(flags, terminal_lines())
  except ValueError as error:
    sys.exit(f'error: {" ".join(str(error).split())}')
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:  # the reader has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
  use_cache()
  main()
