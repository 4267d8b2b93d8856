"""Programs of a run compiled for devices that are not here, and weighed."""

from collections.abc import Sequence
import importlib.util
import time
from typing import Any

import jax
from jax.experimental import topologies

from postrain import sharding
from postrain.assembly import assemble
from postrain.compilation import Program, footprint, readable
from postrain.traffic import traffic

# GiB that programs may use, of the vendor's tables less what the system keeps.
MEMORY = {
  'TPU v4': 31.25,
  'TPU v5 lite': 15.75,
  'TPU v5': 95.74,
  'TPU v6 lite': 31.25,
}


def devices_of(topology: str, slices: int = 1) -> list[Any]:
  """The devices of a topology.

  Raises:
    ValueError: there is none of this name, or no compiler for it.
  """
  kind, _, shape = topology.partition(':')
  if slices < 1 or (kind == 'cpu' and slices > 1):
    raise ValueError(
      f'--slices={slices} of --topology={topology}: give 1, or more of a TPU'
    )
  if kind == 'cpu':
    if not shape.isdigit() or not int(shape):
      raise ValueError(f'--topology={topology}: cpu:N has N devices')
    jax.config.update('jax_num_cpu_devices', int(shape))
    return jax.devices()
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f'--topology={topology} needs the compiler of TPUs, which is not'
      " installed: pip install 'postrain[tpu]', or take cpu:N"
    )
  options = {} if slices == 1 else {'num_slices': slices}
  try:
    return topologies.get_topology_desc(topology, 'tpu', **options).devices
  except Exception as error:  # of what kind the library does not say
    raise ValueError(
      f'--topology={topology}: {error}; known are such as v5e:4x4, v5p:4x4x4,'
      ' v6e:8x8'
    ) from error


def weigh(program: Program, limit: float | None) -> dict[str, Any]:
  """Compile a program; its bytes on a device and between devices."""
  started = time.perf_counter()
  figures: dict[str, Any] = {'resident': program.resident}
  try:
    compiled = program.traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return figures | {'fits': False, 'refused': str(error).splitlines()[0]}
  size = footprint(compiled, program.resident)
  if size is not None:
    figures |= {**size._asdict(), 'total': size.total}
    figures['fits'] = limit is None or size.total <= limit
  passed = traffic(compiled.as_text())
  figures['traffic'] = {k: v._asdict() for k, v in passed.items()}
  figures['seconds'] = time.perf_counter() - started
  return figures


def report(
  config: Any, devices: Sequence[Any], kinds: Sequence[str] = ()
) -> dict[str, Any]:
  """Assemble a config for the devices, and weigh its programs.

  Args:
    config: a ConfigDict or dict.
    devices: of `devices_of`.
    kinds: of programs, such as 'update'; all if none.

  Raises:
    ValueError: the config is wrong for them, or has no such program.
  """
  parts = assemble(config, devices)
  chip = devices[0].device_kind
  limit = MEMORY[chip] * 2**30 if chip in MEMORY else None
  found: dict[str, Any] = {
    'chip': chip, 'mesh': dict(parts.mesh.shape), 'memory': limit,
    'jax': jax.__version__, 'programs': {},
  }  # fmt: skip
  with sharding.on(parts.mesh):
    programs = parts.rehearsal.needed(0)
    names = {p.name.partition('[')[0] for p in programs}
    if unknown := sorted(set(kinds) - names):
      raise ValueError(
        f'programs: {", ".join(unknown)}; this config has'
        f' {", ".join(sorted(names))}'
      )
    for program in programs:
      if not kinds or program.name.partition('[')[0] in kinds:
        figures = weigh(program, limit)
        if not figures['fits']:
          figures['remedies'] = program.remedies
        found['programs'][program.name] = figures
        print(line(program, figures), flush=True)
  return found


def line(program: Program, figures: dict[str, Any]) -> str:
  """The figures of a program for people."""
  if 'refused' in figures:
    return (
      f'{program.name}: does not fit: {figures["refused"]}; try'
      f' {", ".join(program.remedies)}'
    )
  parts = ('arguments', 'temporaries', 'outputs', 'resident')
  text = f'{program.name}: {readable(figures["total"])} a device ('
  text += ', '.join(f'{part} {readable(figures[part])}' for part in parts) + ')'
  for kind, passed in figures['traffic'].items():
    text += f'; {kind} x {passed["runs"]} {readable(passed["bytes"])}'
  if not figures['fits']:
    text += f'; does not fit: try {", ".join(program.remedies)}'
  return text
