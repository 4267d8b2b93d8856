"""What an import pulls in, seen by fresh interpreters."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LATE = {  # loaded by the function that needs them
  *('grain', 'jinja2', 'math_verify', 'matplotlib', 'ml_collections', 'orbax'),
  *('safetensors', 'tensorboardX', 'tokenizers', 'torch', 'transformers'),
  'wandb',
}
STRUCTURE = {'flax', 'optax', 'chex'}


def loaded(program: str) -> set[str]:
  """Top names of the packages that a program imports."""
  report = subprocess.run(
    [sys.executable, '-X', 'importtime', '-c', program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stderr
  modules = re.findall(r'^import time:.*\| +(\S+)$', report, re.MULTILINE)
  return {module.split('.')[0] for module in modules}


def test_losses_need_jax_alone():
  packages = loaded('import postrain.losses')
  assert {'postrain', 'jax', 'jaxtyping'} <= packages
  assert not packages & (LATE | STRUCTURE | {'rich', 'absl'})


def test_the_package_itself_loads_nothing():
  packages = loaded('import postrain')
  assert 'postrain' in packages
  assert not packages & (LATE | STRUCTURE | {'jax', 'jaxlib', 'numpy'})


def test_the_whole_library_loads_late_what_is_heavy():
  names = sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for path in (ROOT / 'postrain').rglob('*.py')
    if path.name != '__init__.py'
  )
  packages = loaded(f'import {", ".join(names)}')
  assert packages >= {'flax', 'optax'}
  assert not packages & LATE


@pytest.mark.parametrize('name', ['flax.linen', 'orbax.checkpoint'])
def test_the_instrument_sees_a_heavy_import(name):
  assert name.split('.')[0] in loaded(f'import {name}')
