"""Memory and time of weights in and out.

  python benchmarks/weights.py

Makes a checkpoint of random weights in a temporary folder, and then, each in a
process of its own, loads it onto the devices, keeps it on the host, and
exports it from the devices to files of 100 MiB; beside these what this
replaced: read every tensor on the host, stack the layers there, and put them on
the devices, or gather every tensor and write them to one file.

What is shown is the most memory beyond the parameters themselves, in MiB and
over the largest tensor of the files, the embedding. Anonymous memory is what
the process allocated: a thread reads RssAnon of /proc/self/status each
millisecond, and the start, after the same of a small model, is taken off; what
compiling for the shapes of the large one takes is left in.
Resident memory, RssAnon + RssFile, has the pages of the files too, which are
mapped until the loading ends and which the system may drop whenever it needs
them. Devices are CPU here, so that their memory is in both figures.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..'))

from flax import traverse_util
import jax
import numpy as np

from postrain import hub, sharding
from postrain.models import families
from postrain.models.config import Config
from postrain.models.transformer import transformer

MEBIBYTE = 2**20
SHARD_BYTES = 100 * MEBIBYTE
BIG = Config(
  vocab_size=32_000, num_layers=16, model_dim=768, mlp_dim=2048, num_heads=12,
  num_kv_heads=4, head_dim=64, tie_embeddings=False, dtype='bfloat16',
  param_dtype='bfloat16',
)  # fmt: skip
SMALL = dataclasses.replace(
  BIG, vocab_size=64, num_layers=2, model_dim=64, mlp_dim=64
)
WAYS = ('stream', 'host', 'export', 'read all', 'gather all')


def write(path: pathlib.Path, config: Config) -> None:
  draw = np.random.default_rng(0)
  params = {
    name: draw.standard_normal(shape, np.float32).astype(config.param_dtype)
    for name, shape in families.param_shapes(config).items()
  }
  params = traverse_util.unflatten_dict(params)
  hub.save(path, config, params, max_shard_bytes=SHARD_BYTES)


def read_all(path: pathlib.Path, shardings: Any) -> Any:
  """What `postrain.hub.load` was: every tensor, stacked on the host."""
  from safetensors import safe_open

  opened = hub.open(path, dtype='bfloat16')
  leaves = {
    name: np.empty(shape, opened.config.param_dtype)
    for name, shape in families.param_shapes(opened.config).items()
  }
  files = {e.path for e in opened.entries.values()}
  files = {file: safe_open(file, 'numpy') for file in files}
  for name, tensor in families.tensors(opened.config).items():
    value = files[opened.entries[name].path].get_tensor(name)
    for part, where in tensor.slices():
      leaves[part.path][part.index] = part.restored(value[where])
  return jax.device_put(traverse_util.unflatten_dict(leaves), shardings)


def gather_all(path: pathlib.Path, config: Config, params: Any) -> None:
  """What `postrain.hub.save` was: the tensors of a file at once."""
  from safetensors.numpy import save_file

  leaves: Any = traverse_util.flatten_dict(params)
  places = families.tensors(config)
  path.mkdir()
  tensors = {name: place.stored(leaves) for name, place in places.items()}
  save_file(tensors, path / hub.SINGLE)


def run(way: str, path: pathlib.Path, out: pathlib.Path, measure: Any) -> Any:
  """Go one way; the preparation is not measured."""
  opened = hub.open(path, dtype='bfloat16')
  mesh = sharding.make_mesh(fsdp=len(jax.devices()))
  shardings = sharding.param_shardings(mesh, transformer(opened.config))
  match way:
    case 'stream':
      return measure(lambda: hub.read(opened, shardings))
    case 'host':
      return measure(lambda: hub.read(opened))
    case 'read all':
      return measure(lambda: read_all(path, shardings))
  params = hub.read(opened, shardings)
  fn = functools.partial(hub.save, max_shard_bytes=SHARD_BYTES)
  if way == 'gather all':
    fn = gather_all
  return measure(functools.partial(fn, out, opened.config, params))


def resident() -> np.ndarray:
  """Anonymous memory, and with mapped files, in MiB."""
  text = pathlib.Path('/proc/self/status').read_text()
  lines = dict(line.split(':', 1) for line in text.splitlines())
  own, mapped = (int(lines[k].split()[0]) for k in ('RssAnon', 'RssFile'))
  return np.array([own, own + mapped]) / 1024


def measured(fn: Any) -> tuple[np.ndarray, float]:
  """The peak above the start in MiB, without what is kept, and seconds."""
  start = peak = resident()
  done = threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.001):
      peak = np.maximum(peak, resident())

  thread = threading.Thread(target=watch)
  thread.start()
  begin = time.perf_counter()
  kept = jax.block_until_ready(fn())
  seconds = time.perf_counter() - begin
  done.set()
  thread.join()
  size = sum(x.nbytes for x in jax.tree.leaves(kept)) / MEBIBYTE
  return peak - start - size, seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--quick', action='store_true', help='a small model')
  parser.add_argument('--way', choices=WAYS, help='one, in this process')
  parser.add_argument('--folder', type=pathlib.Path, help='with the models')
  flags = parser.parse_args()
  if flags.way:
    ignored = run(flags.way, flags.folder / 'small', flags.folder / 'a', once)
    del ignored
    beyond, seconds = run(
      flags.way, flags.folder / 'big', flags.folder / flags.way, measured
    )
    print(*beyond, seconds)
    return
  config = SMALL if flags.quick else BIG
  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder) / 'big', config)
    write(pathlib.Path(folder) / 'small', SMALL)
    report(config, folder)


def once(fn: Any) -> None:
  fn()


def report(config: Config, folder: str) -> None:
  sizes = {
    name: np.prod(tensor.shape) * np.dtype(config.param_dtype).itemsize
    for name, tensor in families.tensors(config).items()
  }
  largest = max(sizes.values()) / MEBIBYTE
  total = sum(sizes.values()) / MEBIBYTE
  print(f'{total:.0f} MiB of weights, the largest tensor {largest:.1f} MiB\n')
  print('| devices | way | anonymous | resident | seconds |')
  print('|' + ' --- |' * 5)
  for num_devices in (1, 4):
    for way in WAYS:
      done = subprocess.run(
        [sys.executable, __file__, f'--way={way}', f'--folder={folder}'],
        env={**os.environ, 'JAX_NUM_CPU_DEVICES': str(num_devices)},
        stdout=subprocess.PIPE, text=True, check=True,
      )  # fmt: skip
      own, whole, seconds = map(float, done.stdout.split())
      cells = (f'{x:.0f} MiB (x {x / largest:.2f})' for x in (own, whole))
      row = (num_devices, way, *cells, f'{seconds:.1f}')
      print('| ' + ' | '.join(map(str, row)) + ' |', flush=True)
      for name in (way, 'a'):
        out = pathlib.Path(folder) / name
        for path in out.glob('*'):
          path.unlink()
        if out.exists():
          out.rmdir()


if __name__ == '__main__':
  main()
