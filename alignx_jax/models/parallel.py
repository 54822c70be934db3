"""Where activations lie on a device mesh.

Rows are split over the axes `replica` and `fsdp`, positions over `context`, heads, the
feed-forward layer and the vocabulary over `tensor`. Parameters (training/mesh.py) are split
along their width over `context` and `fsdp`, and gathered a layer at a time.
"""

import jax
from jax.sharding import PartitionSpec as P

ROWS = ("replica", "fsdp")
WIDTH = ("context", "fsdp")


def constrain(x, *axes):
  """Lays x out over the mesh of `jax.set_mesh`; without one, x itself.

  Args:
    axes: of each axis of x, the mesh axis or axes it is split over, or None.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(*axes))


def axis_size(axis: str) -> int:
  """Devices along an axis of the mesh of `jax.set_mesh`; 1 without."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape.get(axis, 1)
