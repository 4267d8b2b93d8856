"""GRPO of published shapes on TPU topologies that are not here: a table.

  python experiments/scaling/run.py --part=cells
  python experiments/scaling/run.py --part=weak
  python experiments/scaling/run.py --part=paper

cells: `experiments/compile_for.py` for each row of `CELLS`, with the compiler
of TPUs (``pip install 'postrain[tpu]'``), to one JSON file each; those that
exist are not compiled again. weak: the update of the smallest shape, its batch
growing with the devices, on 1 to 256 virtual ones; bytes that a device sends.
paper: how long an iteration takes at least, from the tables of the vendor. All
print a table; weak draws weak.png.
"""

import argparse
import json
import math
import os
import pathlib
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
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WEAK = {'data': 'data', 'fsdp': 'fsdp', 'fsdp x tensor=4': 'tensor'}


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


def compiled(name: str, line: list[str], env: dict[str, str]) -> dict[str, Any]:
  """The report of a cell, from its file where there is one."""
  path = HERE / 'reports' / f'{name}.json'
  if not path.exists():
    path.parent.mkdir(exist_ok=True)
    done = subprocess.run(
      [sys.executable, *line, f'--out={path}'], cwd=ROOT, check=False,
      capture_output=True, text=True, env=env,
    )  # fmt: skip
    if not path.exists():
      sys.exit(f'{" ".join(line)}\n{done.stderr[-2000:]}')
  return json.loads(path.read_text())


def cells() -> None:
  print('| shape | chips | mesh | program | a chip holds | sent a chip | |')
  print('|' + ' --- |' * 7)
  for shape, topology, mesh in CELLS:
    name = '-'.join(
      [shape, topology.replace(':', '-'), *(f'{k}{v}' for k, v in mesh.items())]
    )
    found = compiled(name, command(shape, topology, mesh), dict(os.environ))
    sizes = ' x '.join(f'{k}={v}' for k, v in found['mesh'].items() if v > 1)
    for program, figures in found['programs'].items():
      held = verdict = sent = ''
      if 'total' in figures:
        held = f'{figures["total"] / 2**30:.1f} GiB'
        sent = f'{moved(figures) / 2**30:.1f} GiB'
      if not figures['fits']:
        verdict = 'does not fit'
      print(
        f'| {shape} | {topology} | {sizes} | `{program}` | {held} | {sent} |'
        f' {verdict} |',
        flush=True,
      )


def moved(figures: dict[str, Any]) -> float:
  """Bytes that a device sends in a run of a program."""
  return sum(kind['bytes'] for kind in figures['traffic'].values())


def weak() -> None:
  found: dict[str, dict[int, float]] = {}
  for label, axis in WEAK.items():
    for number in DEVICES:
      if axis == 'tensor' and number < 4:
        continue
      mesh = {'data': 1, 'fsdp': 1, 'tensor': 4 if axis == 'tensor' else 1}
      mesh['fsdp' if axis == 'tensor' else axis] = number // mesh['tensor']
      rows = max(number // mesh['tensor'], 1)
      line = [
        'experiments/compile_for.py', f'--topology=cpu:{number}',
        '--config=configs/scaling.py:qwen2.5-0.5b', '--programs=update',
        *(f'--config.mesh.{k}={v}' for k, v in mesh.items()),
        f'--config.rl.num_prompts={rows}', '--config.rl.num_micro_batches=1',
        '--config.rl.num_score_slices=1',
      ]  # fmt: skip
      report = compiled(f'weak-{axis}-{number}', line, dict(os.environ))
      (figures,) = report['programs'].values()
      found.setdefault(label, {})[number] = moved(figures)
  print('| devices | ' + ' | '.join(found) + ' |')
  print('|' + ' --- |' * (1 + len(found)))
  for number in DEVICES:
    row = [f'{found[k][number] / 1e9:.2f} GB' if number in found[k] else ''
           for k in found]  # fmt: skip
    print(f'| {number} | ' + ' | '.join(row) + ' |')
  plot(found)


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
    axes.plot(list(sent), [v / 1e9 for v in sent.values()], 'o-', label=label)
  axes.set_xscale('log', base=2)
  axes.set_xlabel('devices')
  axes.set_ylabel('GB that a device sends in an update')
  axes.legend()
  figure.savefig(HERE / 'weak.png', dpi=120, bbox_inches='tight')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--part', choices=['cells', 'weak', 'paper'], required=True
  )
  {'cells': cells, 'weak': weak, 'paper': paper}[parser.parse_args().part]()


if __name__ == '__main__':
  main()
