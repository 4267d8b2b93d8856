"""Several processes as one run: who they are, what they tell each other.

All run the same program on the same config, so whatever is decided is decided
of the same values by all. On one process all of it is what it would be without.
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
import numpy as np

from postrain.rollouts import fetched, picked, taken
from postrain.types import Prompts, Samples

# What JAX reads of a step of Slurm.
SLURM = (
  'SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID',
  'SLURM_LOCALID',
)  # fmt: skip

# Of asking whether to stop. The processes agree on the number after the last of
# any of them, 1 where none has asked: steps of a run that goes on, or of the
# second in these processes, could be past it or never come to it.
_calls = itertools.count(1)

Rewards = Callable[[Prompts, Samples], dict[str, np.ndarray]]


def first() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


def exchanged(value: Any) -> list[Any]:
  """What all processes gave, in their order; all wait for all."""
  if jax.process_count() == 1:
    return [value]
  from jax.experimental.multihost_utils import process_allgather

  sent = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = process_allgather(np.int32(len(sent)))
  width = 1 << int(sizes.max() - 1).bit_length()  # few lengths, few programs
  rows = process_allgather(np.pad(sent, (0, width - len(sent))))
  return [
    pickle.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def meet() -> None:
  """Wait until all processes are here.

  To be called where one may have taken much longer than another: devices of
  the CPU that meet for the first time wait for half a minute only.
  """
  exchanged(None)


@contextlib.contextmanager
def agreed() -> Iterator[None]:
  """Raise on every process the ValueError of one, or else none would know.

  Raises:
    ValueError: of the body here, or of the first process that raised.
  """
  if jax.process_count() == 1:
    yield
    return
  own = None
  try:
    yield
  except ValueError as error:
    own = error
  told = exchanged(own and str(own))
  if own is not None:
    raise own
  for process, message in enumerate(told):
    if message is not None:
      raise ValueError(f'process {process}: {message}')


def shared(rewards: Rewards) -> Rewards:
  """Make rewards that each process works out for its own prompts, for all.

  Args:
    rewards: of prompts and their samples on the host, as environments have
      them.
  """

  def rewarded(prompts: Prompts, samples: Samples) -> dict[str, np.ndarray]:
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
      return rewards(prompts, samples)
    size = len(samples.tokens) // len(prompts.tokens)
    own = np.array_split(np.arange(len(prompts.tokens)), count)[index]
    rows = (own[:, None] * size + np.arange(size)).reshape(-1)
    found = {}
    with agreed():
      if len(own):
        found = rewards(picked(fetched(prompts), own), taken(samples, rows))
    parts = [part for part in exchanged(found) if part]
    return {
      label: np.concatenate([part[label] for part in parts])
      for label in parts[0]
    }

  return rewarded


class Stopped(SystemExit):
  """The run was asked to stop, and has saved what it had done."""

  def __init__(self):
    super().__init__(75)  # EX_TEMPFAIL: start it again


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
  """Heed SIGTERM: gives () -> whether all processes stop after this step.

  To be asked after every step, by all. One process stops after the step that it
  is at; several after one that they agree on.
  """
  if jax.process_count() > 1:
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    yield lambda: reached_preemption_sync_point(next(_calls))
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False  # signals are not for other threads
    return
  noticed = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda *_: noticed.set())
  try:
    yield noticed.is_set
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def joined(
  *,
  environment: bool = False,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int = 100,
  connect_seconds: int = 300,
) -> Iterator[None]:
  """Join the other processes of a run; before anything touches a device.

  The first of them speaks: on the others standard output goes nowhere. What
  goes wrong on one ends all: it leaves without waiting, and the others are told
  so by the coordinator, a service in the first process, which also ends them
  when one is silent for too long.

  Args:
    environment: find the other arguments in the environment, as JAX does under
      Slurm, on GKE, on Cloud TPU and under Open MPI.
    coordinator: HOST:PORT at which the first process listens.
    num_processes: of the run; None for this process alone.
    process_id: number of this process, from 0.
    heartbeat_seconds: of silence after which a process is taken for dead.
    connect_seconds: to wait for the others.

  Raises:
    ValueError: an argument is missing or out of its range, or the processes did
      not find each other.
  """
  given = dict(
    coordinator_address=coordinator,
    num_processes=num_processes,
    process_id=process_id,
  )
  if not environment and not any(v is not None for v in given.values()):
    yield
    return
  if heartbeat_seconds < 1:
    raise ValueError(
      f'heartbeat_seconds={heartbeat_seconds}: it must be at least 1'
    )
  if environment:
    _check_slurm(num_processes, process_id)
  else:
    host, port = _address(coordinator, num_processes, process_id)
    if process_id:
      _knock(host, port, connect_seconds)
    else:
      _bind(port)
  _initialize(given, heartbeat_seconds, connect_seconds)
  meet()
  with contextlib.ExitStack() as stack:
    if not first():
      nowhere = stack.enter_context(open(os.devnull, 'w'))
      stack.enter_context(contextlib.redirect_stdout(nowhere))
    try:
      yield
    except ValueError:  # of all of them
      raise
    except Exception:
      _leave(heartbeat_seconds)
      raise


def _initialize(
  given: dict[str, Any], heartbeat_seconds: int, connect_seconds: int
) -> None:
  try:
    jax.distributed.initialize(
      **given,
      heartbeat_timeout_seconds=heartbeat_seconds,
      initialization_timeout=connect_seconds,
    )
  except (RuntimeError, ValueError) as error:
    missing = [name for name in SLURM if name not in os.environ]
    known = {name: os.environ[name] for name in SLURM if name not in missing}
    seen = f'; Slurm has set {known}, but not {missing}' if known else ''
    raise ValueError(
      f'the processes did not find each other ({error}); given were'
      f' {given}{seen}: start all of them with one coordinator and one number,'
      ' or by a scheduler that JAX knows (srun) with the flag distributed alone'
    ) from error


def _check_slurm(num_processes: int | None, process_id: int | None) -> None:
  """Refuse numbers of a step of Slurm that are none, or not those given."""
  if any(name not in os.environ for name in SLURM):
    return
  found = {}
  for name, given in (
    ('SLURM_NTASKS', num_processes),
    ('SLURM_PROCID', process_id),
  ):
    value = os.environ[name]
    if not value.isdecimal() or given not in (None, int(value)):
      raise ValueError(
        f'{name}={value!r}, given was {given}: start the processes with srun,'
        ' and with the flag distributed alone'
      )
    found[name] = int(value)
  number, count = found['SLURM_PROCID'], found['SLURM_NTASKS']
  if number >= count:
    raise ValueError(
      f'SLURM_PROCID={number} of SLURM_NTASKS={count}: processes are numbered 0'
      f' to {count - 1}; start them with srun'
    )


def _address(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int]:
  """Host and port of the coordinator; refuses what JAX would abort at."""
  if coordinator is None or num_processes is None or process_id is None:
    raise ValueError(
      f'coordinator={coordinator}, num_processes={num_processes},'
      f' process_id={process_id}: give all three, or none'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'process_id={process_id} of num_processes={num_processes}: number the'
      f' processes 0 to {num_processes - 1}'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise ValueError(
      f'coordinator={coordinator!r}: give HOST:PORT of the first process'
    )
  return host, int(port)


def _bind(port: int) -> None:
  """Refuse a port that the coordinator could not have."""
  try:
    with socket.create_server(('', port)):
      pass
  except OSError as error:
    raise ValueError(
      f'port {port} of the coordinator cannot be listened at'
      f' ({error.strerror}): take another one'
    ) from error


def _knock(host: str, port: int, seconds: int) -> None:
  """Wait until the coordinator listens."""
  last = time.monotonic() + seconds
  while True:
    try:
      with socket.create_connection((host.strip('[]'), port), timeout=10):
        return
    except OSError as error:
      if time.monotonic() > last:
        raise ValueError(
          f'nobody listens at the coordinator {host}:{port} ({error}) for'
          f' {seconds} seconds: start process 0 there, or mend the address'
        ) from error
    time.sleep(1)


def _leave(heartbeat_seconds: int) -> None:
  """End this process, which the others must not wait for.

  Where a collective failed because another process is gone, the coordinator
  ends this one in that time and names the other.
  """
  traceback.print_exc()
  if isinstance(sys.exception(), jax.errors.JaxRuntimeError):
    print(
      f'error: see above. If another process is gone, the coordinator will say'
      f' which within {heartbeat_seconds} seconds',
      file=sys.stderr,
      flush=True,
    )
    time.sleep(heartbeat_seconds)
  sys.stderr.flush()
  os._exit(1)
