"""GRPO of published shapes on TPU topologies that are not here: a table.

  python experiments/scaling/run.py --part=cells [--only=CELL]
  python experiments/scaling/run.py --part=table
  python experiments/scaling/run.py --part=weak
  python experiments/scaling/run.py --part=paper

cells: `experiments/compile_for.py` for each row of `CELLS`, with the compiler
of TPUs (``pip install 'postrain[tpu]'``), to a file of ``reports`` each; those
that exist are not compiled again. table: what the files say, as docs/scaling.md
has it. weak: an update of a small decoder, its batch growing with the devices,
on 1 to 256 virtual ones: the bytes that a device sends, in weak.json and
weak.png. paper: how long an iteration takes at least, from the tables of the
vendor.
"""

import argparse
import json
import math
import pathlib
import re
import subprocess
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

# Shape, topology, mesh, other settings. fsdp takes the chips that are left.
CELLS: tuple[tuple[str, str, dict[str, int]], ...] = (
  ('qwen2.5-0.5b', 'v5e:4x4', {}),
  ('qwen2.5-7b', 'v5e:4x4', {}),
  ('qwen2.5-7b', 'v5e:4x4', {'tensor': 4}),
  ('qwen2.5-7b', 'v6e:8x8', {}),
  ('qwen2.5-7b', 'v5p:4x4x4', {}),
  ('qwen2.5-7b', 'v5p:4x4x4', {'tensor': 4}),
  ('qwen2.5-7b', 'v5p:4x4x8', {'tensor': 4}),
  ('qwen2.5-32b', 'v6e:8x8', {'tensor': 4}),
  ('qwen2.5-32b', 'v5p:4x4x4', {'tensor': 4}),
  ('qwen2.5-32b', 'v5p:4x4x8', {'tensor': 8}),
  ('qwen3-30b-a3b', 'v6e:8x8', {'expert': 8}),
  ('qwen3-30b-a3b', 'v5p:4x4x4', {'expert': 8}),
  ('qwen3-30b-a3b', 'v5p:4x4x8', {'expert': 8, 'tensor': 4}),
)
PROMPTS = 256  # of an iteration of the config
PROGRAMS = ('update', 'sample')
DEVICES = (1, 4, 16, 64, 256)
# Of weak scaling: the axis that grows, and what the others are.
WEAK: dict[str, tuple[str, dict[str, int]]] = {
  'data': ('data', {}),
  'fsdp': ('fsdp', {}),
  'fsdp x tensor=4': ('fsdp', {'tensor': 4}),
}


def command(shape: str, topology: str, mesh: dict[str, int]) -> list[str]:
  """What compiles a cell: slices of one prompt, 8 sequences, a device."""
  chips = math.prod(int(n) for n in topology.partition(':')[2].split('x'))
  slices = PROMPTS * mesh.get('tensor', 1) // chips
  sizes = [f'--config.mesh.{axis}={size}' for axis, size in mesh.items()]
  return [
    'experiments/compile_for.py', f'--topology={topology}',
    f'--config=configs/scaling.py:{shape}', *sizes,
    f'--config.rl.num_micro_batches={slices}',
    f'--config.rl.num_score_slices={slices}',
    f'--programs={",".join(PROGRAMS)}',
  ]  # fmt: skip


def name_of(shape: str, topology: str, mesh: dict[str, int]) -> str:
  sizes = [f'{axis}{size}' for axis, size in mesh.items()]
  return '-'.join([shape, topology.replace(':', '-'), *sizes])


def cells(only: str | None) -> None:
  known = {name_of(*cell): command(*cell) for cell in CELLS}
  if only is not None and only not in known:
    sys.exit(f'--only={only} is no cell; there are: {", ".join(known)}')
  (HERE / 'reports').mkdir(exist_ok=True)
  for name, line in known.items():
    path = HERE / 'reports' / f'{name}.json'
    if path.exists() or only not in (None, name):
      continue
    print(name, flush=True)
    # That it does not fit is an answer, and in the file.
    subprocess.run([sys.executable, *line, f'--out={path}'], cwd=ROOT)
    if not path.exists():
      sys.exit(f'failed: {" ".join(line)}')
  table()


def table() -> None:
  print('| cell | mesh | program | a chip holds | sent a chip | |')
  print('|' + ' --- |' * 6)
  for cell in CELLS:
    path = HERE / 'reports' / f'{name_of(*cell)}.json'
    if not path.exists():
      print(f'| `{path.stem}` | | | | | not compiled |')
      continue
    found = json.loads(path.read_text())
    sizes = ' x '.join(f'{k}={v}' for k, v in found['mesh'].items() if v > 1)
    for program, figures in found['programs'].items():
      columns = f'`{path.stem}`', sizes, f'`{program}`', *weighed(figures)
      print('| ' + ' | '.join(columns) + ' |')


def weighed(figures: dict[str, Any]) -> tuple[str, str, str]:
  """What a chip holds and sends, and by how much that is too much."""
  if 'total' not in figures:
    needed, there = re.findall(r'\(([\d.]+)G\)', figures['refused'])
    return f'over {needed} GiB', '', f'does not fit in {there} GiB'
  held, sent = (
    f'{size / 2**30:.1f} GiB' for size in (figures['total'], moved(figures))
  )
  return held, sent, '' if figures['fits'] else 'does not fit'


