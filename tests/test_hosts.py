"""Several processes train and evaluate as one: the same losses, results and checkpoints."""

import json

import pytest

from alignx_jax.training import hosts
from alignx_jax.training.metrics import read_metrics
from tests.processes import run_together
from tests.small_records import small_record


def train(workdir, data, *, processes, devices, command="train", **options):
  options = {
    "model.weights": "preset:tiny8",
    "data.path": data,
    "history.policy": "all",
    "regions.context": 512,
    "regions.response": 32,
    "regions.examples": 3,
    "train.rows": 4,
    "train.checkpoint_every": 2,
    "optimizer.learning_rate": 1e-3,
    "eval.rows": 4,
  } | options
  flags = [f"--config.{name}={value}" for name, value in options.items()]
  arguments = ["-m", f"alignx_jax.{command}", "--config=configs/base.py", f"--workdir={workdir}"]
  return run_together(arguments + flags, processes=processes, devices=devices)


def table(output):
  return [line for line in output.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  # The last batch of the test pairs is ragged: some processes end earlier.
  path = tmp_path_factory.mktemp("data") / "records.json"
  path.write_text(json.dumps([small_record(i) for i in range(44)]), encoding="utf-8")
  return path


def test_two_processes_are_as_one(tmp_path, data):
  train(tmp_path / "one", data, processes=1, devices=4)
  first, second = train(tmp_path / "two", data, processes=2, devices=2)
  assert table(first) and not table(second)
  lines, others = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
  assert len(lines) == len(others) >= 3
  for line, other in zip(lines, others, strict=True):
    assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
  one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
  assert [(r["policy"], r["condition"], r["examples"]) for r in one] == [
    (r["policy"], r["condition"], r["examples"]) for r in two
  ]
  # What two processes saved one evaluates.
  (again,) = train(tmp_path / "two", data, processes=1, devices=4, command="evaluate")
  assert table(again) == table(first)


def test_half_of_the_variables_is_refused(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID is not"):
    hosts.connect()
