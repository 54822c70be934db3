"""A run's directory: one run at a time writes to it, and shows that it lives."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from alignx_jax.files import write_text
from alignx_jax.training import hosts


@contextlib.contextmanager
def in_use(workdir: Path):
  """Holds the directory for this run, made if need be; a run that is killed lets go of it.

  Raises:
    OSError: it cannot be written to, or a live run holds it.
  """
  if not hosts.is_first():
    yield
    return
  path = Path(workdir) / "lock"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("a+", encoding="utf-8")
  except OSError as error:
    raise OSError(
      f"{workdir} cannot be written to ({error.strerror}); set --workdir to a directory that can."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      lock.seek(0)
      raise OSError(
        f"{workdir} is in use by a run ({lock.read().strip() or 'unknown'}); stop that one or use "
        "another --workdir."
      ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    yield


class Heartbeat:
  """heartbeat_HOST.json: the step a process did last and when, rewritten at most every 10 s."""

  SECONDS = 10

  def __init__(self, workdir: Path, process: int):
    self._path = Path(workdir) / f"heartbeat_{process}.json"
    self._last = 0.0

  def beat(self, step: int) -> None:
    now = time.time()
    if now - self._last >= self.SECONDS:
      self._last = now
      body = {"time": now, "step": step, "pid": os.getpid(), "host": socket.gethostname()}
      write_text(self._path, json.dumps(body) + "\n")
