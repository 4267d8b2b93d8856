"""Job files of other machines: texts, pure functions of rows and settings.

Nothing of a config stands in them, only directories, quoted for the shell.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
import shlex
from typing import Any

from postrain.binding import check_arguments
from postrain.sweeps.worker import PREEMPTED

WORKER = ('-m', 'postrain.sweeps.worker')
MAX_ROWS = 1000  # Slurm's MaxArraySize is 1001 where nobody has changed it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
  """Settings of an array, one task a row: names are those of sbatch.

  Attributes:
    time: limit of a row, as ``02:00:00``; at its end it is requeued.
    name: of the job.
    nodes: machines of a row.
    ntasks_per_node: processes of a machine; JAX wants one for each GPU.
    gpus_per_node: None asks for none.
    cpus_per_task: None for the cluster's default, as below.
    mem: of a node, as ``64G``.
    partition: where jobs wait.
    account: whom they are charged to.
    qos: quality of service.
    constraint: features of a node.
    max_parallel: rows at a time; None for as many as the cluster gives.
    grace: seconds between the warning and the end.
    directory: where jobs start, with postrain in it or installed.
    setup: lines of shell before the run, such as ``module load cuda``.
    python: the interpreter.
  """

  time: str
  name: str = 'postrain'
  nodes: int = 1
  ntasks_per_node: int = 1
  gpus_per_node: int | None = None
  cpus_per_task: int | None = None
  mem: str | None = None
  partition: str | None = None
  account: str | None = None
  qos: str | None = None
  constraint: str | None = None
  max_parallel: int | None = None
  grace: int = 120
  directory: str = '.'
  setup: Sequence[str] = ()
  python: str = 'python'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xpk:
  """Settings of workloads, one a row: names are those of xpk.

  Attributes:
    cluster: where they run.
    tpu_type: such as ``v5p-64``.
    docker_image: with postrain installed.
    workdir: where pods see the workdir of the sweep, on a shared volume.
    name: the first part of a workload's name.
    num_slices: of a row.
    priority: very-low to very-high.
    grace: seconds between the warning and the end; xpk's own are 30.
    project: None for the default of gcloud, as below.
    zone: of the cluster.
    python: the interpreter.
  """

  cluster: str
  tpu_type: str
  docker_image: str
  workdir: str
  name: str = 'postrain'
  num_slices: int = 1
  priority: str = 'medium'
  grace: int = 120
  project: str | None = None
  zone: str | None = None
  python: str = 'python'


def settings(schema: Any, given: Any, where: str) -> Any:
  """Make `Slurm` or `Xpk` of a dict.

  Raises:
    ValueError: it is none, or a field is unknown, missing, ill-typed or a
      number below 1.
  """
  if not isinstance(given, Mapping):
    raise ValueError(
      f'{where}={given!r:.80}: write {where} = dict(...) into the sweep file;'
      f' fields: {", ".join(f.name for f in dataclasses.fields(schema))}'
    )
  check_arguments(schema, given, where)
  for name, value in given.items():
    if isinstance(value, int) and value < 1:
      raise ValueError(f'{where}: {name}={value}: it must be at least 1')
  return schema(**given)


def slurm(
  directories: Sequence[str], choices: Slurm, *, num_retries: int = 2
) -> str:
  """The script of an array, for ``sbatch``.

  Options are those of sbatch(1), srun(1) and scontrol(1). Processes are warned
  ``grace`` seconds before the limit and end with status 75. The task is then
  requeued; after another status too, ``num_retries`` times.

  Raises:
    ValueError: a setting that sbatch would misread, or too many rows.
  """
  if not 0 < len(directories) <= MAX_ROWS:
    raise ValueError(
      f'{len(directories)} rows: an array has 1 to {MAX_ROWS}; make several'
      ' sweeps of it'
    )
  most = '' if choices.max_parallel is None else f'%{choices.max_parallel}'
  options = {
    'job-name': choices.name,
    'array': f'0-{len(directories) - 1}{most}',
    **{
      name: getattr(choices, name.replace('-', '_'))
      for name in (
        'nodes', 'ntasks-per-node', 'time', 'gpus-per-node', 'cpus-per-task',
        'mem', 'partition', 'account', 'qos', 'constraint',
      )
    },
    'signal': f'TERM@{choices.grace}',
    'open-mode': 'append',
  }  # fmt: skip
  lines = [
    f'#SBATCH --{name}={_word("SLURM", name, value)}'
    for name, value in options.items()
    if value is not None
  ]
  several = choices.nodes * choices.ntasks_per_node > 1
  command = [choices.python, *WORKER, *(['--distributed'] if several else [])]
  return _SLURM.format(
    options='\n'.join(lines),
    rows='\n'.join(f'  {shlex.quote(each)}' for each in directories),
    directory=shlex.quote(choices.directory),
    setup=''.join(f'{line}\n' for line in choices.setup),
    command=shlex.join(command),
    preempted=PREEMPTED,
    retries=num_retries,
  )


def xpk(
  directories: Sequence[str], choices: Xpk, *, num_retries: int = 2
) -> str:
  """Commands that create one workload a row.

  Options are those of ``xpk workload create``. A workload whose process fails
  or is preempted is restarted ``num_retries`` times; both count.

  Args:
    directories: of the rows, below ``choices.workdir`` as pods see it.
    choices: settings.
    num_retries: restarts of a workload.

  Raises:
    ValueError: a name that xpk refuses, or a workdir that pods cannot find.
  """
  if not choices.workdir.startswith('/'):
    raise ValueError(
      f'XPK: workdir={choices.workdir!r}: give the path from the root, as pods'
      ' see it'
    )
  commands = []
  for directory in directories:
    workload = f'{choices.name}-{directory.rsplit("/", 1)[-1]}'
    if not re.fullmatch('[a-z][-a-z0-9]{,38}[a-z0-9]', workload):
      raise ValueError(
        f'XPK: name={choices.name!r} makes a workload {workload!r}: it must'
        ' begin with a letter, of lower-case letters, digits and -, 40 at most'
      )
    run = [choices.python, *WORKER, '--distributed', directory]
    options = {
      'cluster': choices.cluster,
      'workload': workload,
      'tpu-type': choices.tpu_type,
      'num-slices': choices.num_slices,
      'docker-image': choices.docker_image,
      'priority': choices.priority,
      'termination-grace-period-seconds': choices.grace,
      'max-restarts': num_retries,
      'restart-on-exit-codes': f'1,{PREEMPTED}',
      'project': choices.project,
      'zone': choices.zone,
      'command': shlex.join(run),
    }
    words = [f'--{k}={v}' for k, v in options.items() if v is not None]
    commands.append(
      ' \\\n  '.join(['xpk workload create', *map(shlex.quote, words)])
    )
  return '#!/bin/bash\nset -eu\n' + '\n'.join(commands) + '\n'


def _word(where: str, name: str, value: Any) -> str:
  """A value in a line of sbatch, whose quotes cannot be relied on."""
  if not re.fullmatch(r'[\w.,:/@%+=\[\]&|*-]+', str(value), re.ASCII):
    raise ValueError(
      f'{where}: {name}={value!r}: only letters, digits and'
      ' . , : / @ % + = [ ] & | * - may stand there'
    )
  return str(value)


_SLURM = """\
#!/bin/bash
{options}
#SBATCH --requeue
set -u
rows=(
{rows}
)
row=${{rows[SLURM_ARRAY_TASK_ID]}}
cd {directory} || exit 1
{setup}
srun --kill-on-bad-exit=1 {command} "$row"
status=$?
[ "$status" -eq 0 ] && exit 0
if [ "$status" -ne {preempted} ]; then  # that is: asked to stop
  echo "$status" >> "$row/failures"
  [ "$(wc -l < "$row/failures")" -gt {retries} ] && exit "$status"
fi
scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
"""
