"""Several processes that act as one: who reads which rows, and what all must agree on."""

import atexit
import hashlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from alignx_jax.data.rows import Rows
from alignx_jax.training.rendezvous import meet


def connect(seconds: float = 300.0) -> None:
  """Joins the processes of a run, before JAX is used otherwise.

  On TPU pods, Slurm and other clusters that JAX knows nothing need be set. Elsewhere each
  process is told by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID. Where JAX finds no cluster either, the process is alone.

  Args:
    seconds: that processes wait for one another.
  Raises:
    ValueError: some of the three are set, not all.
    RuntimeError: some did not come in time; names them.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = {name: os.environ[name] for name in names if name in os.environ}
  if len(given) == len(names):
    address, count, index = given.values()
    place = address, int(count), int(index)
  elif given:
    missing = ", ".join(sorted(set(names) - set(given)))
    raise ValueError(f"{', '.join(given)} is set and {missing} is not; set all three or none.")
  else:
    from jax._src.clusters import ClusterEnv  # no public way to what it would join

    nothing = [None] * 5
    place = ClusterEnv.auto_detect_unset_distributed_params(*nothing, round(seconds))[:3]
    if place[0] is None:
      return
  if None not in place:  # else it is a cluster that JAX cannot make out, which it says
    meet(*place, seconds)
  if given:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(*place, initialization_timeout=round(seconds))
  if threading.current_thread() is threading.main_thread():
    # JAX keeps SIGTERM for who asks. Until training asks, it ends the process: nothing is lost.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_first() -> bool:
  """Whether this process is the one that prints and writes what all have."""
  return jax.process_index() == 0


def own_rows(sharding: NamedSharding, rows: int, process: int | None = None) -> np.ndarray:
  """Indices of the rows of a global batch that a process reads for its devices, ascending.

  They need not be consecutive: the mesh follows the network, not the hosts. Two processes
  read the same rows or none in common.

  Args:
    process: its index; None for this one.
  """
  process = jax.process_index() if process is None else process
  spans = {
    index[0].indices(rows)[:2]
    for device, index in sharding.devices_indices_map((rows,)).items()
    if device.process_index == process
  }
  return np.concatenate([np.arange(*span) for span in sorted(spans)])


def to_devices(rows: Rows, sharding: NamedSharding, count: int) -> Rows:
  """A global batch of `count` rows on the devices, from this process's rows of it."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x, (count, *x.shape[1:])), rows
  )


def gather_rows(local: np.ndarray, sharding: NamedSharding, count: int) -> np.ndarray:
  """The array of all `count` rows, from each process's rows of it; all processes must call."""
  if jax.process_count() == 1:
    return local
  shape = (count, *local.shape[1:])
  whole = jax.make_array_from_process_local_data(sharding, local, shape)
  return multihost_utils.process_allgather(whole, tiled=True)


def all_true(value: bool) -> bool:
  """Whether the value is true in every process; all processes must call."""
  return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def largest(value: int) -> int:
  """The largest of all processes' values; all processes must call."""
  return int(np.max(multihost_utils.process_allgather(np.array(value))))


def check_same(values: Callable[[], dict[str, str]]) -> None:
  """Compares what every process has of each name; all processes must call.

  Args:
    values: called where there are several.
  Raises:
    ValueError: some differ; names what, and the processes that differ from the first.
  """
  if jax.process_count() == 1:
    return
  found = values()
  digests = [list(hashlib.sha256(value.encode()).digest()) for value in found.values()]
  all_HNB = np.asarray(multihost_utils.process_allgather(np.array(digests, np.uint8)))
  differ_HN = (all_HNB != all_HNB[:1]).any(axis=-1)
  wrong = [
    f"{name} (process {', '.join(map(str, np.flatnonzero(differ_H)))})"
    for name, differ_H in zip(found, differ_HN.T, strict=True)
    if differ_H.any()
  ]
  if wrong:
    raise ValueError(
      f"The processes of this run do not have the same {'; '.join(wrong)} as process 0: start all "
      "from the same commit with the same flags and files."
    )


_PLACES = itertools.count()  # where processes wait for one another; a name is used once


def barrier(name: str, seconds: float) -> None:
  """Waits for all processes.

  Raises:
    RuntimeError: some did not come in time; names them. The process then ends without them.
  """
  if jax.process_count() == 1:
    return
  place = _Place(name)
  place.come()
  try:
    place.client.wait_at_barrier(place.key, timeout_in_ms=round(1000 * seconds))
  except Exception as error:
    raise place.deserted(seconds) from error


def wait(arrays, name: str, seconds: float) -> None:
  """Waits for arrays that all processes compute together, as long as all wait for them.

  Raises:
    RuntimeError: after twice the time some do not wait; names them, as `barrier` does.
  """
  if jax.process_count() == 1:
    return
  place, until, came = _Place(name), time.monotonic() + seconds, False
  while not all(array.is_ready() for array in jax.tree.leaves(arrays)):
    if time.monotonic() > until:
      if came and place.missing():
        raise place.deserted(2 * seconds)
      place.come()
      until, came = time.monotonic() + seconds, True
    time.sleep(1e-3)


class _Place:
  """Where processes come to, known to all through the first of them."""

  def __init__(self, name: str):
    from jax._src.distributed import global_state  # no public way to a barrier with a time-out

    self.client, self._name = global_state.client, name
    self.key = f"alignx_jax/{name}/{next(_PLACES)}"

  def come(self) -> None:
    self.client.key_value_set(f"{self.key}/{jax.process_index()}", "here", allow_overwrite=True)

  def missing(self) -> list[str]:
    """The processes that have not come."""
    here = {path.rsplit("/", 1)[1] for path, _ in self.client.key_value_dir_get(f"{self.key}/")}
    return [str(index) for index in range(jax.process_count()) if str(index) not in here]

  def deserted(self, seconds: float) -> RuntimeError:
    """What to raise; JAX would wait for the missing once more, so the program ends at its end."""
    atexit.register(_end)
    return RuntimeError(
      f"Waited {seconds:.0f} s at {self._name!r} for process {', '.join(self.missing()) or '?'} of "
      f"{jax.process_count()}: see its log; start all processes again."
    )


def _end() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)
