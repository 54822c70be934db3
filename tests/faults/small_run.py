"""A small run that writes down which examples each step had, for tests of what runs survive.

  python -m tests.faults.small_run --config=configs/base.py --workdir=DIR …
    [--stop_at=STEP] [--in_thread]

Appends {"step", "examples", "loss"} to DIR/consumed_PROCESS.jsonl, the loss as hexadecimal
digits: equal means bit for bit. With --stop_at the last process gets SIGTERM at that step. In a
thread Python sees no signals.
"""

import json
import os
import signal
import threading
from pathlib import Path

import jax
import numpy as np
from absl import flags

from alignx_jax import command_line
from alignx_jax.experiments import experiment as experiments
from alignx_jax.training import hosts
from alignx_jax.training.monitor import Monitor
from alignx_jax.training.stopping import EXIT_CODE

flags.adopt_module_key_flags(command_line)
_STOP_AT = flags.DEFINE_integer("stop_at", None, "The step at which a process gets SIGTERM.")

_IN_THREAD = flags.DEFINE_bool("in_thread", False, "Not in the main thread.")


def run(config, workdir: Path, *, stop_at: int | None = None) -> None:
  """Trains, as one of the processes that the environment says."""
  hosts.connect(config.train.barrier_seconds)
  report = Monitor.report

  def recorded(self, pending):
    numerator, denominator = jax.device_get(pending.metrics["loss"])
    line = {"step": pending.step, "examples": self.ids(pending.rows)}
    line["loss"] = float(np.float32(numerator / denominator)).hex()
    with (workdir / f"consumed_{jax.process_index()}.jsonl").open("a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
    if pending.step == stop_at and jax.process_index() == jax.process_count() - 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return report(self, pending)

  Monitor.report = recorded
  try:
    experiments.run_training(experiments.load_experiment(config), workdir)
  except SystemExit as stopped:
    assert stopped.code == EXIT_CODE and stop_at is not None
    print("stopped")


def main(config, workdir):
  if not _IN_THREAD.value:
    run(config, workdir, stop_at=_STOP_AT.value)
    return
  thread = threading.Thread(target=lambda: run(config, workdir, stop_at=_STOP_AT.value))
  thread.start()
  thread.join()


if __name__ == "__main__":
  command_line.run(main)
