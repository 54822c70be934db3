"""Retries, dead processes and requests to stop, with trials that do nothing."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from alignx_jax.sweeps import cluster, running
from alignx_jax.sweeps.options import sweep_options
from alignx_jax.sweeps.plan import Planned
from alignx_jax.sweeps.worker import Worker
from configs import base


class Idle(Worker):
  """A worker whose trials do what their names say."""

  def run(self, trial, control=None, coordinator="", count=1, index=0):
    trial.workdir.mkdir(parents=True, exist_ok=True)
    tries = trial.workdir / "tries"
    tries.open("a").write(f"{os.getpid()}\n")
    first = len(tries.read_text().splitlines()) == 1
    kind = trial.name.partition("-")[0]
    if kind == "dies" or (kind == "once" and first):
      os._exit(3)
    if kind == "flaky" and first:
      return {"status": "failed", "reason": "OSError: full", "again": True}
    if kind == "wrong":
      return {"status": "failed", "reason": "ValueError: no", "again": False}
    if kind == "broken":
      return {"status": "failed", "reason": "ImportError: no optax", "broken": True}
    if kind == "long":
      asked = []
      signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
      for _ in range(600):
        if asked:
          (trial.workdir / "saved").touch()
          return {"status": "interrupted", "reason": "exit 75"}
        time.sleep(0.1)
    return {"status": "finished", "accuracy": 0.5, "seconds": 0.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
  monkeypatch.setattr(cluster, "Worker", Idle)

  def run(*names, **options):
    plan = [Planned(name, {}, {}, base.get_config(), tmp_path / name) for name in names]
    chosen = sweep_options()
    chosen.update(options)
    running.run_trials(plan, chosen, tmp_path)
    return {trial.name: running.outcome_of(trial) for trial in plan}

  return run


def _tries(path: Path):
  return (path / "tries").read_text().split()


@pytest.mark.slow
def test_failures_are_tried_again_where_that_may_help_and_the_rest_goes_on(run, tmp_path):
  names = ("fine-0", "dies", "flaky", "once", "wrong", "fine-1")
  found = run(*names, retries=1)
  assert {name: found[name]["status"] for name in names} == {
    **dict.fromkeys(("fine-0", "flaky", "once", "fine-1"), "finished"),
    **dict.fromkeys(("dies", "wrong"), "failed"),
  }
  assert {name: len(_tries(tmp_path / name)) for name in names} == {
    "fine-0": 1,
    "dies": 2,
    "flaky": 2,
    "once": 2,
    "wrong": 1,
    "fine-1": 1,
  }
  assert found["dies"]["reason"].startswith("its process died: ")
  assert found["flaky"]["attempts"] == 2 and found["wrong"]["attempts"] == 1
  # Again: what failed alone.
  found = run(*names, retries=0)
  assert len(_tries(tmp_path / "dies")) == 3 and len(_tries(tmp_path / "wrong")) == 2
  assert len(_tries(tmp_path / "fine-0")) == 1


@pytest.mark.slow
def test_processes_that_cannot_run_any_trial_end_the_sweep(run, tmp_path):
  with pytest.raises(RuntimeError, match="ImportError: no optax. Install alignx_jax with the same"):
    run("broken-0", "broken-1", "broken-2", cpus=len(os.sched_getaffinity(0)))
  assert not (tmp_path / "broken-1").exists()


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_has_its_trials_save(run, tmp_path):
  def ask():
    while not (tmp_path / "long-0" / "tries").exists():
      time.sleep(0.1)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=ask, daemon=True).start()
  with pytest.raises(KeyboardInterrupt):
    run("long-0", "after", cpus=len(os.sched_getaffinity(0)))
  assert (tmp_path / "long-0" / "saved").exists()
  assert not (tmp_path / "long-0" / "trial.json").exists()
  assert not (tmp_path / "after").exists()


def test_a_damaged_outcome_is_no_outcome(tmp_path):
  trial = Planned("a", {}, {}, base.get_config(), tmp_path)
  assert running.outcome_of(trial) is None
  (tmp_path / "trial.json").write_text(json.dumps({"status": "finished"})[:-3])
  assert running.outcome_of(trial) is None
