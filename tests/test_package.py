"""What strangers install: built from the sdist, imported from the wheel."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from test_architecture import LAYERS

import postrain

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE')
HEAVY = ('flax', 'optax', 'orbax', 'transformers', 'ml_collections')
# Each module is imported as if it were the first of the package.
PROGRAM = """
import importlib, pathlib, pkgutil, sys

def walk(name):
  yield name
  module = importlib.import_module(name)
  for found in pkgutil.iter_modules(getattr(module, '__path__', ())):
    yield from walk(f'{name}.{found.name}')

names = [n for top in sys.argv[2:] for n in walk(f'postrain.{top}')]
for name in names:
  for loaded in [m for m in sys.modules if m.split('.')[0] == 'postrain']:
    del sys.modules[loaded]
  module = importlib.import_module(name)
  assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), name
print(len(names), sorted({m.split('.')[0] for m in sys.modules}))
"""


def run_setup(folder: pathlib.Path, command: str) -> pathlib.Path:
  """Builds one distribution in a folder and returns its path."""
  done = subprocess.run(
    [sys.executable, 'setup.py', '-q', command],
    cwd=folder,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (path,) = (folder / 'dist').iterdir()
  return path


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The sdist, and the wheel that is built from nothing else."""
  pytest.importorskip('setuptools', reason='setuptools builds the package')
  folder = tmp_path_factory.mktemp('package')
  source = folder / 'source'
  shutil.copytree(
    ROOT / 'postrain',
    source / 'postrain',
    ignore=shutil.ignore_patterns('__pycache__'),
  )
  for name in SOURCES:
    shutil.copy(ROOT / name, source)
  sdist = run_setup(source, 'sdist')
  with tarfile.open(sdist) as archive:
    archive.extractall(folder / 'sdist', filter='data')
  (unpacked,) = (folder / 'sdist').iterdir()
  wheel = run_setup(unpacked, 'bdist_wheel')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / 'wheel')
  return unpacked, folder / 'wheel'


def modules(folder: pathlib.Path) -> set[str]:
  return {str(p.relative_to(folder)) for p in folder.rglob('*.py')}


def test_the_wheel_has_every_module_and_nothing_else(built):
  _, wheel = built
  expected = {f'postrain/{name}' for name in modules(ROOT / 'postrain')}
  assert modules(wheel) == expected
  info = f'postrain-{postrain.__version__}.dist-info'
  assert {p.name for p in wheel.iterdir()} == {'postrain', info}
  assert (wheel / info / 'licenses' / 'LICENSE').is_file()
  metadata = (wheel / info / 'METADATA').read_text()
  assert f'Version: {postrain.__version__}\n' in metadata
  assert 'Apache-2.0\n' in metadata


def test_the_sdist_can_be_built_and_read(built):
  sdist, _ = built
  assert {*SOURCES, 'PKG-INFO'} <= {p.name for p in sdist.iterdir()}
  assert modules(sdist / 'postrain') == modules(ROOT / 'postrain')


def test_the_mathematics_of_the_wheel_loads_nothing_heavy(built):
  _, wheel = built
  environment = os.environ | {'PYTHONPATH': str(wheel)}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, str(wheel), *sorted(LAYERS[0])],
    cwd=wheel.parent,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  count, packages = done.stdout.split(maxsplit=1)
  assert int(count) >= len(LAYERS[0])
  assert "'jax'" in packages
  assert not [name for name in HEAVY if f"'{name}'" in packages]
