"""Several processes train and evaluate as one: the same losses, results and checkpoints."""

import contextlib
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from alignx_jax.ahead.chips import parse_topology
from alignx_jax.data.loader import Loader
from alignx_jax.experiments import experiment as experiments
from alignx_jax.training import hosts
from alignx_jax.training import mesh as meshes
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.rendezvous import meet
from configs import base
from tests.faults.kill_and_resume import consumed
from tests.processes import run_together, start_together
from tests.small_records import small_record

SETTINGS = {
  "model.weights": "preset:tiny8",
  "history.policy": "all",
  "regions.context": 512,
  "regions.response": 32,
  "regions.examples": 3,
  # Of 25 examples lanes get 7, 6, 6 and 6, two a row: four rows of the first, three of others.
  "data.train_records": 25,
  "data.test_records": 25,
  "train.rows": 4,
  "train.checkpoint_every": 2,
  "optimizer.learning_rate": 1e-3,
  "eval.rows": 4,
}


def run(command, workdir, data, *, processes, devices, extra=()):
  settings = SETTINGS | {"data.path": data}
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  arguments = ["-m", f"alignx_jax.{command}", "--config=configs/base.py", f"--workdir={workdir}"]
  return run_together([*arguments, *flags, *extra], processes=processes, devices=devices)


def table(output):
  return [line for line in output.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "records.json"
  path.write_text(json.dumps([small_record(i) for i in range(60)]), encoding="utf-8")
  return path


def test_the_data_is_ragged(data):
  config = base.get_config()
  config.update_from_flattened_dict(SETTINGS | {"data.path": str(data)})
  experiment = experiments.load_experiment(config)
  for examples in (experiment.train, experiment.test):
    loader = Loader(examples, experiment.formatting, rows=4)
    lanes = loader.start()
    assert [len(list(loader.batches(lanes[own]))) for own in ([0, 1], [2, 3])] == [4, 3]


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path, data):
  run("train", tmp_path / "one", data, processes=1, devices=4)
  first, second = run("train", tmp_path / "two", data, processes=2, devices=2)
  assert table(first) and not table(second)
  lines, others = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
  assert len(lines) == len(others) == 4
  for line, other in zip(lines, others, strict=True):
    assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
  (one,) = (tmp_path / "one" / "reference").glob("reference_*.npz")
  scores, others = (
    np.load(tmp_path / name / "reference" / one.name)["scores"] for name in ("one", "two")
  )
  assert scores.shape == (25, 2) and np.all(np.isfinite(scores))
  np.testing.assert_allclose(others, scores, rtol=1e-5)
  one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
  assert [(r["policy"], r["condition"], r["examples"]) for r in one] == [
    (r["policy"], r["condition"], r["examples"]) for r in two
  ]
  # What two processes saved one evaluates, and two export what one exports.
  (again,) = run("evaluate", tmp_path / "two", data, processes=1, devices=4)
  assert table(again) == table(first)
  for processes in (1, 2):
    output = tmp_path / f"hf{processes}"
    devices = 4 // processes
    extra = [f"--output={output}"]
    run("export", tmp_path / "two", data, processes=processes, devices=devices, extra=extra)
  for file in ("model.safetensors", "config.json"):
    assert (tmp_path / "hf1" / file).read_bytes() == (tmp_path / "hf2" / file).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_with_the_same_examples_and_losses(tmp_path, data):
  """Two processes, then one on another mesh, then four; each was asked to stop."""
  settings = SETTINGS | {"data.path": data, "train.epochs": 3, "train.checkpoint_every": 99}

  def part(workdir, processes, devices, stop_at=None, **mesh):
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    flags += [f"--config.mesh.{name}={value}" for name, value in mesh.items()]
    flags += [f"--stop_at={stop_at}"] if stop_at else []
    command = ["-m", "tests.faults.small_run", "--config=configs/base.py", f"--workdir={workdir}"]
    outputs = run_together([*command, *flags], processes=processes, devices=devices)
    assert all(("stopped" in output) == (stop_at is not None) for output in outputs)
    return consumed(workdir)

  def forget():
    for file in (tmp_path / "moved").glob("consumed_*.jsonl"):
      file.unlink()

  whole = part(tmp_path / "whole", 1, 4, fsdp=4)
  found = part(tmp_path / "moved", 2, 2, stop_at=2, fsdp=4)
  first = max(found)
  forget()
  found |= part(tmp_path / "moved", 1, 4, stop_at=6, fsdp=2, tensor=2)
  second = max(found)
  assert 2 <= first < 6 <= second < max(whole)
  forget()
  found |= part(tmp_path / "moved", 4, 1, fsdp=4)
  assert found.keys() == whole.keys()
  for step, (loss, examples) in whole.items():
    assert sorted(found[step][1]) == sorted(examples), step
    assert float.fromhex(found[step][0]) == pytest.approx(float.fromhex(loss), abs=1e-5)


