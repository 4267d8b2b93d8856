"""From a config block to a pure function.

A module is its own registry: ``__all__`` is the index, a signature the schema.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import types
import typing
from typing import Any

from jax.core import Tracer
import jax.numpy as jnp


def bind(module: types.ModuleType, block: Any) -> Any:
  """Bind the keyword-only hyperparameters of a function of ``module``.

  ``bind(losses, {'name': 'ppo_clip', 'clip_high': 0.28})`` is
  ``functools.partial(losses.ppo_clip, clip_high=0.28)``, checked.

  Args:
    module: its ``__all__`` lists what may be named.
    block: ``name`` and hyperparameters. A function from elsewhere is named
      ``'module:function'``. Arrays (also traced ones) may stand where the
      signature takes a number.

  Raises:
    ValueError: no name, an unknown name, an unknown, missing or ill-typed
      hyperparameter; the message lists what exists.
  """
  if not isinstance(block, Mapping) or 'name' not in block:
    raise ValueError(
      f"{module.__name__}: expected dict(name='...'), got {block!r};"
      f' names: {", ".join(module.__all__)}'
    )
  hyperparameters = {k: v for k, v in block.items() if k != 'name'}
  fn, where = _find(module, block['name'])
  check_arguments(fn, hyperparameters, where)
  return functools.partial(fn, **hyperparameters)


def _find(module: types.ModuleType, name: Any) -> tuple[Callable, str]:
  """A function of ``module``, or of a stranger's: ``'package.module:name'``."""
  where = module.__name__
  if isinstance(name, str) and ':' in name:
    path, _, attribute = name.partition(':')
    try:
      fn = getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
      raise ValueError(
        f'{name!r} cannot be imported ({error}): it must be module:function,'
        ' and the module on the path of Python'
      ) from error
    return fn, name
  if name not in module.__all__:
    raise ValueError(
      f'{where} has no {name!r}{_closest(name, module.__all__)};'
      f' it has: {", ".join(module.__all__)}; a function of your own is named'
      " 'module:function'"
    )
  return getattr(module, name), f'{where}.{name}'


def check_arguments(fn: Callable, given: Mapping[str, Any], where: str) -> None:
  """Hold ``given`` against the keyword-only part of a signature."""
  schema = {
    p.name: p
    for p in inspect.signature(fn).parameters.values()
    if p.kind is p.KEYWORD_ONLY
  }
  hints = typing.get_type_hints(fn)
  for key, value in given.items():
    if key not in schema:
      raise ValueError(
        f'{where} has no hyperparameter {key!r}{_closest(key, schema)};'
        f' it has: {", ".join(schema) or "none"}'
      )
    hint = hints.get(key, Any)
    if not _fits(value, hint):
      raise ValueError(f'{where}: {key}={value!r} is not of type {_show(hint)}')
  missing = [
    k for k, p in schema.items() if p.default is p.empty and k not in given
  ]
  if missing:
    raise ValueError(f'{where} needs a value for: {", ".join(missing)}')


def _closest(name: Any, options: Iterable[str]) -> str:
  close = difflib.get_close_matches(str(name), list(options), n=1)
  return f' (did you mean {close[0]!r}?)' if close else ''


def _show(hint: Any) -> str:
  return hint.__name__ if isinstance(hint, type) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
  """Whether a value may stand where a signature says ``hint``."""
  if hint is Any or isinstance(hint, typing.TypeVar):
    return True
  if dataclasses.is_dataclass(hint):
    return isinstance(value, Mapping)
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_fits(value, option) for option in typing.get_args(hint))
  if origin is typing.Literal:
    return value in typing.get_args(hint)
  if hint is None or hint is types.NoneType:
    return value is None
  if hint is float:
    return _is_scalar(value) or (_is_number(value) and not math.isnan(value))
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if hint in (str, bool):
    return isinstance(value, hint)
  if origin in (tuple, list):
    return isinstance(value, tuple | list)
  if hasattr(hint, 'array_type'):  # a jaxtyping annotation
    return _is_scalar(value)
  return isinstance(value, origin or hint)


def _is_scalar(value: Any) -> bool:
  """A number as an array; of a traced one the type is all that is known."""
  if getattr(value, 'shape', None) != () or value.dtype == bool:
    return False
  if not jnp.issubdtype(value.dtype, jnp.number):
    return False
  return isinstance(value, Tracer) or not math.isnan(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)
