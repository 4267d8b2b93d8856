"""Write the table of presets: one row for each, one column for each axis.

python experiments/presets/table.py > docs/presets.md
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from configs.presets import PREFERENCES, PRESETS
from postrain import losses
from postrain.batches import asked

HEAD = """# Presets

What each paper asks for, and what popular trainers compute by default under its
name. `presets.apply(config, 'grpo/trl')` of `configs/presets.py` sets the axes.
A test holds the loss and the gradient of every row against the oracles, and
where `tests/reference/presets.json` has values of the trainer (TRL 1.16.0, verl
0.9.1, Tunix 0.1.7, written by `experiments/peers/generate.py`) against those.
`length=None` is the limit of new tokens. Written by
`experiments/presets/table.py`.

The selection is a mask over the whole minibatch: a loss that asks for
`selected` gets it, for any other it says what trains. ReMax samples one greedy
completion more for each prompt; GDPO takes its weights from those of the
rewards. KL in the reward is taken from each token where the advantage is one of
tokens.

| preset | advantage | loss | aggregation | selection | KL |
| --- | --- | --- | --- | --- | --- |
"""
PAIRS = """
## Preferences

The loss of `objectives.preference`, or for KTO of `objectives.unpaired`, whose
reference point `couplings.with_reference_point` takes over the whole minibatch:
`presets.preset('dpo/trl')` gives both blocks of a row. Every row is the mean
over pairs or completions. The supervised term imitates the chosen completions;
losses with a likelihood of their own have it in the loss. ORPO of TRL imitates
the prompt too and has no row.

| preset | loss | reference | supervised term |
| --- | --- | --- | --- |
"""


def cell(block: dict | None) -> str:
  if block is None:
    return '-'
  options = ', '.join(f'{k}={v}' for k, v in block.items() if k != 'name')
  return f'`{block["name"]}`' + (f' {options}' if options else '')


def divergence(block: dict) -> str:
  if 'estimator' not in block:
    return '-'
  name = block['estimator']['name']
  if block['loss_coef'] is not None:
    return f'`{name}` in the loss, {block["loss_coef"]}'
  return f'`{name}` in the reward, {block["reward_coef"]}'


def row(algorithm: str, source: str, *cells: str) -> None:
  print('|', ' | '.join([f'{algorithm}/{source}', *cells]), '|')


def main() -> None:
  print(HEAD, end='')
  for algorithm, sources in PRESETS.items():
    for source, blocks in sources.items():
      axes = ('advantage', 'loss', 'aggregation', 'selection')
      cells = [cell(blocks[k]) for k in axes]
      row(algorithm, source, *cells, divergence(blocks['kl']))
  print(PAIRS, end='')
  for algorithm, sources in PREFERENCES.items():
    for source, blocks in sources.items():
      loss, sft = blocks['loss'], blocks['sft']
      wanted = asked(getattr(losses, loss['name']))
      reference = any(name.startswith('ref_') for name in wanted)
      term = cell(sft['aggregation']) + f' {sft["coef"]}' if sft else '-'
      row(algorithm, source, cell(loss), 'yes' if reference else '-', term)


if __name__ == '__main__':
  main()
