"""Package metadata; settings of tools stand in pyproject.toml."""

from pathlib import Path
import re

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
  r"^__version__ = '(.+)'$", (ROOT / 'postrain/__init__.py').read_text(), re.M
)[1]

PLOTS = ['matplotlib>=3.9']
QUANTIZATION = ['qwix>=0.1.8,<0.2']
TENSORBOARD = ['tensorboardX>=2.6']

setup(
  name='postrain',
  version=VERSION,
  description='Reinforcement learning on LLMs as pure JAX functions',
  long_description=(ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=find_packages(include=['postrain', 'postrain.*']),
  python_requires='>=3.11',
  install_requires=[
    'absl-py',
    'chex>=0.1.92,<0.2',
    # Versions below 0.12.10 break on the jax that Python 3.12 resolves to.
    'flax>=0.12.8 ; python_version<"3.12"',
    'flax>=0.12.10 ; python_version>="3.12"',
    'jax>=0.10,<0.13',
    'jaxtyping>=0.3',
    'jinja2>=3.1',  # chat templates; transformers does not ask for it
    'ml_collections>=1.1',
    'numpy>=2',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'rich>=13',
    'safetensors>=0.8',
    'tokenizers>=0.23',
    'transformers>=5.17,<6',
  ],
  extras_require={
    'cuda': ['jax[cuda13]'],
    'data': ['grain>=0.2.18'],
    'math': ['math-verify>=0.8'],
    'plots': PLOTS,
    'quantization': QUANTIZATION,
    'search': ['optuna>=4,<5'],
    'tensorboard': TENSORBOARD,
    'test': [
      *PLOTS,
      *QUANTIZATION,
      *TENSORBOARD,
      'beartype>=0.21',
      'hypothesis>=6.100',
      # Brings node along; without it the first run would download one.
      'pyright[nodejs]>=1.1.400',
      'pytest>=8',
      'pytest-timeout>=2.3',
      'pytest-xdist>=3.6',
      'ruff>=0.14',
      'setuptools>=77',  # the package test builds a wheel
    ],
    'tpu': ['jax[tpu]'],
    'wandb': ['wandb>=0.20'],
  },
)
