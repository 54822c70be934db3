"""Whatever happens to a workdir, a run goes on from what is good or says what is wrong."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from alignx_jax.experiments import experiment as experiments
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.stopping import EXIT_CODE
from tests.processes import run_together
from tests.small_records import small_config, write_small_records

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_small_records(tmp_path_factory.mktemp("data") / "records.json")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
  """The workdir of a run of six steps, and what it came to."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  return workdir, run(small_config(data), workdir)


def run(config, workdir):
  return experiments.run_training(experiments.load_experiment(config), workdir)


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy to be damaged."""
  return Path(shutil.copytree(finished[0], tmp_path / "run"))


# ------------------------------------------------------------------ damage to checkpoints


def state_like():
  """Arrays as a TrainState holds them, some of them larger than a block of the file format."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jax.numpy.asarray(rng.normal(size=shape), jax.numpy.float32)
  from alignx_jax.training.steps import TrainState

  params = {"a": array(300, 200), "b": array(7)}
  moments = {"mu": {"a": array(300, 200), "b": array(7)}, "count": jax.numpy.int32(3)}
  return TrainState(jax.numpy.int32(0), params, moments)


def changed(state, step):
  return jax.tree.map(lambda x: x + step, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A directory with checkpoints of steps 2 and 4."""
  directory = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(directory, keep=2)
  for step in (2, 4):
    checkpoints.save(step, changed(state_like(), step), {"config": {"x": step}})
  checkpoints.close()
  return directory


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def empty(path):
  os.truncate(path, 0)


def flip(path):
  """One bit in the middle."""
  body = bytearray(path.read_bytes())
  if body:
    body[len(body) // 2] ^= 1
  path.write_bytes(body)


def flip_late(path):
  body = bytearray(path.read_bytes())
  if body:
    body[-max(1, len(body) // 5)] ^= 16
  path.write_bytes(body)


def remove(path):
  path.unlink()


@pytest.mark.parametrize("harm", [truncate, empty, flip, flip_late, remove])
def test_a_damaged_file_of_a_checkpoint_is_harmless_or_found(saved, tmp_path, harm, caplog):
  state, found_damage = state_like(), 0
  files = sorted(p.relative_to(saved) for p in (saved / "checkpoints/4").rglob("*") if p.is_file())
  assert len(files) >= 15
  for i, file in enumerate(files):
    directory = Path(shutil.copytree(saved, tmp_path / str(i)))
    harm(directory / file)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      checkpoints = Checkpoints(directory, keep=2)
      steps = checkpoints.steps()
      restored = checkpoints.newest(state)
    assert restored.step in (2, 4), file
    for got, expected in zip(
      jax.tree.leaves(restored.state), jax.tree.leaves(changed(state, restored.step)), strict=True
    ):
      np.testing.assert_array_equal(got, expected, err_msg=str(file))
    assert restored.run == {"config": {"x": restored.step}}
    if restored.step == 2 and 4 in steps:
      found_damage += 1
      assert "step 4 is damaged" in caplog.text
      assert (directory / "damaged" / "4").is_dir()  # nothing is deleted
      # The run can save the same step again.
      checkpoints.save(4, changed(state, 4), {})
    checkpoints.close()
    if restored.step == 2:
      shutil.rmtree(directory / "damaged", ignore_errors=True)
  assert found_damage >= 3, harm


TWO_HOSTS = """
import os, sys
from pathlib import Path
from alignx_jax.training import hosts
hosts.connect()
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.steps import TrainState
mesh = Mesh(np.array(jax.devices()), "x")
def array(value, *axes):
  value = np.asarray(value, np.float32)
  split = NamedSharding(mesh, PartitionSpec(*axes))
  return jax.make_array_from_callback(value.shape, split, lambda index: value[index])
make = lambda step: TrainState(
  array(step), {"a": array(step + np.arange(4e4).reshape(200, 200), "x")}, {"m": array(step)}
)
directory = Path(sys.argv[1])
checkpoints = Checkpoints(directory, keep=2)
for step in (2, 4):
  checkpoints.save(step, make(step), {})
checkpoints.close()
if hosts.is_first():
  for path in directory.glob("checkpoints/4/params/ocdbt.process_1/d/*"):
    os.truncate(path, path.stat().st_size // 2)
hosts.barrier("harm", 60)
found = Checkpoints(directory, keep=2).newest(make(0))
mine = [state.params["a"].addressable_data(0) for state in (found.state, make(2))]
same = np.array_equal(*mine)
print(found.step, same, (directory / "damaged/4").is_dir(), flush=True)
hosts.barrier("end", 60)
"""


@pytest.mark.slow
def test_damage_that_one_host_alone_reads_is_skipped_by_all(tmp_path):
  for output in run_together(["-c", TWO_HOSTS, str(tmp_path)], processes=2, devices=2):
    assert output.split()[-3:] == ["2", "True", "True"]


def test_a_run_whose_every_checkpoint_is_damaged_stops_and_keeps_them(saved, tmp_path):
  directory = Path(shutil.copytree(saved, tmp_path / "run"))
  for step in (2, 4):
    truncate(directory / f"checkpoints/{step}/run/metadata")
  for _ in range(2):  # and so does the next start, which must not begin anew
    with pytest.raises(ValueError, match=r"Every checkpoint in .* is damaged \(2, 4\)"):
      Checkpoints(directory, keep=2).newest(state_like())
  assert Checkpoints(directory, keep=2).steps() == [2, 4]


@pytest.mark.parametrize("file", ["run/metadata", "params/_METADATA"])
def test_a_disk_that_fails_is_no_damage_and_nothing_is_skipped(saved, tmp_path, file):
  directory = Path(shutil.copytree(saved, tmp_path / "run"))
  (path := directory / "checkpoints/4" / file).unlink()
  path.symlink_to("/proc/self/mem")  # to read its start gives EIO
  with pytest.raises(OSError, match=r"of step 4 .* could not be read .*Input/output error"):
    Checkpoints(directory, keep=2).newest(state_like())
  assert Checkpoints(directory, keep=2).steps() == [2, 4]
  path.unlink()
  shutil.copy(saved / "checkpoints/4" / file, path)
  assert Checkpoints(directory, keep=2).newest(state_like()).step == 4


def wrapped(error):
  """As Orbax does."""
  outer = Exception("Encountered error while reading array index")
  outer.__cause__ = error
  return outer


@pytest.mark.parametrize(
  "error",
  [
    MemoryError(),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
    ValueError("UNKNOWN: Error opening: Failed to read [OS error 5: EIO Input/output error]"),
    wrapped(ValueError("UNAVAILABLE: Error reading gs://bucket")),
    PermissionError(13, "Permission denied"),
  ],
)
def test_what_is_no_sign_of_damage_stops_the_run(saved, tmp_path, monkeypatch, error):
  directory = Path(shutil.copytree(saved, tmp_path / "run"))
  checkpoints = Checkpoints(directory, keep=2)

  def restore(*_, **__):
    raise error

  monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
  with pytest.raises(OSError, match="Nothing shows that it is damaged"):
    checkpoints.newest(state_like())
  assert Checkpoints(directory, keep=2).steps() == [2, 4]


def test_values_that_were_swapped_within_a_checkpoint_are_found(saved, tmp_path, caplog):
  """Files of another checkpoint in its place: each whole, yet not what was saved."""
  directory = Path(shutil.copytree(saved, tmp_path / "run"))
  shutil.rmtree(directory / "checkpoints/4/params")
  shutil.copytree(saved / "checkpoints/2/params", directory / "checkpoints/4/params")
  restored = Checkpoints(directory, keep=2).newest(state_like())
  assert restored.step == 2 and "arrays differ from what was saved" in caplog.text


def test_a_run_goes_back_to_the_last_good_checkpoint_and_ends_alike(finished, workdir, data):
  (block,) = sorted((workdir / "checkpoints/6/params/d").iterdir())[:1]
  truncate(block)
  again = run(small_config(data), workdir)
  for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(finished[1].params), strict=True):
    np.testing.assert_array_equal(x, y)
  assert [line["step"] for line in read_metrics(workdir)] == list(range(6))


def test_a_half_written_checkpoint_is_not_one(finished, workdir, data):
  """What a kill leaves of a save that was under way."""
  source = workdir / "checkpoints/6"
  source.rename(workdir / "checkpoints/6.orbax-checkpoint-tmp")
  again = run(small_config(data), workdir)
  assert again.steps == 6
  assert Checkpoints(workdir, keep=2).steps() == [4, 6]


# ------------------------------------------------------------------ the rest of a workdir


@pytest.mark.parametrize("harm", [truncate, empty, remove])
def test_the_config_of_a_run_is_restored_from_its_checkpoint(workdir, data, harm):
  before = json.loads((workdir / "config.json").read_text())
  harm(workdir / "config.json")
  run(small_config(data), workdir)
  assert json.loads((workdir / "config.json").read_text()) == before


def test_metrics_cut_short_are_read_as_far_as_they_go(workdir, data):
  truncate(workdir / "metrics.jsonl")
  run(small_config(data), workdir)
  steps = [line["step"] for line in read_metrics(workdir)]
  assert steps and steps == list(range(len(steps)))


def test_damaged_lines_of_metrics_are_left_out_and_told(workdir, data, caplog):
  path = workdir / "metrics.jsonl"
  first, *lines = path.read_bytes().splitlines(keepends=True)
  harmed = [first.replace(b"step", b"stem", 1), lines[0].replace(b"{", b"\xfb", 1)]
  harmed += [lines[1].replace(b":", b'": "', 1), b"[]\n", b'{"step": "x"}\n']
  path.write_bytes(b"".join(harmed + lines[2:]))
  assert [line["step"] for line in read_metrics(workdir)] == [3, 4, 5]
  assert "5 lines are damaged" in caplog.text
  shutil.rmtree(workdir / "checkpoints/6")
  run(small_config(data), workdir)
  assert [line["step"] for line in read_metrics(workdir)] == [3, 4, 5]


@pytest.mark.parametrize("harm", [truncate, empty, flip, remove])
def test_cached_references_are_computed_again(finished, workdir, data, harm):
  (reference,) = (workdir / "reference").glob("reference_*.npz")
  expected = np.load(reference)
  harm(reference)
  shutil.rmtree(workdir / "checkpoints")
  again = run(small_config(data), workdir)
  np.testing.assert_array_equal(np.load(reference), expected)
  for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(finished[1].params), strict=True):
    np.testing.assert_array_equal(x, y)


def train_command(data, workdir, *flags):
  config = small_config(data)
  settings = {
    "model.weights": config.model.weights,
    "data.path": data,
    "regions.context": 512,
    "regions.response": 32,
    "regions.examples": 3,
    "train.rows": 2,
    "train.checkpoint_every": 2,
    "optimizer.learning_rate": 1e-2,
    "eval.rows": 2,
  }
  return [
    *(sys.executable, "-m", "alignx_jax.train", "--config=configs/base.py", "--noevaluate"),
    *(f"--config.{name}={value}" for name, value in settings.items()),
    f"--workdir={workdir}",
    *flags,
  ]


def start(*arguments):
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
    train_command(*arguments), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
  )


def disk_usage(path) -> int:
  return int(subprocess.check_output(["du", "-s", "--block-size=1", path]).split()[0])


@pytest.fixture
def small_disk(finished, tmp_path):
  """A directory on a disk of its own, which holds two and a half checkpoints of the run."""
  path = tmp_path / "disk"
  path.mkdir()
  checkpoint = disk_usage(finished[0] / "checkpoints/6")
  size = disk_usage(finished[0]) + checkpoint // 2
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("needs the right to mount")
  yield path
  subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_a_sentence_and_keeps_the_last_good_one(small_disk, data):
  process = start(data, small_disk / "run", "--config.train.keep_checkpoints=99")
  error = process.communicate(timeout=300)[1]
  assert process.returncode == 1
  # Threads of the libraries may add what became of their writes.
  told = [line for line in error.splitlines() if line.startswith("Error: ")]
  assert len(told) == 1 and "No space left on device" in told[0], error[-3000:]
  restored = Checkpoints(small_disk / "run", keep=1).steps()
  assert restored, error[-3000:]
  subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
  process = start(data, small_disk / "run")
  error = process.communicate(timeout=300)[1]
  assert process.returncode == 0, error[-3000:]


def test_a_read_only_workdir_is_refused(small_disk, data):
  subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
  config = small_config(data)
  with pytest.raises(OSError, match="cannot be written to .*set --workdir"):
    run(config, small_disk / "run")


def test_a_workdir_in_use_is_refused(finished, workdir, data):
  import fcntl

  with (workdir / "lock").open("a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    lock.write("process 7 on here")
    lock.flush()
    with pytest.raises(OSError, match="in use by a run .*process 7 on here"):
      run(small_config(data), workdir)


# ------------------------------------------------------------------ asked to stop


def test_sigterm_saves_and_the_same_command_goes_on(finished, tmp_path, data, monkeypatch):
  from alignx_jax.training.monitor import Monitor

  report = Monitor.report

  def asked(self, pending):
    if pending.step == 2:
      os.kill(os.getpid(), 15)
    return report(self, pending)

  with monkeypatch.context() as patch:
    patch.setattr(Monitor, "report", asked)
    with pytest.raises(SystemExit) as stopped:
      run(small_config(data), tmp_path / "run")
  assert stopped.value.code == EXIT_CODE
  saved_at = Checkpoints(tmp_path / "run", keep=2).steps()[-1]
  assert 3 <= saved_at < 6
  again = run(small_config(data), tmp_path / "run")
  for x, y in zip(jax.tree.leaves(again.params), jax.tree.leaves(finished[1].params), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_the_command_ends_in_time_with_its_code_and_the_same_command_goes_on(tmp_path, data):
  command = data, tmp_path, "--config.train.epochs=40", "--config.train.checkpoint_every=999"
  process = start(*command)
  try:
    deadline = time.monotonic() + 600
    while len(read_metrics(tmp_path)) < 3:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.05)
    since = time.monotonic()
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    seconds = time.monotonic() - since
  finally:
    process.kill()
  assert process.returncode == EXIT_CODE == 75, error[-3000:]
  assert seconds < 30, seconds
  (saved,) = Checkpoints(tmp_path, keep=1).steps()
  assert f"saved after {saved} of " in error and 3 <= saved < 240
  process = start(*command)
  error = process.communicate(timeout=900)[1]
  assert process.returncode == 0, error[-3000:]
  steps = [line["step"] for line in read_metrics(tmp_path)]
  assert steps == list(range(len(steps))) and len(steps) > saved
  log = (tmp_path / "logs/host_0.jsonl").read_text().splitlines()
  starts = [line["step"] for line in map(json.loads, log) if line["event"] == "start"]
  assert starts == [0, saved]
  print(f"ended {seconds:.1f} s after the signal, at step {saved} of {len(steps)}")


def test_a_second_signal_is_not_kept():
  from alignx_jax.training.stopping import StopRequest

  before = signal.getsignal(signal.SIGTERM)
  with StopRequest() as request:
    assert not request.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert request.asked
    assert signal.getsignal(signal.SIGTERM) == before
  with StopRequest() as request, pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
