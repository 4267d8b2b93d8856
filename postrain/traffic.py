"""What passes between devices, from the text of a compiled program."""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

KINDS = (
  'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip
# A type without a width is of opaque tokens.
BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
  's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
}  # fmt: skip
HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
COLLECTIVE = re.compile(rf' ({"|".join(KINDS)})(?:-start)?\(')
CALLED = re.compile(r'(?:calls|to_apply|branch_computations)=\{?([^,}\s]+)')
ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')


class Traffic(NamedTuple):
  """Of one kind of collective, in one run of a program.

  Attributes:
    count: instructions in the text, where the body of a loop stands once.
    runs: how often they run; a loop of unknown length counts once.
    bytes: that a device sends, over a ring.
  """

  count: int
  runs: int
  bytes: float


def traffic(text: str) -> dict[str, Traffic]:
  """Collectives of a compiled program by kind.

  A device of n sends (n − 1)/n of what is gathered, exchanged or, before it is
  reduced, scattered, and twice that of what is reduced for all.

  Args:
    text: ``compiled.as_text()``.
  """
  computations, entry = _computations(text)
  found: dict[str, dict] = {}
  for name, times in _runs(computations, entry).items():
    scattered = 'all-reduce-scatter' in name  # how a TPU writes that kind
    for line in computations[name]:
      if match := COLLECTIVE.search(line):
        kind = 'reduce-scatter' if scattered else match[1]
        sent = _sent(line, match, kind, scattered)
        channel = re.search(r'channel_id=(\d+)', line)
        # An asynchronous one is repeated in the parts that wait for it.
        key = channel[1] if channel else line
        known = found.setdefault(kind, {})
        known[key] = max(known.get(key, (0, 0.0)), (times, sent * times))
  return {
    kind: Traffic(
      len(found[kind]),
      sum(times for times, _ in found[kind].values()),
      sum(sent for _, sent in found[kind].values()),
    )
    for kind in KINDS
    if kind in found
  }


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation, and the name of the first to run."""
  found, entry, lines = {}, '', []
  for line in text.splitlines():
    if match := HEADER.match(line):
      lines = found[match[2]] = []
      entry = match[2] if match[1] else entry
    else:
      lines.append(line)
  return found, entry


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
  """How often each computation runs."""
  runs = dict.fromkeys(computations, 0)

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for line in computations[name]:
      for callee, repeats in _calls(line, computations):
        visit(callee, times * repeats)

  visit(entry, 1)
  return {name: times for name, times in runs.items() if times}


def _calls(
  line: str, computations: dict[str, list[str]]
) -> Iterator[tuple[str, int]]:
  """What an instruction calls, and how often."""
  if ' while(' in line:
    parts = dict(re.findall(r'(condition|body)=%?([\w.\-]+)', line))
    yield parts['body'], _length(line, computations[parts['condition']])
    return
  if COLLECTIVE.search(line):
    return  # its reducer
  for names in CALLED.findall(line):
    for name in names.split(','):
      if (known := name.strip(' %')) in computations:
        yield known, 1


def _length(line: str, condition: list[str]) -> int:
  """Turns of a loop; 1 where only its run can tell."""
  if known := re.search(r'known_trip_count[^\d]*(\d+)', line):
    return int(known[1])
  bounds = [
    int(match[1])
    for each in condition
    if (match := re.search(r's32\[\]\S* constant\((\d+)\)', each))
  ]
  compared = any('direction=LT' in each for each in condition)
  return bounds[0] if len(bounds) == 1 and compared else 1


def _sent(line: str, match: re.Match, kind: str, operand: bool) -> float:
  """Bytes that a device sends for one instruction."""
  size = _group(line)
  result = line[line.index('=') : match.start()]
  arrays = [_size(*found) for found in ARRAY.findall(result)]
  # A started one holds its operand too.
  largest = max(arrays, default=0) if '-start' in match[0] else sum(arrays)
  share = (size - 1) / size
  if kind == 'reduce-scatter':
    return largest * share * (1 if operand else size)
  factors = {'all-reduce': 2 * share, 'collective-permute': 1.0}
  return largest * factors.get(kind, share)


def _size(dtype: str, dims: str) -> int:
  return BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(',') if n)


def _group(line: str) -> int:
  """Devices that take part in one group."""
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', line):
    return len(match[1].split(','))
  if match := re.search(r'replica_groups=\[([\d,]+)\]', line):
    return int(match[1].split(',')[-1])
  if match := re.search(r'replica_groups=mesh\[([^\]]+)\] \{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[a]) for a in re.findall(r"'(\w+)'", match[2]))
  return 2  # a permutation names pairs
