"""Programs compiled before the first step: side by side, kept, and weighed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import ctypes
import functools
import os
import sys
import time
from typing import Any, NamedTuple

import jax

from postrain import sharding

# What makes a program smaller, by its kind.
# A sampler has gathered its weights over fsdp: tensor alone cuts them.
PARTS = ('a larger sampling.num_parts', 'mesh.tensor', 'model.dtype=bfloat16')
SCORES = ('a larger rl.num_score_slices', 'a smaller chunk_size', 'mesh.fsdp')
WHOLE = ('mesh.fsdp', 'mesh.tensor', 'model.lora')
REMAT = 'model.remat=nothing_saveable'
EXAMS = (
  'a smaller evaluation.batch_size',
  'a smaller evaluation.num_samples',
  'a smaller sampling.max_new_tokens',
)
REMEDIES = {
  'sample': PARTS,
  'extend': ('a smaller rl.num_prompts', *PARTS[1:]),
  'greedy': ('a smaller rl.num_prompts', *PARTS[1:]),
  'prepare': SCORES,
  'update': ('a larger rl.num_micro_batches', REMAT, 'mesh.fsdp'),
  'imitate': ('a larger sft.num_micro_batches', REMAT, 'mesh.fsdp'),
  'move_reference': WHOLE,
  'prefer': ('a larger preference.num_micro_batches', REMAT, 'mesh.fsdp'),
  'begin': WHOLE,
  'refresh': WHOLE,
  'refer': ('a larger preference.num_micro_batches', *SCORES[1:]),
  'write': ('a smaller preference.batch_size', *PARTS[1:]),
}
SMALL = ('a smaller rl.num_prompts',)


class Program(NamedTuple):
  """A jitted function, traced on what it will be called with.

  A jitted function that was lowered and compiled from shapes calls that same
  executable later, so nobody has to hand executables around.

  Attributes:
    name: for people.
    traced: of ``jax.jit(fn).trace(...)``.
    resident: bytes of the state that lie on a device beside the arguments.
    remedies: settings that make it smaller, the strongest first.
  """

  name: str
  traced: Any
  resident: int
  remedies: tuple[str, ...]


class Footprint(NamedTuple):
  """Bytes of a program on one device."""

  arguments: int
  outputs: int  # beyond those that reuse arguments
  temporaries: int
  resident: int

  @property
  def total(self) -> int:
    """What the device holds while the program runs."""
    return sum(self)


def make_jit(*, once: bool = False) -> Callable:
  """Make a `jax.jit` for the platform of the mesh.

  Up to jax 0.10 the newer of two ways to write loops for CPUs compiles for
  twice as long, in twice the memory, what then runs no faster; later versions
  have one way.

  Args:
    once: what is compiled runs once, so that its speed matters less.
  """
  if sharding.platform() != 'cpu':
    return jax.jit
  options: dict[str, Any] = {}
  if jax.__version_info__ < (0, 11):
    options['xla_cpu_use_fusion_emitters'] = False
  if once:
    options['xla_backend_optimization_level'] = 1
  return functools.partial(jax.jit, compiler_options=options)


def use_cache(directory: str | None = None) -> str | None:
  """Keep compiled programs on disk, small and quick ones too.

  Args:
    directory: None for ``JAX_COMPILATION_CACHE_DIR``, else ``postrain/xla`` in
      the user's cache directory.

  Returns:
    The directory; None where ``JAX_ENABLE_COMPILATION_CACHE`` is 0, or, with a
    line that says why, where it cannot be written: all works as before, and
    starts more slowly.
  """
  if not jax.config.values['jax_enable_compilation_cache']:
    return None
  directory = directory or jax.config.values['jax_compilation_cache_dir']
  if not directory:
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    directory = os.path.join(caches, 'postrain', 'xla')
  try:
    os.makedirs(directory, exist_ok=True)
  except OSError as error:
    return _without_cache(directory, error.strerror)
  if not os.access(directory, os.W_OK):
    return _without_cache(directory, 'not writable')
  jax.config.update('jax_compilation_cache_dir', directory)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  return directory


def _without_cache(directory: str, reason: str | None) -> None:
  jax.config.update('jax_enable_compilation_cache', False)
  print(
    f'nothing compiled is kept: {directory}: {reason}; set'
    ' JAX_COMPILATION_CACHE_DIR to another directory',
    file=sys.stderr,
  )


def footprint(compiled: Any, resident: int = 0) -> Footprint | None:
  """Bytes on a device, as the compiler planned them; None if it keeps quiet."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return None
  return Footprint(
    arguments=analysis.argument_size_in_bytes,
    outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    resident=resident,
  )


