"""A figure beside what it should be."""

from typing import NamedTuple


class Check(NamedTuple):
  """``expected`` is a number with a tolerance, or a bound from below."""

  study: str
  name: str
  found: float
  expected: float
  tolerance: float | None  # None: found must exceed expected

  @property
  def passed(self) -> bool:
    if self.tolerance is None:
      return self.found > self.expected
    return abs(self.found - self.expected) <= self.tolerance

  def row(self) -> dict[str, object]:
    return {**self._asdict(), 'passed': self.passed}


def report(checks: list[Check]) -> str:
  """One markdown table per study."""
  lines = []
  for study in dict.fromkeys(check.study for check in checks):
    lines += ['', study, '', '| figure | found | expected | |']
    lines.append('| --- | --- | --- | --- |')
    for check in checks:
      if check.study == study:
        expected = f'{check.expected:.4g} ± {check.tolerance or 0:.2g}'
        if check.tolerance is None:
          expected = f'> {check.expected:.4g}'
        verdict = 'pass' if check.passed else 'FAIL'
        lines.append(
          f'| {check.name} | {check.found:.4g} | {expected} | {verdict} |'
        )
  return '\n'.join(lines)
