"""The device mesh, and which axes of each parameter are split over it.

replica  copies of the model, across slices: only gradients cross it, once a step
fsdp     rows, and the parameters, which are gathered a layer at a time
tensor   heads, the feed-forward layer and the vocabulary
context  the positions of a row; parameters are split over it too, as over fsdp
"""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax.models.parallel import ROWS, WIDTH

AXES = ("replica", "fsdp", "tensor", "context")

# From parameter name to spec, the first match counts. Block parameters have a leading
# axis of layers, which is scanned and never split.
RULES = (
  # A tenth of a percent of the weights: not worth to gather.
  (r"blocks/\w+_lora_[ab]", P()),
  (r"(bridge|latent)/\w+", P()),
  (r"(embedding|head)_VD", P("tensor", WIDTH)),
  (r"blocks/[qkv]_D[HK]A", P(None, WIDTH, "tensor", None)),
  (r"blocks/[qkv]_bias_[HK]A", P(None, "tensor", None)),
  (r"blocks/o_HAD", P(None, "tensor", None, WIDTH)),
  (r"blocks/(gate|up)_DF", P(None, WIDTH, "tensor")),
  (r"blocks/down_FD", P(None, "tensor", WIDTH)),
  (r".*_norm_D", P()),
)


def make_mesh(sizes=None, devices=None) -> Mesh:
  """A mesh with the axes AXES.

  Args:
    sizes: config.mesh: devices along each axis; one may be 0, for all that are left. None:
      all devices along fsdp.
    devices: those to use; None for all.
  Raises:
    ValueError: the sizes do not make up the devices, or slices do not divide the replicas.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = [sizes[axis] for axis in AXES] if sizes is not None else [1, 0, 1, 1]
  told = ", ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
  if min(shape) < 0 or shape.count(0) > 1:
    raise ValueError(f"{told}: give each axis 1 or more devices, and one at most 0, for the rest.")
  if 0 in shape:
    known = math.prod(size for size in shape if size)
    shape[shape.index(0)] = len(devices) // known
  if math.prod(shape) != len(devices):
    raise ValueError(
      f"{told} does not make up the {len(devices)} devices; set config.mesh so that the product "
      "does, or config.train.devices."
    )
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if shape[0] % slices:
    raise ValueError(
      f"config.mesh.replica is {shape[0]}; set it to a multiple of the {slices} slices."
    )
  if slices > 1:
    inner = (shape[0] // slices, *shape[1:])
    array = mesh_utils.create_hybrid_device_mesh(
      inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  elif devices[0].platform == "tpu":
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    array = np.array(devices).reshape(shape)
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_shardings(params, mesh: Mesh):
  """A NamedSharding for each parameter.

  Args:
    params: arrays, or their shapes.
  Raises:
    ValueError: no rule matches a parameter, or an axis to split does not divide.
  """

  def sharding(path, leaf):
    name = "/".join(str(getattr(key, "key", key)) for key in path)
    name = name.removesuffix("/value").removesuffix("/.value")
    spec = next((spec for rule, spec in RULES if re.fullmatch(rule, name)), None)
    if spec is None:
      raise ValueError(f"No sharding rule matches parameter {name!r}; add one to mesh.RULES.")
    for size, axes in zip(leaf.shape, spec, strict=False):
      axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
      if size % (parts := math.prod(mesh.shape[axis] for axis in axes)):
        raise ValueError(
          f"Parameter {name!r} of shape {leaf.shape}: {size} does not divide by the {parts} "
          f"devices of config.mesh.{' × '.join(axes)}; choose sizes that do."
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, params)


def row_shards(mesh: Mesh) -> int:
  """Parts that the rows of a batch are split into."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
  """Splits the leading axis of every array of Rows.

  Raises:
    ValueError: the rows do not divide.
  """
  if rows % row_shards(mesh):
    raise ValueError(
      f"{rows} rows do not divide by the {row_shards(mesh)} devices of config.mesh.replica × "
      "fsdp; set config.train.rows and config.eval.rows to multiples."
    )
  return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on each device."""
  return NamedSharding(mesh, P())
