"""The device mesh, and which axis of each parameter is split over it."""

import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# From parameter name to spec, the first match counts. Block parameters have a leading
# axis of layers, which is scanned and never split.
RULES = (
  (r"(embedding|head)_VD", P("fsdp", None)),
  (r"blocks/[qkv]_D[HK]A", P(None, "fsdp", None, None)),
  (r"blocks/o_HAD", P(None, None, None, "fsdp")),
  (r"blocks/(gate|up)_DF", P(None, "fsdp", None)),
  (r"blocks/down_FD", P(None, None, "fsdp")),
  (r".*_norm_D|blocks/[qkv]_bias_[HK]A", P()),
)


def make_mesh(devices: int | None = None) -> Mesh:
  """All devices (or the first so many) on one axis, over which rows and parameters split."""
  return jax.make_mesh(
    (devices or jax.device_count(),),
    ("fsdp",),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:devices] if devices else None,
  )


def param_shardings(params, mesh: Mesh):
  """A NamedSharding for each parameter.

  Raises:
    ValueError: no rule matches a parameter, or the axis to split does not divide.
  """

  def sharding(path, leaf):
    name = "/".join(str(getattr(key, "key", key)) for key in path)
    name = name.removesuffix("/value").removesuffix("/.value")
    spec = next((spec for rule, spec in RULES if re.fullmatch(rule, name)), None)
    if spec is None:
      raise ValueError(f"No sharding rule matches parameter {name!r}; add one to mesh.RULES.")
    for size, axis in zip(leaf.shape, spec, strict=False):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(
          f"Parameter {name!r} of shape {leaf.shape}: {size} does not divide by the "
          f"{mesh.shape[axis]} devices of axis {axis!r}; use a number of devices that does."
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, params)


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
  """Splits the leading axis of every array of Rows.

  Raises:
    ValueError: the rows do not divide by the devices.
  """
  devices = mesh.shape["fsdp"]
  if rows % devices:
    raise ValueError(
      f"{rows} rows do not divide by {devices} devices; set config.train.rows and "
      "config.eval.rows to multiples."
    )
  return NamedSharding(mesh, P("fsdp"))
