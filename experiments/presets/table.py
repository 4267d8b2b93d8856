"""Write the table of presets: one row for each, one column for each axis.

python experiments/presets/table.py > docs/presets.md
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from configs.presets import PRESETS

HEAD = """# Presets

What each paper asks for, and what popular trainers compute by default under its
name. `presets.apply(config, 'grpo/trl')` of `configs/presets.py` sets the axes;
a test holds the loss and the gradient of every row of a trainer against that
trainer (TRL 1.16.0, verl 0.9.1, Tunix 0.1.7; the values are written by
`experiments/peers/generate.py`). `length=None` is the limit of new tokens.
Written by `experiments/presets/table.py`.

| preset | advantage | loss | aggregation | KL |
| --- | --- | --- | --- | --- |
"""


def cell(block: dict) -> str:
  options = ', '.join(f'{k}={v}' for k, v in block.items() if k != 'name')
  return f'`{block["name"]}`' + (f' {options}' if options else '')


def divergence(block: dict) -> str:
  if 'estimator' not in block:
    return '-'
  name = block['estimator']['name']
  if block['loss_coef'] is not None:
    return f'`{name}` in the loss, {block["loss_coef"]}'
  return f'`{name}` in the reward, {block["reward_coef"]}'


def main() -> None:
  print(HEAD, end='')
  for algorithm, sources in PRESETS.items():
    for source, blocks in sources.items():
      axes = (blocks[k] for k in ('advantage', 'loss', 'aggregation'))
      cells = [f'{algorithm}/{source}', *map(cell, axes)]
      print('|', ' | '.join([*cells, divergence(blocks['kl'])]), '|')


if __name__ == '__main__':
  main()