@pytest.mark.parametrize(
  ("topology", "slices", "rows", "sizes"),
  [
    ("v5e:8x8", 1, 32, {"fsdp": 0, "tensor": 2}),
    ("v5p:4x4x4", 1, 32, {"fsdp": 0, "tensor": 2}),
    ("v5p:4x4x4", 1, 16, {"fsdp": 0, "tensor": 4}),
    ("v6e:8x8", 1, 64, {"fsdp": 0}),
    ("v6e:8x8", 1, 8, {"fsdp": 0, "context": 8}),
    ("v5e:8x8", 2, 32, {"replica": 2, "fsdp": 0, "tensor": 4}),
  ],
)
def test_the_hosts_of_a_pod_read_every_row_and_share_all_or_none(topology, slices, rows, sizes):
  devices = parse_topology(topology, slices=slices).devices
  sizes = dict.fromkeys(meshes.AXES, 1) | sizes
  sharding = meshes.rows_sharding(meshes.make_mesh(sizes, devices), rows)
  processes = sorted({device.process_index for device in devices})
  own = {tuple(hosts.own_rows(sharding, rows, process).tolist()) for process in processes}
  assert len(processes) == 16 * slices
  assert sorted(row for part in own for row in part) == list(range(rows))


def test_half_of_the_variables_is_refused(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES, JAX_PROCESS_ID is not"):
    hosts.connect()


@pytest.mark.parametrize("missing", [0, 2])
def test_a_process_that_never_connects_is_named_by_all_others(missing):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"

  def told(index):
    with pytest.raises(RuntimeError) as error:
      meet(address, 3, index, 1.5)
    return str(error.value)

  with ThreadPoolExecutor() as pool:
    for text in pool.map(told, {0, 1, 2} - {missing}):
      assert f"Waited 2 s at {address} for process {missing} of 3" in text


def test_processes_meet_whoever_is_first_and_whatever_else_comes_to_the_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]

  def come(index):
    time.sleep(0.2 * index if index != 0 else 0.5)
    meet(f"localhost:{port}", 3, index, 30)
    return index

  def stranger():
    time.sleep(0.7)
    with socket.create_connection(("localhost", port)) as connection:
      connection.sendall(b"GET / HTTP/1.1\r\n")

  with ThreadPoolExecutor() as pool:
    other = pool.submit(stranger)
    assert list(pool.map(come, range(3))) == [0, 1, 2]
    with contextlib.suppress(OSError):
      other.result()


# ------------------------------------------------------------------ one of two processes


@contextlib.contextmanager
def small_run(workdir, data, *flags, **settings):
  """tests.faults.small_run in two processes, killed in the end."""
  settings = SETTINGS | {"data.path": data, "train.epochs": 9} | settings
  flags = [*(f"--config.{name}={value}" for name, value in settings.items()), *flags]
  command = ["-m", "tests.faults.small_run", "--config=configs/base.py", f"--workdir={workdir}"]
  running = start_together([*command, *flags], processes=2, devices=1)
  try:
    yield running
  finally:
    for process in running:
      process.kill()


def wait_for(path, running):
  deadline = time.monotonic() + 600
  while not path.exists():
    assert time.monotonic() < deadline and all(process.poll() is None for process in running)
    time.sleep(0.02)


@pytest.mark.slow
def test_a_process_that_hangs_in_training_is_named_and_the_others_end(tmp_path, data):
  with small_run(tmp_path, data, **{"train.barrier_seconds": 20.0}) as running:
    first, second = running
    wait_for(tmp_path / "consumed_1.jsonl", running)
    second.send_signal(signal.SIGSTOP)
    since = time.monotonic()
    error = first.communicate(timeout=200)[1]
    assert first.returncode == 1 and time.monotonic() - since < 90
  told = [line for line in error.splitlines() if line.startswith("Error: ")]
  assert len(told) == 1 and "for process 1 of 2" in told[0], error[-3000:]


@pytest.mark.slow
def test_sigterm_before_the_first_step_ends_a_process_at_once(tmp_path, data):
  with small_run(tmp_path, data) as running:
    wait_for(tmp_path / "lock", running)  # connected, and nothing is compiled yet
    running[1].terminate()
    assert running[1].wait(timeout=30) == -signal.SIGTERM
  assert not list(tmp_path.glob("consumed_*"))


@pytest.mark.slow
def test_in_a_thread_jax_notices_sigterm_and_all_processes_save_at_the_same_step(tmp_path, data):
  flags = ["--stop_at=3", "--in_thread"]
  with small_run(tmp_path, data, *flags, **{"train.checkpoint_every": 99}) as running:
    ended = [process.communicate(timeout=900) for process in running]
  assert all("stopped" in output for output, _ in ended), ended
  (checkpoint,) = (tmp_path / "checkpoints").iterdir()
  assert 4 <= int(checkpoint.name) <= 8
