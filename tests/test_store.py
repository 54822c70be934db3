"""A workdir on an object store: no locks, no files that grow, and yet the same run."""

import json
import os
import time

import fsspec
import jax
import numpy as np
import pytest
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem

from alignx_jax.experiments import experiment as experiments
from alignx_jax.files import as_path, move, write_text
from alignx_jax.training import checkpoints, workdir
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.run_config import run_config
from configs import base
from tests.small_records import small_config, write_small_records


class Store(MemoryFileSystem):
  """Objects at gs:// in memory, which are written whole or not at all."""

  protocol = ("gcs", "gs")
  cachable = False

  def __init__(self, **_):
    super().__init__()
    self.store, self.pseudo_dirs = {}, [""]

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).removeprefix("gs://").strip("/")

  def _open(self, path, mode="rb", **options):
    assert mode in ("rb", "wb"), f"{mode}: an object store cannot append"
    return super()._open(path, mode=mode, **options)


@pytest.fixture
def store(monkeypatch, tmp_path):
  """What gs:// is; but checkpoints, which Orbax writes by itself, lie in a directory."""
  store = Store()
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
  monkeypatch.setattr(gpath, "_is_zonal_gcs_bucket", lambda bucket: False)
  monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: _of(store, path))
  plain = checkpoints.Checkpoints.__init__

  def local(self, directory, **options):
    plain(self, tmp_path / os.fspath(directory).replace("://", "/"), **options)

  monkeypatch.setattr(checkpoints.Checkpoints, "__init__", local)
  monkeypatch.setattr(workdir, "SETTLED", 0.0)
  return store


def _of(store, path):
  return store if os.fspath(path).startswith("gs://") else fsspec.filesystem("file")


@pytest.mark.slow
def test_a_run_goes_on_there_as_it_does_here(store, tmp_path, killed_at):
  config = small_config(write_small_records(tmp_path / "records.json"))
  experiment = experiments.load_experiment(config)
  here = experiments.run_training(experiment, tmp_path / "here")
  with killed_at(3):
    experiments.run_training(experiment, "gs://bucket/run")
  assert "/bucket/run/lock" not in store.store
  there = experiments.run_training(experiment, "gs://bucket/run")
  for x, y in zip(jax.tree.leaves(here.params), jax.tree.leaves(there.params), strict=True):
    np.testing.assert_array_equal(x, y)
  losses = [
    [line["loss"] for line in read_metrics(path)] for path in (tmp_path / "here", "gs://bucket/run")
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 6
  root = as_path("gs://bucket/run")
  assert (root / "config.json").read_text() == (tmp_path / "here" / "config.json").read_text()
  events = [json.loads(line) for line in (root / "logs/host_0.jsonl").read_text().splitlines()]
  assert [e["step"] for e in events if e["event"] == "start"] == [0, 2]  # of both
  assert [e["step"] for e in events if e["event"] == "save"] == [2, 4, 6]
  assert json.loads((root / "heartbeat_0.json").read_text())["step"] == 2
  assert list((root / "reference").glob("reference_*.npz"))
  assert any("tfevents" in path for path in store.store)
  assert not (tmp_path / "gs:").exists() and not os.path.exists("gs:")
  restored = experiments.trained_params(experiment, as_path("gs://bucket/run"))
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(there.params), strict=True):
    np.testing.assert_array_equal(x, y)
  assert run_config(base.get_config(), root).data.path == config.data.path


def test_what_is_moved_is_there_and_no_more_here(store):
  bodies = {"run/metadata": b"{}", "params/d/1": b"one", "params/d/2": b"two"}
  for name, body in bodies.items():
    as_path(f"gs://bucket/run/checkpoints/4/{name}").write_bytes(body)
  as_path("gs://bucket/run/checkpoints/40/params/d/1").write_bytes(b"another step")
  move("gs://bucket/run/checkpoints/4", "gs://bucket/run/damaged/4")
  for name, body in bodies.items():
    assert as_path(f"gs://bucket/run/damaged/4/{name}").read_bytes() == body
  assert not as_path("gs://bucket/run/checkpoints/4").exists()
  assert as_path("gs://bucket/run/checkpoints/40/params/d/1").exists()


def _hold(age, host="another", process=7):
  held = {"process": process, "host": host, "token": "theirs", "time": time.time() - age}
  write_text("gs://bucket/run/lock", json.dumps(held))


def test_a_live_run_holds_the_workdir_and_one_that_was_killed_lets_go(store, monkeypatch):
  _hold(age=workdir.LEASE - 30)
  told = r"in use by a run \(process 7 on another\).*If it was killed, this is free in (29|30) s"
  with pytest.raises(OSError, match=told), workdir.in_use("gs://bucket/run"):
    pass
  for held in ({"age": workdir.LEASE + 1}, {"age": 1, "host": workdir.socket.gethostname()}):
    _hold(**held, process=2**22 + 1)  # of no process
    with workdir.in_use("gs://bucket/run"):
      assert json.loads(as_path("gs://bucket/run/lock").read_text())["process"] == os.getpid()
    assert not as_path("gs://bucket/run/lock").exists()
  # A live one gives signs of life.
  monkeypatch.setattr(workdir, "RENEWED", 0.05)
  with workdir.in_use("gs://bucket/run"):
    first = json.loads(as_path("gs://bucket/run/lock").read_text())["time"]
    time.sleep(0.3)
    assert json.loads(as_path("gs://bucket/run/lock").read_text())["time"] > first


def test_of_two_runs_that_begin_at_once_one_has_the_workdir(store, monkeypatch):
  monkeypatch.setattr(workdir.time, "sleep", lambda seconds: _hold(age=0))  # writes meanwhile
  with pytest.raises(OSError, match="in use by a run"), workdir.in_use("gs://bucket/run"):
    pass
