"""How a system that is timed talks to tests/benchmarks/train_step.py.

It says what it computes of the batch, then for each line that comes in takes one step and says
what that took. Only the standard library: peers run this in environments of their own.
"""

import json
import os
import sys
import time
from pathlib import Path


class Turns:
  """The side of the system, which is told a directory as its first argument.

  Attributes:
    directory: what the benchmark wrote: batch.json, rows.npz, and weights/ as Hugging Face has it.
    batch: what is in batch.json.
  """

  def __init__(self):
    self.directory = Path(sys.argv[1])
    self.batch = json.loads((self.directory / "batch.json").read_text(encoding="utf-8"))
    self._answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

  def tell(self, **values) -> None:
    print(json.dumps(values), file=self._answers, flush=True)

  def wait(self) -> bool:
    """Until a step is asked for; False when none will be."""
    asked = sys.stdin.readline()
    self.start()
    return bool(asked)

  def start(self) -> None:
    """The clock's start, if it is not where `wait` ended."""
    self._started = time.perf_counter(), time.process_time()

  def done(self, loss: float) -> None:
    """The step is done; its loss is that before the update."""
    seconds, processor_seconds = time.perf_counter(), time.process_time()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    self.tell(
      loss=float(loss),
      seconds=seconds - self._started[0],
      processor_seconds=processor_seconds - self._started[1],
      peak_gib=peak / 2**20,
    )
