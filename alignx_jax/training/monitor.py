"""What a running step tells: metrics, where the time goes, and what someone should look at."""

import collections
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from alignx_jax.data.loader import Loader
from alignx_jax.data.rows import Rows
from alignx_jax.files import write_text
from alignx_jax.training import hosts
from alignx_jax.training.events import EventLog
from alignx_jax.training.metrics import MetricWriter, divide
from alignx_jax.training.workdir import GrowingFiles, Heartbeat

SPENT = ("step", "data", "checkpoint", "evaluation")


class Pending(NamedTuple):
  """A step that was started.

  Attributes:
    rows: of this process.
    lanes_BW: of this process, before the step.
    stop: whether some process was asked to stop, when it is read.
  """

  step: int
  rows: Rows
  lanes_BW: np.ndarray
  metrics: dict
  stop: jax.Array


class Monitor:
  """Reads each step's metrics one step later, so that the devices never wait for it."""

  def __init__(
    self,
    config,
    workdir: Path,
    loader: Loader,
    *,
    first: int,
    steps: int,
    ideal_seconds: float | None,
    fingerprint: str,
    gather: Callable[[np.ndarray], np.ndarray],
  ):
    """
    Args:
      config: configs/base.py's; read here is `train`.
      ideal_seconds: of a step of full rows, at the peak of all devices; None if it is not known.
      fingerprint: of data and base model, for a replay.
      gather: this process's lanes to those of all; all processes call it.
    """
    self._config, self._workdir, self._loader = config.train, workdir, loader
    self._steps, self._ideal_seconds = steps, ideal_seconds
    self._fingerprint, self._gather = fingerprint, gather
    process = jax.process_index()
    names = [f"logs/host_{process}.jsonl"] + ["metrics.jsonl"] * hosts.is_first()
    self._files = GrowingFiles(workdir, names)
    self.directory = self._files.directory
    self.log = EventLog(self.directory, process)
    self.heartbeat = Heartbeat(workdir, process)
    self._writer = MetricWriter(self.directory, first) if hosts.is_first() else None
    self._bar = tqdm(
      total=steps, initial=first, desc=workdir.name, unit="step", disable=not hosts.is_first()
    )
    self._spent = dict.fromkeys(SPENT, 0.0)
    self._reported = dict(self._spent)
    self._began = self._mark = time.perf_counter()
    self._norms = collections.deque(maxlen=100)
    self._bad = []  # Pending of the steps in a row that were left out
    self.skipped = 0

  @contextlib.contextmanager
  def spending(self, what: str):
    """Counts the time inside as spent on `what`, and all before it as spent on the step."""
    self._settle("step")
    try:
      yield
    finally:
      self._settle(what)

  def _settle(self, what):
    now = time.perf_counter()
    self._spent[what] += now - self._mark
    self._mark = now

  def report(self, pending: Pending) -> bool:
    """Waits for a step and writes what it gave; whether some process was asked to stop.

    Raises:
      ValueError: the data has ended.
      FloatingPointError: so many steps in a row were not finite; their batches can be replayed.
    """
    step = pending.step
    metrics, stop = jax.device_get((pending.metrics, pending.stop))
    counts = {"tokens": float(metrics["filled"][0]), "examples": float(metrics["loss"][1])}
    metrics = divide(metrics)
    if not counts["examples"]:  # so many examples were refused
      raise ValueError(
        f"The data ended after {step} of {self._steps} steps; lower config.train.steps."
      )
    metrics |= self._rates(counts, metrics["filled"])
    self._bar.update(1)
    self._bar.set_postfix_str(
      f"loss {metrics['loss']:.4f} acc {metrics['reward_accuracy']:.2f} "
      f"margin {metrics['margin']:.3f} {metrics['tokens_per_second']:.0f} tok/s"
      + (f" skipped {self.skipped}" if self.skipped else "")
    )
    if self._writer and (
      step % self._config.log_every == 0 or step == self._steps - 1 or metrics["skipped"]
    ):
      self._writer.write(step, metrics)
    self.heartbeat.beat(step)
    self._look_at(pending, metrics)
    return bool(stop)

  def _rates(self, counts, filled) -> dict[str, float]:
    """Per second since the last report, and how the time was spent."""
    self._settle("step")
    spent = {what: self._spent[what] - self._reported[what] for what in SPENT}
    self._reported = dict(self._spent)
    seconds = max(spent["step"] + spent["data"], 1e-9)
    rates = {f"seconds/{what}": value for what, value in spent.items()}
    rates["tokens_per_second"] = counts["tokens"] / seconds
    rates["examples_per_second"] = counts["examples"] / seconds
    # Share of the time since the start in which the devices trained.
    rates["goodput"] = self._spent["step"] / max(self._mark - self._began, 1e-9)
    if self._ideal_seconds:
      # Needed FLOPs, padding not counted, over those that the devices could have done.
      rates["mfu"] = self._ideal_seconds * filled / seconds
    memory = jax.local_devices()[0].memory_stats()
    if memory:
      rates["device_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
    return rates

  def _look_at(self, pending, metrics) -> None:
    step, rows, norm = pending.step, pending.rows, metrics["gradient_norm"]
    if metrics["skipped"]:
      self.skipped += 1
      self._bad.append(pending)
      ids = self.ids(rows)
      self.log.warn(
        "skipped",
        f"Step {step} was left out: loss {metrics['loss']}, gradient norm {norm}; examples "
        f"{', '.join(ids)}",
        step=step,
        examples=ids,
        **self._texts(rows),
      )
      if len(self._bad) >= self._config.stop_after_skipped:
        self._give_up()
      return
    self._bad.clear()
    usual = statistics.median(self._norms) if len(self._norms) >= 10 else np.inf
    if norm > self._config.spike_factor * usual:
      ids = self.ids(rows)
      self.log.warn(
        "spike",
        f"Step {step}: gradient norm {norm:.3g}, usually {usual:.3g}; examples {', '.join(ids)}",
        step=step,
        norm=norm,
        usual=usual,
        examples=ids,
        **self._texts(rows),
      )
    self._norms.append(norm)

  def _give_up(self) -> None:
    first = self._bad[0]
    path = self._workdir / f"replay_{first.step}.json"
    body = {
      "step": first.step,
      "steps": self._steps,
      "lanes": [self._gather(pending.lanes_BW).tolist() for pending in self._bad],
      "fingerprint": self._fingerprint,
    }
    if hosts.is_first():
      write_text(path, json.dumps(body) + "\n")
    raise FloatingPointError(
      f"{len(self._bad)} steps in a row were not finite, from step {first.step} on, examples "
      f"{', '.join(self.ids(first.rows))}. The state before them is saved: look at them by the "
      f"same command with --replay_batch={path}; without, the run goes on after them."
    )

  def ids(self, rows: Rows) -> list[str]:
    """Of the examples that this process has in a batch."""
    return [self._loader.examples[i].id for i in self._indices(rows)]

  def _indices(self, rows):
    slots = rows.example_BE[rows.example_BE >= 0].tolist()
    return [self._loader.stream.example(slot) for slot in slots]

  def _texts(self, rows) -> dict:
    """What users wrote, where config.train.log_text asks for it."""
    if not self._config.log_text:
      return {}
    examples = [self._loader.examples[i] for i in self._indices(rows)]
    return {"texts": [[e.post, e.chosen, e.rejected] for e in examples]}

  def sync(self) -> None:
    """Copies metrics and events to where the workdir is, if that is elsewhere."""
    self._files.sync()

  def close(self) -> None:
    """Closes the files."""
    self._bar.close()
    if self._writer:
      self._writer.close()
    self.log.close()
    self._files.close()
