"""A run's directory: one run at a time writes to it, and shows that it lives.

It may be on an object store (gs://…), which has neither locks nor files that grow.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path

from absl import logging

from alignx_jax.files import as_path, is_remote, write_text
from alignx_jax.training import hosts

# On an object store: seconds for which a sign of life holds the workdir, and between two.
LEASE, RENEWED = 120.0, 30.0
SETTLED = 1.0  # seconds after which of two runs that begin at once one has the workdir


@contextlib.contextmanager
def in_use(workdir):
  """Holds the directory for this run, made if need be; a run that is killed lets go of it.

  On an object store it does so after LEASE seconds, or at once if it was on this host.

  Raises:
    OSError: it cannot be written to, or a live run holds it.
  """
  if not hosts.is_first():
    yield
    return
  workdir = as_path(workdir)
  with _leased(workdir) if is_remote(workdir) else held(workdir):
    yield


@contextlib.contextmanager
def held(workdir: Path):
  """in_use of a local directory by this process, without asking JAX whether it is the first."""
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


@contextlib.contextmanager
def _leased(workdir):
  path = workdir / "lock"
  own = {"process": os.getpid(), "host": socket.gethostname(), "token": uuid.uuid4().hex}

  def renew():
    write_text(path, json.dumps(own | {"time": time.time()}) + "\n")

  def check():
    held = _lease(path)
    left = held.get("time", 0) + LEASE - time.time()
    if held.get("token") in (None, own["token"]) or left <= 0 or _died_here(held):
      return
    raise OSError(
      f"{workdir} is in use by a run (process {held['process']} on {held['host']}); stop that one "
      f"or use another --workdir. If it was killed, this is free in {left:.0f} s."
    )

  check()
  try:
    renew()
  except OSError as error:
    raise OSError(
      f"{workdir} cannot be written to ({error}); set --workdir to a directory that can."
    ) from error
  time.sleep(SETTLED)
  check()
  ended = threading.Event()

  def keep():
    while not ended.wait(RENEWED):
      try:
        if _lease(path).get("token") != own["token"]:
          logging.error("%s was taken over by another run: stop one of the two.", workdir)
          return
        renew()
      except OSError as error:
        logging.warning("%s cannot be written to: %s", path, error)

  keeper = threading.Thread(target=keep, daemon=True)
  keeper.start()
  try:
    yield
  finally:
    ended.set()
    keeper.join()
    if _lease(path).get("token") == own["token"]:
      path.unlink(missing_ok=True)


def _lease(path) -> dict:
  """What holds a workdir, {} if nothing does."""
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return {}


def _died_here(held: dict) -> bool:
  """Whether a run was on this host and is no more."""
  if held["host"] != socket.gethostname():
    return False
  if held["process"] == os.getpid():  # in a container started again
    return True
  try:
    os.kill(held["process"], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    pass
  return False


class GrowingFiles:
  """Where files that are appended to lie: in the workdir, or for an object store on this host.

  From there `sync` copies them whole. It is called with each checkpoint, so what a kill loses is
  of steps that are done again.
  """

  def __init__(self, workdir, names):
    """
    Args:
      names: of those that this process goes on with, if they are there.
    """
    self._workdir, self._copied = as_path(workdir), {}
    self.directory = self._workdir
    if not is_remote(workdir):
      return
    self.directory = Path(tempfile.mkdtemp(prefix="alignx_jax_"))
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        body = (self._workdir / name).read_bytes()
        (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / name).write_bytes(body)

  def sync(self) -> None:
    """Copies what has changed."""
    if self.directory == self._workdir:
      return
    for file in self.directory.rglob("*"):
      stat = file.stat()
      state = stat.st_size, stat.st_mtime_ns
      if file.is_file() and self._copied.get(file) != state:
        (self._workdir / str(file.relative_to(self.directory))).write_bytes(file.read_bytes())
        self._copied[file] = state

  def close(self) -> None:
    """Likewise, a last time."""
    self.sync()
    if self.directory != self._workdir:
      shutil.rmtree(self.directory)


class Heartbeat:
  """heartbeat_HOST.json: the step a process did last and when, rewritten at most every 10 s."""

  SECONDS = 10

  def __init__(self, workdir, process: int):
    self._path = as_path(workdir) / f"heartbeat_{process}.json"
    self._last = 0.0

  def beat(self, step: int) -> None:
    now = time.time()
    if now - self._last >= self.SECONDS:
      self._last = now
      body = {"time": now, "step": step, "pid": os.getpid(), "host": socket.gethostname()}
      write_text(self._path, json.dumps(body) + "\n")
