"""Strict numerics, eight virtual devices, and checked signatures."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['HF_HUB_OFFLINE'] = '1'

import jax
from jaxtyping import install_import_hook

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

hook = install_import_hook('postrain', 'beartype.beartype')
hook.__enter__()
