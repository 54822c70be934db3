"""The trials of a sweep to their outcomes: whichever are left, on whatever is free."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignx_jax.files import write_text
from alignx_jax.sweeps import cluster
from alignx_jax.sweeps.halving import Halving
from alignx_jax.sweeps.plan import Planned

DONE = ("finished", "stopped")
SAVING_SECONDS = 60  # that trials have to save when the sweep is asked to stop


@dataclasses.dataclass
class _Job:
  """A trial that runs.

  Attributes:
    left: references to outcomes that are not there yet.
    outcome: of its first process.
  """

  trial: Planned
  attempts: int
  gang: cluster.Gang
  left: list[Any]
  outcome: dict = dataclasses.field(default_factory=dict)


def outcome_of(trial: Planned) -> dict | None:
  """What came of a trial, from its folder; None if nothing has yet."""
  path = trial.workdir / "trial.json"
  if not path.exists():
    return None
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    return None  # damaged: it is run again, which repeats its evaluation alone


def run_trials(plan: list[Planned], options, workdir: Path, *, address: str = "") -> None:
  """Runs the trials that have not ended well yet, as many at once as fit; each leaves trial.json.

  Args:
    options: config.sweep.
    address: of a Ray cluster; empty for this computer alone.
  Raises:
    ValueError: nothing fits the resources, or halving has no rungs.
    RuntimeError: no trial can run in the workers' processes.
    KeyboardInterrupt: asked to stop; running trials were given time to save.
  """
  left = collections.deque(
    (trial, 1) for trial in plan if (outcome_of(trial) or {}).get("status") not in DONE
  )
  if options.halving and not all(trial.config.eval.every for trial, _ in left):
    raise ValueError(
      "config.sweep.halving compares accuracies of config.eval.every: set that in every trial."
    )
  if not left:
    return
  done = len(plan) - len(left)
  with cluster.started(address), _interrupted_by_sigterm():  # Ray takes signals for itself
    sweep = _Running(options, Path(workdir), _environment(options, workdir, address), left)
    with tqdm(total=len(plan), initial=done, desc="trials", unit="trial", smoothing=0) as bar:
      for trial, outcome in sweep.outcomes():
        write_text(trial.workdir / "trial.json", json.dumps(outcome, indent=1) + "\n")
        bar.update()
        bar.set_postfix_str(f"{trial.name}: {told(outcome)}")


def told(outcome: dict) -> str:
  """An outcome in a few words."""
  if outcome["status"] == "finished":
    return f"{100 * outcome['accuracy']:.1f} %"
  return outcome["status"]


class _Running:
  def __init__(self, options, workdir, environment, left):
    import ray

    self._options, self._environment, self._left = options, environment, left
    self._jobs, self._idle, self._gangs = [], [], 0
    self._most = cluster.fitting(options)
    self._control = None
    if options.halving:
      halving = ray.remote(Halving).options(num_cpus=0)
      first = left[0][0].config.eval.every
      self._control = halving.remote(workdir / "halving.jsonl", eta=options.halving, first=first)

  def outcomes(self) -> Iterator[tuple[Planned, dict]]:
    """Each trial that ended, and how."""
    import ray

    try:
      while self._left or self._jobs:
        self._start()
        references = [ref for job in self._jobs for ref in job.left]
        for ref in ray.wait(references, timeout=30)[0]:
          job = next((job for job in self._jobs if ref in job.left), None)
          if job is not None and (ended := self._take(job, ref)):
            yield ended
    except KeyboardInterrupt:
      self._stop()
      raise

  def _start(self):
    if self._gangs < len(self._left) + len(self._jobs):
      with contextlib.suppress(ValueError):  # a node has gone: what runs goes on
        self._most = cluster.fitting(self._options)  # or some have come
    while self._left and (self._idle or self._gangs < self._most):
      if not self._idle:
        try:
          self._idle.append(cluster.Gang(self._options, self._environment))
        except TimeoutError:  # others have the slices
          if not self._jobs:
            raise
          return
        self._gangs += 1
      gang = self._idle.pop()
      trial, attempts = self._left.popleft()
      self._jobs.append(_Job(trial, attempts, gang, gang.run(trial, self._control)))

  def _take(self, job, ref):
    """Takes one process's outcome; gives the trial's, if that is the last or the trial is over."""
    import ray

    try:
      outcome = ray.get(ref)
    except ray.exceptions.RayError as error:  # the process is gone, or its computer
      told = " ".join(str(error).split())[:2000]
      outcome = {"status": "failed", "reason": f"its process died: {told}", "again": True}
    if outcome.get("broken"):
      raise RuntimeError(
        f"No trial can run in a worker's process: {outcome['reason']}. Install alignx_jax with the "
        "same dependencies wherever trials run."
      )
    bad = outcome["status"] in ("failed", "interrupted")
    job.left.remove(ref)
    if not job.outcome or bad:
      job.outcome = outcome
    if job.left and not bad:
      return None
    self._jobs.remove(job)
    if not bad:
      self._idle.append(job.gang)
    else:
      job.gang.end()
      self._gangs -= 1
      if (outcome.get("again") or outcome["status"] == "interrupted") and (
        job.attempts <= self._options.retries
      ):
        self._left.appendleft((job.trial, job.attempts + 1))
        return None
    outcome = {key: value for key, value in job.outcome.items() if key != "again"}
    return job.trial, outcome | {"attempts": job.attempts}

  def _stop(self):
    """Has running trials save, as far as they do in time."""
    import ray

    for job in self._jobs:
      job.gang.interrupt()
    references = [ref for job in self._jobs for ref in job.left]
    with contextlib.suppress(KeyboardInterrupt):  # a second one acts at once
      if references:
        ray.wait(references, num_returns=len(references), timeout=SAVING_SECONDS)


def _environment(options, workdir: Path, address: str) -> dict[str, str]:
  """Of the workers: compiled programs are shared, and processes of one computer share its CPUs."""
  programs = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  environment = {
    "JAX_COMPILATION_CACHE_DIR": programs or str(Path(workdir).absolute() / "cache" / "programs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "TF_CPP_MIN_LOG_LEVEL": "3",
  }
  if not address and options.cpus:
    environment["NPROC"] = str(math.ceil(options.cpus))  # XLA's threads
  return environment


@contextlib.contextmanager
def _interrupted_by_sigterm():
  def interrupt(number, frame):
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
