"""Several processes that act as one: who reads which rows, and what all must agree on."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from alignx_jax.data.rows import Rows


def connect() -> None:
  """Joins the processes of a run, before JAX is used otherwise.

  On TPU pods and clusters that JAX knows nothing need be set. Elsewhere each process is told
  by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  Without any of it, the process is alone.

  Raises:
    ValueError: some of the three are set, not all.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = {name: os.environ[name] for name in names if name in os.environ}
  if len(given) == len(names):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address, count, index = given.values()
    jax.distributed.initialize(address, int(count), int(index))
  elif given:
    missing = ", ".join(sorted(set(names) - set(given)))
    raise ValueError(f"{', '.join(given)} is set and {missing} is not; set all three or none.")
  elif len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
    jax.distributed.initialize()


def is_first() -> bool:
  """Whether this process is the one that prints and writes what all have."""
  return jax.process_index() == 0


def own_rows(sharding: NamedSharding, rows: int) -> slice:
  """The rows of a global batch that this process reads for its devices.

  Raises:
    ValueError: they are not consecutive.
  """
  indices = sharding.addressable_devices_indices_map((rows,)).values()
  spans = sorted({index[0].indices(rows)[:2] for index in indices})
  if any(end != start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
    raise ValueError(
      f"The rows {spans} of this process's devices are not consecutive; order config.mesh so "
      "that a process's devices are neighbours along fsdp."
    )
  return slice(spans[0][0], spans[-1][1])


def to_devices(rows: Rows, sharding: NamedSharding) -> Rows:
  """A global batch on the devices, from this process's rows of it."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)


def gather_rows(local: np.ndarray, sharding: NamedSharding) -> np.ndarray:
  """The array of all rows, from each process's rows of it; all processes must call."""
  if jax.process_count() == 1:
    return local
  whole = jax.make_array_from_process_local_data(sharding, local)
  return multihost_utils.process_allgather(whole, tiled=True)


def all_true(value: bool) -> bool:
  """Whether the value is true in every process; all processes must call."""
  return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def largest(value: int) -> int:
  """The largest of all processes' values; all processes must call."""
  return int(np.max(multihost_utils.process_allgather(np.array(value))))
