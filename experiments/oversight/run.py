"""How far does a weak judge see into a stronger policy, by protocol?

  python experiments/oversight/run.py --workdir=runs/oversight

Prints a table, and writes results.json and accuracy.png. Nothing is sampled:
these are the formulas of `postrain.feedback.oversight`, which tests hold
against every outcome of every check. Seconds.
"""

import argparse
from collections.abc import Callable
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from postrain import workdir
from postrain.feedback import oversight

ACCURACY = 0.9  # of the judge, on a step
CONTEXT = 4  # steps that it can read
CRITIC = DEBATER = 0.95  # on a step, on a half
VOTES = 9
STEPS = (1, 2, 4, 8, 16, 32, 64)
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
AT_STEPS, AT_STRENGTH = 16, 0.2

Protocol = Callable[..., oversight.Verdict]
PROTOCOLS: dict[str, Protocol] = {
  'blind': lambda steps, **judge: oversight.alone(steps, context=0, **judge),
  'alone': lambda steps, **judge: oversight.alone(
    steps, context=min(CONTEXT, steps), **judge
  ),
  'assisted': lambda steps, **judge: oversight.assisted(
    steps, critic=CRITIC, **judge
  ),
  'debate': lambda steps, **judge: oversight.debate(
    steps, debater=DEBATER, **judge
  ),
  'decomposed': oversight.decomposed,
  f'decomposed, {VOTES} votes': lambda steps, **judge: oversight.decomposed(
    steps, num_votes=VOTES, **judge
  ),
}


def study() -> dict[str, Any]:
  """Figures of each protocol, for each number of steps and strength."""

  def figures(protocol: Protocol, steps: int, strength: float) -> dict:
    verdict = protocol(
      steps, accuracy=ACCURACY, caught=oversight.caught(ACCURACY, strength)
    )
    return dict(
      steps=steps, strength=strength, accuracy=verdict.accuracy,
      **verdict._asdict(),
    )  # fmt: skip

  return {
    name: [figures(protocol, k, s) for k in STEPS for s in STRENGTHS]
    for name, protocol in PROTOCOLS.items()
  }


def at(rows: list[dict[str, Any]], steps: int, strength: float) -> dict:
  """The figures of one setting."""
  (found,) = (
    r for r in rows if (r['steps'], r['strength']) == (steps, strength)
  )
  return found


def table(found: dict[str, Any]) -> str:
  """Accuracy against the number of steps, then against the strength."""
  steps, strengths = (1, 4, 16, 64), (0.2, 0.4)
  heads = [f'K = {k}' for k in steps]
  heads += [f'K = {AT_STEPS}, strength {s}' for s in strengths]
  heads.append(f'checks, K = {AT_STEPS}')
  lines = ['| judge | ' + ' | '.join(heads) + ' |', '|' + ' --- |' * 8]
  for name, rows in found.items():
    cells = [at(rows, k, 0.0) for k in steps]
    cells += [at(rows, AT_STEPS, s) for s in strengths]
    values = [f'{cell["accuracy"]:.2f}' for cell in cells]
    checks = at(rows, AT_STEPS, 0.0)['checks']
    lines.append(f'| {name} | ' + ' | '.join(values) + f' | {checks} |')
  return '\n'.join(lines)


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
  from matplotlib.figure import Figure

  figure = Figure((8.4, 3.2), layout='constrained')
  left, right = figure.subplots(1, 2, sharey=True)
  left.set(xlabel='steps', ylabel='accuracy of the judge', xscale='log')
  left.set_title(f'strength {AT_STRENGTH}', fontsize='small')
  left.set_xticks(STEPS, [str(k) for k in STEPS])
  left.minorticks_off()
  right.set(xlabel='strength of the policy')
  right.set_title(f'{AT_STEPS} steps', fontsize='small')
  for name, rows in found.items():
    by_steps = [at(rows, k, AT_STRENGTH)['accuracy'] for k in STEPS]
    left.plot(STEPS, by_steps, marker='.', label=name)
    by_strength = [at(rows, AT_STEPS, s)['accuracy'] for s in STRENGTHS]
    right.plot(STRENGTHS, by_strength, marker='.')
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.legend(loc='outside right upper', fontsize='x-small')
  figure.savefig(path, dpi=80)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  flags = parser.parse_args()
  flags.workdir.mkdir(parents=True, exist_ok=True)
  found = study()
  record = {'commit': workdir.commit(), **found}
  workdir.write_json(str(flags.workdir / 'results.json'), record)
  draw(found, flags.workdir / 'accuracy.png')
  print(table(found))


if __name__ == '__main__':
  main()
