"""Job files, word for word; and values that try to leave their quotes."""

import pathlib
import shlex
import subprocess

import pytest

from postrain.sweeps import jobs

SLURM = """\
#!/bin/bash
#SBATCH --job-name=postrain
#SBATCH --array=0-1%4
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --time=04:00:00
#SBATCH --gpus-per-node=8
#SBATCH --mem=256G
#SBATCH --partition=gpu
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --requeue
set -u
rows=(
  /runs/sweep/rows/0a1b
  '/runs/my sweep/rows/2c3d'
)
row=${rows[SLURM_ARRAY_TASK_ID]}
cd /home/me/postrain || exit 1
module load cuda
export NCCL_DEBUG=WARN

srun --kill-on-bad-exit=1 python -m postrain.sweeps.worker --distributed "$row"
status=$?
[ "$status" -eq 0 ] && exit 0
if [ "$status" -ne 75 ]; then  # that is: asked to stop
  echo "$status" >> "$row/failures"
  [ "$(wc -l < "$row/failures")" -gt 2 ] && exit "$status"
fi
scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
"""
XPK = """\
#!/bin/bash
set -eu
xpk workload create \\
  --cluster=pod \\
  --workload=postrain-0a1b \\
  --tpu-type=v5p-64 \\
  --num-slices=2 \\
  --docker-image=gcr.io/me/postrain:latest \\
  --priority=medium \\
  --termination-grace-period-seconds=120 \\
  --max-restarts=2 \\
  --restart-on-exit-codes=1,75 \\
  --zone=us-central1-a \\
  '--command=python -m postrain.sweeps.worker --distributed /mnt/s/rows/0a1b'
"""
HOSTILE = (
  "a'; touch {}/broken; '",
  '$(touch {}/broken)',
  '`touch {}/broken`',
  'a\n#SBATCH --uid=0\ntouch {}/broken',
  '"; touch {}/broken; "',
  ') ; touch {}/broken ; rows=(',
)


def xpk_settings(**more: object) -> jobs.Xpk:
  required = dict(
    cluster='pod', tpu_type='v5p-64', docker_image='gcr.io/me/postrain:latest',
    workdir='/mnt/sweep',
  )  # fmt: skip
  return jobs.settings(jobs.Xpk, {**required, **more}, 'XPK')


def test_a_slurm_array_word_for_word():
  choices = jobs.Slurm(
    time='04:00:00', nodes=2, ntasks_per_node=8, gpus_per_node=8, mem='256G',
    partition='gpu', max_parallel=4, directory='/home/me/postrain',
    setup=['module load cuda', 'export NCCL_DEBUG=WARN'],
  )  # fmt: skip
  rows = ['/runs/sweep/rows/0a1b', '/runs/my sweep/rows/2c3d']
  assert jobs.slurm(rows, choices) == SLURM
  check_syntax(SLURM)


def test_one_process_needs_no_coordinator():
  script = jobs.slurm(['/a'], jobs.Slurm(time='10'))
  assert '--distributed' not in script
  assert '#SBATCH --array=0-0\n' in script
  check_syntax(script)


def test_xpk_commands_word_for_word():
  choices = xpk_settings(num_slices=2, zone='us-central1-a')
  script = jobs.xpk(['/mnt/s/rows/0a1b'], choices)
  assert script == XPK
  check_syntax(script)


@pytest.mark.parametrize('text', HOSTILE)
def test_directories_stay_in_their_quotes(text, tmp_path):
  """The script runs with stand-ins that write down their arguments."""
  directory = f'{tmp_path}/{text.format(tmp_path)}'
  for name in ('srun', 'xpk'):
    path = tmp_path / name
    path.write_text(f'#!/bin/bash\nprintf \'%s\\0\' "$@" > {tmp_path}/said\n')
    path.chmod(0o755)
  slurm = jobs.slurm(['/other', directory], jobs.Slurm(time='10'))
  assert said(slurm, tmp_path)[-1] == directory
  xpk = jobs.xpk([f'{directory}/0a'], xpk_settings())
  command = said(xpk, tmp_path)[-1].removeprefix('--command=')
  assert shlex.split(command)[-1] == f'{directory}/0a'
  assert not (tmp_path / 'broken').exists()


def said(script: str, tmp_path: pathlib.Path) -> list[str]:
  environment = {
    'PATH': f'{tmp_path}:/usr/bin:/bin',
    'SLURM_ARRAY_TASK_ID': '1',
    'SLURM_ARRAY_JOB_ID': '1',
  }
  subprocess.run(
    ['bash'], input=script, text=True, env=environment, cwd=tmp_path, check=True
  )
  return (tmp_path / 'said').read_text().split('\0')[:-1]


@pytest.mark.parametrize(
  ('statuses', 'requeued', 'last'),
  [
    ([0], 0, 0),
    ([75, 75, 75, 75, 0], 4, 0),  # preempted
    ([1, 75, 1, 1], 3, 1),  # two retries
  ],
)
def test_a_task_is_requeued_where_it_should(tmp_path, statuses, requeued, last):
  (tmp_path / 'row').mkdir()
  script = jobs.slurm([str(tmp_path / 'row')], jobs.Slurm(time='10'))
  path = tmp_path / 'scontrol'
  path.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')
  path.chmod(0o755)
  for status in statuses:
    path = tmp_path / 'srun'
    path.write_text(f'#!/bin/bash\nexit {status}\n')
    path.chmod(0o755)
    done = subprocess.run(
      ['bash'], input=script, text=True, cwd=tmp_path,
      env={
        'PATH': f'{tmp_path}:/usr/bin:/bin',
        'SLURM_ARRAY_TASK_ID': '0',
        'SLURM_ARRAY_JOB_ID': '7',
      },
    )  # fmt: skip
  assert done.returncode == last
  log = tmp_path / 'requeued'
  lines = log.read_text().splitlines() if log.exists() else []
  assert lines == ['requeue 7_0'] * requeued


@pytest.mark.parametrize('text', HOSTILE)
def test_options_that_would_be_misread_are_refused(text):
  with pytest.raises(ValueError, match=r"SLURM: partition='?.* may stand"):
    jobs.slurm(['/a'], jobs.Slurm(time='10', partition=text))
  with pytest.raises(ValueError, match='makes a workload'):
    jobs.xpk(['/a/b'], xpk_settings(name=text))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: jobs.slurm([], jobs.Slurm(time='1')), '0 rows: an array has 1 to'),
    (lambda: jobs.slurm(['/a'] * 1001, jobs.Slurm(time='1')), '1001 rows'),
    (
      lambda: jobs.settings(jobs.Slurm, {'nodes': 2}, 'SLURM'),
      'SLURM needs a value for: time',
    ),
    (
      lambda: jobs.settings(jobs.Slurm, {'time': '1', 'nodes': '2'}, 'SLURM'),
      "nodes='2' is not of type int",
    ),
    (
      lambda: jobs.settings(jobs.Xpk, {'cluster': 'a'}, 'XPK'),
      'XPK needs a value for: tpu_type, docker_image, workdir',
    ),
    (lambda: jobs.settings(jobs.Xpk, 3, 'XPK'), 'XPK=3: write XPK = dict'),
  ],
)
def test_settings_that_cannot_be(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def check_syntax(script: str) -> None:
  subprocess.run(['bash', '-n'], input=script, text=True, check=True)
