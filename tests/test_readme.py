"""Every Python block of the README runs, and what it brings trains."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.S)
OWN = README.split('## Bring your own')[1].split('\n## ')[0]
OWN_BLOCKS = re.findall(r'```python\n(.*?)```', OWN, re.S)


def test_blocks_run():
  program = '\n'.join(f'exec({block!r}, {{}})' for block in BLOCKS)
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('block', OWN_BLOCKS)
def test_own_block_is_short(block):
  lines = [line for line in block.splitlines() if line.strip()]
  assert len(lines) < 15 + sum('import' in line for line in lines)


def test_own_loss_task_and_model_train_by_name(tmp_path, monkeypatch):
  from configs import base
  from postrain.trainer import Trainer

  (tmp_path / 'mine.py').write_text('\n'.join(OWN_BLOCKS))
  monkeypatch.syspath_prepend(tmp_path)
  config = base.get_config()
  config.environment = dict(name='task', task=dict(name='mine:copy'))
  config.model = dict(name='mine:bigram')
  config.loss = dict(name='mine:log_loss', scale=0.5)
  config.rewards = dict(same=dict(name='same', weight=1.0))
  config.sampling.max_new_tokens = 3
  config.rl.num_iterations = 2
  config.rl.num_prompts = 4
  config.evaluation.grader = 'same'
  state = Trainer(config, str(tmp_path / 'run')).run()
  assert int(state.step) == 2


def test_own_reward_judges_by_name(tmp_path, monkeypatch):
  from postrain import rewards
  from postrain.binding import bind
  from postrain.types import Completion

  (tmp_path / 'mine_too.py').write_text('\n'.join(OWN_BLOCKS))
  monkeypatch.syspath_prepend(tmp_path)
  short = bind(rewards, {'name': 'mine_too:short', 'limit': 2})
  completions = [Completion('a', [1], False), Completion('abc', [1] * 3, False)]
  assert short(completions, [{}, {}]) == [1.0, 0.0]
