"""Meshes of the devices that a config asks for."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

from postrain.sharding.rules import AXES


def make_mesh(
  *, slices: int = 1, data: int = 1, fsdp: int = 1, expert: int = 1,
  context: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None,
) -> Mesh:  # fmt: skip
  """Make a mesh of the first devices, as many as the product of its axes.

  Args:
    slices: of a TPU, over which ``data`` is cut first: only gradients pass
      between them.
    data: devices along this axis; -1 for one axis takes what the others leave.
    fsdp: likewise.
    expert: likewise.
    context: likewise.
    tensor: likewise.
    devices: those of a topology that is not here; None for the machine's.

  Raises:
    ValueError: there are fewer devices, or they do not divide.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(AXES, (data, fsdp, expert, context, tensor), strict=True))
  shape = tuple(_filled(sizes, len(devices)).values())
  _check_all_take_part(shape, devices)
  if slices > 1:
    grid = _over_slices(shape, slices, devices)
  else:  # an axis may take a part of a side of the torus
    grid = mesh_utils.create_device_mesh(
      shape, devices[: math.prod(shape)], allow_split_physical_axes=True
    )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _filled(sizes: Mapping[str, int], available: int) -> dict[str, int]:
  """The size of each axis, with the one that is -1 made to fit."""
  sizes = dict(sizes)
  written = ' x '.join(f'{name}={size}' for name, size in sizes.items())
  open_axes = [name for name, size in sizes.items() if size == -1]
  wrong = [name for name, size in sizes.items() if size < 1 and size != -1]
  if wrong or len(open_axes) > 1:
    raise ValueError(
      f'mesh {written}: sizes are 1 or more, and one may be -1, which takes the'
      ' devices that the others leave'
    )
  known = math.prod(size for size in sizes.values() if size > 0)
  if open_axes and available % known:
    raise ValueError(
      f'mesh {written}: {available} devices do not divide by {known}, the'
      ' product of the others: change them'
    )
  if open_axes:
    sizes[open_axes[0]] = available // known
  elif known > available:
    raise ValueError(
      f'mesh {written} needs {known} devices, there are {available}: change'
      f' config.mesh (on CPU, JAX_NUM_CPU_DEVICES={known} makes virtual ones)'
    )
  return sizes


def _check_all_take_part(shape: tuple[int, ...], devices: Any) -> None:
  """Each of several processes must have devices of the mesh."""
  needed, processes = math.prod(shape), len({d.process_index for d in devices})
  if needed < len(devices) and processes > 1:
    raise ValueError(
      f'mesh of {needed} of the {len(devices)} devices of {processes}'
      ' processes: change config.mesh so that it has all, or start fewer'
    )


def _over_slices(
  shape: tuple[int, ...], slices: int, devices: Sequence[Any]
) -> np.ndarray:
  """Devices with the first axis outermost over slices."""
  found = len({getattr(d, 'slice_index', 0) for d in devices})
  if found != slices or shape[0] % slices or math.prod(shape) != len(devices):
    raise ValueError(
      f'mesh.slices={slices} with mesh.data={shape[0]}: there are {found}'
      f' slices of together {len(devices)} devices; all of them are needed, and'
      ' data must be a multiple of their number'
    )
  inner = (shape[0] // slices, *shape[1:])
  return mesh_utils.create_hybrid_device_mesh(
    inner, (slices, *(1,) * len(shape[1:])), devices,
    allow_split_physical_axes=True,
  )  # fmt: skip