def moved(figures: dict[str, Any]) -> float:
  """Bytes that a device sends in a run of a program."""
  return sum(kind['bytes'] for kind in figures['traffic'].values())


def weak() -> None:
  path = HERE / 'weak.json'
  found = json.loads(path.read_text()) if path.exists() else {}
  for label, (axis, others) in WEAK.items():
    for number in DEVICES:
      shared = math.prod(others.values())
      done = found.setdefault(label, {})
      if number % shared == 0 and str(number) not in done:
        sizes = {**others, axis: number // shared}
        done[str(number)] = update(sizes)['traffic']
        path.write_text(json.dumps(found, indent=1) + '\n')
  plot(weak_table())


def weak_table() -> dict[str, dict[int, float]]:
  """Print what weak.json says, and return bytes by mesh and devices."""
  found = json.loads((HERE / 'weak.json').read_text())
  sent = {
    label: {int(n): moved({'traffic': kinds}) for n, kinds in done.items()}
    for label, done in found.items()
  }
  print('| devices | ' + ' | '.join(sent) + ' |')
  print('|' + ' --- |' * (1 + len(sent)))
  for number in DEVICES:
    row = [
      f'{each[number] / 1e6:.1f} MB' if number in each else ''
      for each in sent.values()
    ]
    print(f'| {number} | ' + ' | '.join(row) + ' |')
  return sent


def update(sizes: dict[str, int]) -> dict[str, Any]:
  """The report of an update on a mesh, 2 prompts for each that shares rows."""
  import jax

  from configs import scaling
  from postrain import topologies

  # Nothing is run: how fast it would be does not matter.
  jax.config.update('jax_disable_most_optimizations', True)
  devices = topologies.devices_of(f'cpu:{max(DEVICES)}')
  config = scaling.get_config('miniature')
  config.model.dtype = 'float32'  # XLA's CPU fails on sums of bfloat16
  config.mesh.update({'fsdp': 1, **sizes})
  config.rl.num_prompts = 2 * sizes.get('data', 1) * sizes.get('fsdp', 1)
  config.rl.update(num_micro_batches=1, num_score_slices=1)
  devices = devices[: math.prod(sizes.values())]
  (figures,) = topologies.report(config, devices, ['update'])[
    'programs'
  ].values()
  return figures


# Of a chip: bfloat16 FLOP/s, bytes a second of its memory and to others.
CHIPS = {
  'v5e': (197e12, 0.82e12, 200e9),
  'v5p': (459e12, 2.77e12, 600e9),
  'v6e': (918e12, 1.64e12, 448e9),
}
PARAMETERS = {
  'qwen2.5-0.5b': 0.49e9,
  'qwen2.5-7b': 7.6e9,
  'qwen2.5-32b': 32.8e9,
}
LENGTH, SAMPLES = 1024, 8  # of a prompt and of a completion; of a prompt


def paper() -> None:
  """Least seconds of the phases of an iteration, parameters cut over fsdp.

  The update multiplies 8 N times a token (2 forward, 2 again, 4 backward) and
  moves 12 N bytes a slice: gathered twice and scattered once, for prompts and
  for completions. Decoding reads 2 N bytes a token whatever the rows, and cuts
  them over `tensor` alone.
  """
  print('| shape | chips | update, products | update, traffic | sampling |')
  print('|' + ' --- |' * 5)
  tokens = PROMPTS * (SAMPLES + 1) * LENGTH
  for shape, size in PARAMETERS.items():
    for kind, (peak, memory, links) in CHIPS.items():
      for chips in (16, 64, 256, 1024, 4096):
        slices = max(PROMPTS / chips, 1)
        products = 8 * size * tokens / chips / peak
        traffic = slices * 12 * size / links
        sampling = LENGTH * 2 * size / memory
        print(
          f'| {shape} | {chips} {kind} | {products:.2f} s | {traffic:.2f} s |'
          f' {sampling:.2f} s |'
        )
  print('tokens of a chip and slice at which products take as long as traffic:')
  for kind, (peak, _, links) in CHIPS.items():
    print(f'{kind}: {12 * peak / (8 * links):.0f}')


def plot(found: dict[str, dict[int, float]]) -> None:
  import matplotlib as mpl

  mpl.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(5, 3.5))
  for label, sent in found.items():
    axes.plot(list(sent), [v / 1e6 for v in sent.values()], 'o-', label=label)
  axes.set_xscale('log', base=2)
  axes.set_xlabel('devices')
  axes.set_ylabel('MB that a device sends in an update')
  axes.legend()
  figure.savefig(HERE / 'weak.png', dpi=120, bbox_inches='tight')


def main() -> None:
  parts = {'table': table, 'weak': weak, 'paper': paper}
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--part', choices=['cells', *parts], required=True)
  parser.add_argument('--only', help='one cell, by its name in the table')
  flags = parser.parse_args()
  if flags.part == 'cells':
    cells(flags.only)
  else:
    parts[flags.part]()


if __name__ == '__main__':
  main()
