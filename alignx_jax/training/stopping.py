"""Asked to stop: by a preempted host's SIGTERM, or by Ctrl-C."""

import signal
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What a run that was asked to stop exits with, its state saved: run the same command again.
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h


class StopRequest:
  """While entered, the first SIGTERM or SIGINT is kept for `asked`; a second one acts at once."""

  _SIGNALS = signal.SIGTERM, signal.SIGINT

  asked = False

  def __enter__(self) -> "StopRequest":
    self._before = {}
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._keep) for number in self._SIGNALS}
    return self

  def _keep(self, number, frame):
    self.asked = True
    self._restore()

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __exit__(self, *_):
    self._restore()


def any_host() -> Callable[[bool], jax.Array]:
  """(a flag of this process) to whether any process's is set, the same in all.

  It only starts the exchange: read the result a step later, and nobody waits. All processes
  must call alike.
  """
  if jax.process_count() == 1:
    return np.asarray
  mesh = Mesh(np.array(jax.devices()), ("device",))
  split = NamedSharding(mesh, PartitionSpec("device"))
  program = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def start(flag: bool) -> jax.Array:
    mine = np.full(jax.local_device_count(), flag, np.int32)
    return program(jax.make_array_from_process_local_data(split, mine))

  return start
