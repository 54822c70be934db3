"""One trial of a sweep: trained, evaluated, told as a row of plain values."""

import contextlib
import dataclasses
import fcntl
import math
import time
from pathlib import Path

from flax import nnx

from alignx_jax.evaluation.accuracy import CONDITIONS, accuracy_rows
from alignx_jax.evaluation.results import write_results
from alignx_jax.experiments import experiment as experiments
from alignx_jax.experiments import measuring
from alignx_jax.experiments.bridges import told_by
from alignx_jax.experiments.config_checks import has_head, has_latent
from alignx_jax.experiments.experiment import Experiment
from alignx_jax.personas.persona import HistoryPolicy
from alignx_jax.sweeps.plan import Planned
from alignx_jax.training import hosts
from alignx_jax.training.run_config import code_version


class StoppedEarly(Exception):
  """By halving; has the trial's outcome."""

  def __init__(self, outcome: dict):
    super().__init__(outcome)
    self.outcome = outcome


def run_trial(trial: Planned, control=None) -> dict:
  """Trains a trial, or goes on with it, and evaluates it.

  Args:
    control: a Ray actor of halving.Halving, if trials may be stopped early.
  Returns:
    "status": "finished"; "accuracy", its bootstrap interval "low" to "high" over "pairs" of the
    test split, "shuffled" (the floor: the same with other users' personas), "steps", "version"
    and "results", the rows that the trial's results.json has.
  Raises:
    StoppedEarly: as an outcome, with the "validation_accuracy" so far.
  """
  config, workdir = trial.config, trial.workdir
  if hosts.is_first():
    _wait_until_free(workdir / "lock")
  experiment = told_by(experiments.load_experiment(config))
  evaluate = None
  if config.eval.every:
    measured, step = measuring.validation_accuracy(experiment), _steps_done(workdir)

    def evaluate(params):
      nonlocal step
      accuracy = measured(params)
      step = config.eval.every * (step // config.eval.every + 1)
      if control is not None and not _goes_on(control, trial.name, step, accuracy):
        outcome = {"status": "stopped", "validation_accuracy": accuracy, "steps": step}
        raise StoppedEarly(outcome | {"version": code_version()})
      return accuracy

  trained = experiments.run_training(experiment, workdir, evaluate=evaluate)
  results = trial_results(experiment, trained.params, workdir)
  if hosts.is_first():
    write_results(workdir / "results.json", results)
  first = results[0]
  floor = [r["accuracy"] for r in results if r["condition"] == "shuffled"]
  return {
    "status": "finished",
    "accuracy": first["accuracy"],
    "low": first["low"],
    "high": first["high"],
    "pairs": first["examples"],
    "shuffled": floor[0] if floor else math.nan,
    "steps": trained.steps,
    "version": code_version(),
    "results": results,
  }


def trial_results(experiment: Experiment, params: nnx.State, workdir: Path) -> list[dict]:
  """Matched accuracy on the test pairs, then the same with other users' personas, if any are read.

  The policy sees of a persona what it saw in training, all of it where that is drawn as the
  release does.
  """
  name, history = measuring.policy_name(experiment.config), shown(experiment.config)
  base, condition = measuring.base_scorer(experiment), CONDITIONS[name][0]
  if has_head(experiment.config):
    policy = measuring.bridge_scorer(experiment, params, workdir, history=history)
    ratio = lambda shuffle: policy.score(condition, shuffle) - base.score("none")
  elif has_latent(experiment.config):
    policy = measuring.policy_scorer(experiment, params, workdir)
    ratio = lambda shuffle: policy.score(condition, shuffle, history) - base.score("none")
  else:
    policy = measuring.policy_scorer(experiment, params, workdir)
    # Profiles, which a head inferred, are not drawn from.
    key = (history,) if condition != "profile" else ()
    ratio = lambda shuffle: (
      policy.score(condition, shuffle, *key) - base.score(condition, shuffle, *key)
    )
  return [
    row
    for told, shuffle in ((condition, False), ("shuffled", True))
    if told in CONDITIONS[name]
    for row in accuracy_rows(name, told, "matched", policy.examples, ratio(shuffle))
  ]


def shown(config) -> HistoryPolicy:
  """What of a persona a trial is evaluated with."""
  history = HistoryPolicy(**config.history)
  return dataclasses.replace(history, policy="all") if history.policy == "release" else history


def _wait_until_free(path: Path, seconds: float = 60) -> None:
  """Until the process of a sweep that was killed, and which ends by itself, lets go of a trial."""
  deadline = time.monotonic() + seconds
  while path.exists() and time.monotonic() < deadline:
    with path.open("a") as lock, contextlib.suppress(BlockingIOError):
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return
    time.sleep(0.5)


def _steps_done(workdir: Path) -> int:
  steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  return max(steps, default=0)


def _goes_on(control, name: str, step: int, accuracy: float) -> bool:
  """What halving says to the first process; the same in all."""
  import ray

  stops = hosts.is_first() and not ray.get(control.goes_on.remote(name, step, accuracy))
  return not hosts.largest(int(stops))
