"""What a Ray worker does: one trial after another, in a process with its own JAX.

Nothing heavy is imported before a trial is run: Ray loads this module first.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path


class Worker:
  """One process of a trial; as a Ray actor. Its trials share what JAX has compiled."""

  def __init__(self, environment: dict[str, str], folder: str):
    os.environ.update(environment)
    with contextlib.suppress(OSError):
      os.chdir(folder)  # which paths in configs may be relative to
    self._connected = False

  def place(self) -> dict:
    """Where this process is."""
    import ray

    return {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}

  def coordinator(self) -> str:
    """An address at which JAX's processes of a trial may meet, at the first of them."""
    import ray

    with socket.socket() as probe:
      probe.bind(("", 0))
      return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

  def run(self, trial, control=None, coordinator="", count=1, index=0) -> dict:
    """Runs a trial, or goes on with it; what it prints goes to its folder.

    Args:
      trial: plan.Planned.
      control: the actor that knows of halving, if any.
      coordinator: of several processes that act as one, `count` of them.
    Returns:
      An outcome: "status", which is "finished" or "stopped" by halving (see trial.run_trial),
      "interrupted", or "failed", which have a "reason"; with "again" it may go better next time,
      with "broken" no trial can be run in such a process.
    """
    started = time.time()
    try:
      from alignx_jax.sweeps.trial import StoppedEarly, run_trial
    except Exception as error:
      return {"status": "failed", "reason": reason(error), "broken": True}
    log = trial.workdir / (f"log_{index}.txt" if count > 1 else "log.txt")
    outcome = {}
    try:
      with printing_to(log):
        self._join(coordinator, count, index)
        outcome = run_trial(trial, control)
    except StoppedEarly as stopped:
      outcome = stopped.outcome
    except SystemExit as error:  # asked to stop: saved
      outcome = {"status": "interrupted", "reason": f"exit {error.code}"}
    except Exception as error:
      # A ValueError says what is wrong with a config or its data: it would come again.
      outcome = {
        "status": "failed",
        "reason": reason(error),
        "again": type(error) is not ValueError,
      }
    return outcome | {"seconds": time.time() - started}

  def _join(self, coordinator, count, index):
    if count > 1 and not self._connected:
      from alignx_jax.training import hosts

      os.environ |= {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
      }
      hosts.connect()
      self._connected = True


def interrupt(pid: int) -> None:
  """Asks a trial's process on this computer to save and end."""
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, signal.SIGTERM)


def reason(error: BaseException) -> str:
  """An exception as one line."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:2000]


@contextlib.contextmanager
def printing_to(path: Path):
  """Everything that this process prints is added to a file; so is an exception's traceback."""
  import traceback

  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a", encoding="utf-8") as file:
    before = [os.dup(number) for number in (1, 2)]
    try:
      for number in (1, 2):
        os.dup2(file.fileno(), number)
      yield
    except Exception:
      traceback.print_exc()
      raise
    finally:
      for stream in (sys.stdout, sys.stderr):
        stream.flush()
      for number, kept in zip((1, 2), before, strict=True):
        os.dup2(kept, number)
        os.close(kept)