@contextlib.contextmanager
def compiling(
  programs: Sequence[Program], *, limit: int | None = None
) -> Iterator[None]:
  """Compile programs in threads while the body runs, and wait at its end.

  Each says when it is done, and what it needs of a device.

  Args:
    programs: to compile; the largest should come first.
    limit: bytes of a device, None for what the device itself reports, if it
      does.

  Raises:
    ValueError: a program does not fit; says which, and what would help.
  """
  started = time.perf_counter()
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    # Lowering holds the interpreter, compiling does not: the first compile
    # while the others are lowered.
    jobs = {pool.submit(_compile, p.traced.lower()): p for p in programs}
    try:
      yield
      sizes = dict(_finished(jobs))
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  _release()
  if sizes:
    _hold(sizes, _device_limit() if limit is None else limit, started)


def _release() -> None:
  """Give the compiler's memory back to the system, where libc knows how.

  Hundreds of megabytes would stay with the process until it ends.
  """
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)


def _compile(lowered: Any) -> tuple[Any, float]:
  start = time.perf_counter()
  return lowered.compile(), time.perf_counter() - start


def _finished(jobs: dict) -> Iterator[tuple[Program, Footprint]]:
  for job in futures.as_completed(jobs):
    program, (compiled, seconds) = jobs[job], job.result()
    line = f'compiled {program.name:20} {seconds:6.1f} s'
    size = footprint(compiled, program.resident)
    if size is not None:
      line += (
        f'  arguments {readable(size.arguments)}, temporaries'
        f' {readable(size.temporaries)}, outputs {readable(size.outputs)}'
      )
      yield program, size
    print(line, flush=True)


def _hold(
  sizes: dict[Program, Footprint], limit: int | None, started: float
) -> None:
  """Say how much the largest needs, and refuse what does not fit."""
  largest = max(sizes, key=lambda program: sizes[program].total)
  needed = sizes[largest]
  print(
    f'{len(sizes)} programs in {time.perf_counter() - started:.1f} s; a device'
    f' holds {readable(needed.total)} at most ({largest.name}, with'
    f' {readable(needed.resident)} of the state beside it), and has'
    f' {"no known limit" if limit is None else readable(limit)}',
    flush=True,
  )
  if limit is not None and needed.total > limit:
    raise ValueError(
      f'{largest.name} needs {needed.total} bytes of a device'
      f' (arguments {needed.arguments}, temporaries {needed.temporaries},'
      f' outputs {needed.outputs}, state beside it {needed.resident}), but the'
      f' limit is {limit}: try {", ".join(largest.remedies)}'
    )


def by_role(roles: Mapping[str, tuple[int, ...]]) -> str:
  """What each role keeps on a device, as lines."""
  heads = ('parameters', 'gradients', 'optimizer')
  width = max(map(len, ('bytes of a role', *roles)))
  rows = {'bytes of a role': heads}
  rows |= {k: tuple(map(readable, sizes)) for k, sizes in roles.items()}
  return '\n'.join(
    f'{role:{width}}' + ''.join(f'{cell:>12}' for cell in cells)
    for role, cells in rows.items()
  )


def _device_limit() -> int | None:
  stats = jax.local_devices()[0].memory_stats()
  return stats.get('bytes_limit') if stats else None


def readable(size: int | float) -> str:
  """Bytes for people."""
  for unit in ('B', 'kB', 'MB'):
    if size < 999.5:
      return f'{size:.3g} {unit}'
    size /= 1000
  return f'{size:.3g} GB'
