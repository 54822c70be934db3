"""Sweeps on Ray: shared references, failures, resumption, several hosts, halving, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.small_records import write_small_records

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sweep(tmp_path):
  """sweep(trials, *flags) runs them as a person does; sweep.start does not wait."""
  records = write_small_records(tmp_path / "records.json")

  def start(trials, *flags):
    environment = os.environ | {
      "SMALL_RECORDS": str(records),
      "SMALL_TRIALS": json.dumps(trials),
      "PYTHONPATH": str(ROOT),
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    command = [sys.executable, "-m", "alignx_jax.sweep", "--sweep=tests/small_sweep.py"]
    return subprocess.Popen(
      [*command, f"--workdir={tmp_path / 'sweep'}", "--config.train.steps=4", *flags],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(trials, *flags):
    process = start(trials, *flags)
    output, error = process.communicate(timeout=600)
    return process.returncode, output, error

  run.start, run.workdir = start, tmp_path / "sweep"
  return run


def _times(workdir):
  return {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("trials/*/trial.json")}


@pytest.mark.slow
def test_trials_share_a_reference_failures_are_told_and_nothing_is_repeated(sweep):
  trials = {
    "early": {"train.checkpoint_every": 1},
    "bad": {"data.path": "nowhere.json"},
    "late": {"train.checkpoint_every": 3},
  }
  code, output, error = sweep(trials, "--config.sweep.cpus=1")  # two at once, if there are CPUs
  assert code == 1, error[-2000:]
  assert "Traceback" not in error and "1 of 3 trials failed" in error
  told = output.splitlines()
  assert any(line.startswith("bad failed: FileNotFoundError: ") for line in told)
  rows = {row["name"]: row for row in pq.read_table(sweep.workdir / "sweep.parquet").to_pylist()}
  assert rows["bad"]["attempts"] == 2 and rows["bad"]["accuracy"] is None
  # How often a checkpoint is kept changes nothing else.
  assert rows["early"]["accuracy"] == rows["late"]["accuracy"] is not None
  assert rows["early"]["steps"] == 4
  assert len(list(sweep.workdir.glob("cache/reference/*.npz"))) == 1
  scored = [
    name
    for name in trials
    if "reference: " in (sweep.workdir / "trials" / name / "log.txt").read_text()
  ]
  assert len(scored) == 1  # the other waited
  before = _times(sweep.workdir)
  code, output, _ = sweep(trials | {"bad": {"data.path": "nowhere.json"}}, "--config.sweep.cpus=2")
  after = _times(sweep.workdir)
  assert code == 1
  assert [name for name in trials if after[name] != before[name]] == ["bad"]
  # Refused before anything is run.
  code, _, error = sweep({"early": {"train.checkpoint_every": 2}})
  assert code == 1 and "train.checkpoint_every was 1 and is 2. Use another --workdir" in error


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "ask"])
def test_a_sweep_cut_off_in_the_middle_goes_on_and_repeats_nothing(sweep, how):
  trials = {f"t{i}": {"seed": i, "train.checkpoint_every": 1} for i in range(4)}
  flags = ["--config.train.steps=6", "--config.sweep.cpus=2"]
  process = sweep.start(trials, *flags)
  second = sweep.workdir / "trials" / "t1" / "checkpoints" / "2"
  deadline = time.monotonic() + 400
  while not second.exists():
    assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-3000:]
    time.sleep(0.05)
  process.send_signal(how)
  process.communicate(timeout=120)
  assert process.returncode == (75 if how == signal.SIGTERM else -signal.SIGKILL)
  before = _times(sweep.workdir)
  assert "t0" in before and "t3" not in before
  code, output, error = sweep(trials, *flags)
  assert code == 0, error[-3000:]
  after = _times(sweep.workdir)
  assert after["t0"] == before["t0"]
  # Each step was trained once, but for those after the last checkpoint before a kill.
  for name in trials:
    log = sweep.workdir / "trials" / name / "logs" / "host_0.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    starts = [event["step"] for event in events if event["event"] == "start"]
    assert starts == ([0, starts[-1]] if name == "t1" else [0])
    assert name != "t1" or starts[-1] >= 2
  rows = pq.read_table(sweep.workdir / "sweep.parquet").to_pylist()
  assert [row["status"] for row in rows] == ["finished"] * 4


@pytest.mark.slow
def test_a_trial_of_two_processes_is_that_of_one(sweep):
  one = {"one": {"train.devices": 0}}
  assert sweep(one, "--config.sweep.cpus=1")[0] == 0
  two = one | {"two": {"train.devices": 0}}
  code, output, error = sweep(two, "--config.sweep.cpus=1", "--config.sweep.hosts=2")
  assert code == 0, error[-3000:] + output
  rows = pq.read_table(sweep.workdir / "sweep.parquet").to_pylist()
  assert rows[0]["accuracy"] == rows[1]["accuracy"]
  assert (sweep.workdir / "trials" / "two" / "log_1.txt").exists()
  assert (sweep.workdir / "trials" / "two" / "logs" / "host_1.jsonl").exists()


@pytest.mark.slow
def test_halving_stops_a_trial_that_is_behind_those_that_came_before(sweep):
  users = {"data.path": "simulated", "data.train_records": 16, "data.test_records": 4}
  users |= {"data.validation_records": 24, "history.policy": "all", "train.log_every": 1}
  users |= {"model.weights": "package:alignx_jax/models/simulated_base"}
  users |= {"regions.context": 640, "regions.response": 96, "eval.every": 1}
  sweep.workdir.mkdir()
  # Three trials that prefer as every user does came before.
  before = [json.dumps([1, f"before{i}", 1.0]) for i in range(3)]
  (sweep.workdir / "halving.jsonl").write_text("\n".join(before) + "\n")
  flags = ["--config.sweep.halving=2", "--config.optimizer.learning_rate=1e-9"]
  code, output, error = sweep({"behind": users}, *flags)
  assert code == 0, error[-3000:]
  (row,) = pq.read_table(sweep.workdir / "sweep.parquet").to_pylist()
  assert row["status"] == "stopped" and row["steps"] == 1 and row["accuracy"] is None
  assert 0 < row["validation_accuracy"] < 1
  last = json.loads((sweep.workdir / "halving.jsonl").read_text().splitlines()[-1])
  assert last == [1, "behind", row["validation_accuracy"]]


def test_halving_asks_for_accuracies(sweep):
  code, _, error = sweep({"a": {}}, "--config.sweep.halving=2")
  assert code == 1 and "compares accuracies of config.eval.every: set that" in error


@pytest.mark.slow
def test_no_trial_fits(sweep):
  code, _, error = sweep({"a": {}}, "--config.sweep.tpus=4")
  assert code == 1 and "A trial asks for 4 TPU and there are 0 in all" in error


@pytest.mark.slow
def test_each_trial_has_a_slice_of_its_own():
  command = [sys.executable, "-m", "tests.slices"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  assert sorted(done.stdout.splitlines()) == ["slice0 slice0", "slice1 slice1"]
