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

SPENT = ("step", "data", "checkpoint", "evaluation", "setup")


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
    began: float,
  ):
    """
    Args:
      config: configs/base.py's; read here is `train`.
      ideal_seconds: of a step of full rows, at the peak of all devices; None if it is not known.
      fingerprint: of data and base model, for a replay.
      gather: this process's rows of an array to those of all; all processes call it.
      began: time.perf_counter() when this start of the run began.
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
    self._mark = began
    self._settle("setup")
    self._told = dict(self._spent)  # as of the last line written
    self._told["setup"] = 0.0
    self._done = collections.Counter()  # since then
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
    """Waits for a step and tells what it gave; whether some process was asked to stop.

    A line of metrics is written every `log_every` steps; its times and rates are of all since the
    line before.

    Raises:
      ValueError: the data has ended.
      FloatingPointError: so many steps in a row were not finite; their batches can be replayed.
    """
    step = pending.step
    metrics, stop = jax.device_get((pending.metrics, pending.stop))
    examples = float(metrics["loss"][1])
    self._done.update(tokens=float(metrics["filled"][0]), examples=examples)
    metrics = divide(metrics)
    if not examples:  # so many examples were refused
      raise ValueError(
        f"The data ended after {step} of {self._steps} steps; lower config.train.steps."
      )
    self._done.update(full_rows=metrics["filled"])
    metrics |= self._rates()
    self._bar.update(1)
    self._bar.set_postfix_str(
      f"loss {metrics['loss']:.4f} acc {metrics['reward_accuracy']:.2f} "
      f"margin {metrics['margin']:.3f} {metrics['tokens_per_second']:.0f} tok/s"
      + (f" skipped {self.skipped}" if self.skipped else "")
    )
    if step % self._config.log_every == 0 or step == self._steps - 1 or metrics["skipped"]:
      if self._writer:
        self._writer.write(step, metrics)
      self._told = dict(self._spent)
      self._done.clear()
    self.heartbeat.beat(step)
    self._look_at(pending, metrics)
    return bool(stop)

  def _rates(self) -> dict[str, float]:
    """Per second since the last line, and how the time was spent."""
    self._settle("step")
    spent = {what: self._spent[what] - self._told[what] for what in SPENT}
    seconds = max(spent["step"] + spent["data"], 1e-9)
    rates = {f"seconds/{what}": value for what, value in spent.items()}
    rates["tokens_per_second"] = self._done["tokens"] / seconds
    rates["examples_per_second"] = self._done["examples"] / seconds
    rates["goodput"] = self.totals()["goodput"]
    if self._ideal_seconds:
      # Needed FLOPs, padding not counted, over those that the devices could have done.
      rates["mfu"] = self._ideal_seconds * self._done["full_rows"] / seconds
    memory = jax.local_devices()[0].memory_stats()
    if memory:
      rates["device_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
    return rates

  def totals(self) -> dict[str, float]:
    """Seconds since the run was started, by what they were spent on, and the share of training."""
    self._settle("step")
    share = self._spent["step"] / max(sum(self._spent.values()), 1e-9)
    return {f"seconds/{what}": value for what, value in self._spent.items()} | {"goodput": share}

  @property
  def may_give_up(self) -> bool:
    """Whether one more step that is not finite ends the run.

    It is then read before the next is begun, so that the state is the one before the bad steps.
    """
    return len(self._bad) >= self._config.stop_after_skipped - 1

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
        with jax.transfer_guard_device_to_host("allow"):  # hosts exchange ids
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
    first, last = self._bad[0], self._bad[-1]
    examples = [self._all_ids(pending.rows) for pending in self._bad]
    path = self._workdir / f"replay_{first.step}.json"
    body = {
      "step": first.step,
      "steps": self._steps,
      "checkpoint": last.step + 1,  # its state is the one before them: none has changed it
      "examples": examples,
      "lanes": [self._gather(pending.lanes_BW).tolist() for pending in self._bad],
      "fingerprint": self._fingerprint,
    }
    if hosts.is_first():
      write_text(path, json.dumps(body) + "\n")
    raise FloatingPointError(
      f"{len(self._bad)} steps in a row were not finite, from step {first.step} on, examples "
      f"{', '.join(examples[0])}. The state before them is saved: look at them by the same command "
      f"with --replay_batch={path}; without, the run goes on after them."
    )

  def ids(self, rows: Rows) -> list[str]:
    """Of the examples that this process has in a batch."""
    return [self._loader.examples[i].id for i in self._indices(rows.example_BE)]

  def _all_ids(self, rows: Rows) -> list[str]:
    """Of the examples of all processes; all of them call it."""
    return [self._loader.examples[i].id for i in self._indices(self._gather(rows.example_BE))]

  def _indices(self, example_BE):
    slots = example_BE[example_BE >= 0].tolist()
    return [self._loader.stream.example(slot) for slot in slots]

  def _texts(self, rows) -> dict:
    """What users wrote, where config.train.log_text asks for it."""
    if not self._config.log_text:
      return {}
    examples = [self._loader.examples[i] for i in self._indices(rows.example_BE)]
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
