"""launch/: from a laptop to a pod. Google Cloud is tests/stand_ins/gcloud, on this machine."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from alignx_jax.ahead import chips
from alignx_jax.training.metrics import read_metrics
from alignx_jax.training.stopping import EXIT_CODE
from tests.pages import ROOT, shown_on_pages
from tests.small_records import small_record

STAND_INS = ROOT / "tests" / "stand_ins"
WORKDIR = "gs://runs/first"
CREATE = ("compute", "tpus", "queued-resources", "create")


class Cloud:
  """A checkout of its own with a commit, and the stand-in's state.

  Attributes:
    repo: the checkout.
    state: the stand-in's $STAND_IN.
    bucket: what gs://runs holds.
  """

  def __init__(self, path: Path, folders: tuple[str, ...], **environment):
    self.repo, self.state = path / "repo", path / "cloud"
    self.bucket = self.state / "buckets" / "runs"
    self.bucket.mkdir(parents=True)
    self.repo.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in folders:
      shutil.copytree(ROOT / name, self.repo / name, ignore=ignore)
    for name in ("setup.py", "README.md", "pyproject.toml", ".gitignore"):
      shutil.copy(ROOT / name, self.repo / name)
    who = {
      f"GIT_{role}_{what}": "a@b.c"
      for role in ("AUTHOR", "COMMITTER")
      for what in ("NAME", "EMAIL")
    }
    self.environment = (
      os.environ
      | who
      | {
        "HOME": str(path),
        "PATH": f"{STAND_INS}:{os.environ['PATH']}",
        "STAND_IN": str(self.state),
        "PYTHON": "true",  # compiles: fits
        "POLL_SECONDS": "0.1",
        "STOP_SECONDS": "20",
        **environment,
      }
    )
    self.git("init", "-q")
    self.git("add", "-A")
    self.git("commit", "-qm", "all")

  def git(self, *arguments):
    subprocess.run(["git", *arguments], cwd=self.repo, env=self.environment, check=True)

  def command(self, script, *arguments, **options):
    """The command of a script with options that work, but for those given; None leaves one out."""
    known = {"name": "pod", "zone": "us-test1-a", "project": "p"}
    if script == "tpu_run":
      known |= {"type": "v5p-16", "config": "configs/base.py", "workdir": WORKDIR}
    if script == "gke_jobset":
      known = known | {"type": "v5p-16", "config": "configs/base.py", "workdir": WORKDIR}
      del known["zone"]
    flags = [f"--{name}={value}" for name, value in (known | options).items() if value is not None]
    return [str(self.repo / "launch" / f"{script}.sh"), *flags, *arguments]

  def run(self, script, *arguments, timeout=60, environment=(), **options):
    return subprocess.run(
      self.command(script, *arguments, **options),
      env=self.environment | dict(environment),
      capture_output=True,
      text=True,
      timeout=timeout,
    )

  @contextlib.contextmanager
  def running(self, *arguments, **options):
    """tpu_run.sh in the background, as at a terminal, its output in .log of what is yielded."""
    path = self.state / f"driver_{time.monotonic_ns()}.log"
    with path.open("w") as log:
      process = subprocess.Popen(
        self.command("tpu_run", *arguments, **options),
        env=self.environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
    process.log = path
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()

  def gcloud(self, *arguments):
    return subprocess.run(
      [STAND_INS / "gcloud", *arguments], env=self.environment, check=True, timeout=60
    )

  def calls(self, *words):
    """What gcloud was called with, of the calls that begin so."""
    path = self.state / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [call for call in map(json.loads, lines) if call[: len(words)] == list(words)]

  def created(self):
    return len(self.calls(*CREATE))

  def requests(self):
    path = self.state / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}

  def on_hosts(self, name):
    """{host: lines of a file in its home}, of the hosts that have it."""
    paths = sorted((self.state / "hosts").glob(f"*/{name}"))
    return {path.parent.name: path.read_text().splitlines() for path in paths}

  def close(self):
    for name in self.requests():
      self.gcloud(
        *("compute", "tpus", "queued-resources", "delete", name, "--force", "--zone=z"),
        *("--project=p", "--quiet"),
      )


@pytest.fixture
def cloud(tmp_path):
  """Its hosts train nothing."""
  cloud = Cloud(tmp_path, ("launch", "configs"), STAND_IN_TRAINER=str(STAND_INS / "train_nothing"))
  yield cloud
  cloud.close()


@pytest.fixture
def no_gcloud(tmp_path):
  """A PATH on which there is what the scripts use, but for gcloud."""
  tools = "bash git sed grep cut awk tr cat mktemp rm date dirname basename xargs env sort head wc"
  (tmp_path / "bin").mkdir()
  for tool in tools.split():
    (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
  return {"PATH": str(tmp_path / "bin")}


def wait_for(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "it did not happen"
    time.sleep(0.02)


def says(process, text, seconds=60):
  """Waits until tpu_run.sh says something; shows what it said if it does not."""
  try:
    wait_for(lambda: text in process.log.read_text() or process.poll() is not None, seconds)
  finally:
    assert text in process.log.read_text(), process.log.read_text()[-3000:]


# Before anything is paid for.


def test_a_dry_run_prints_each_command_at_once_and_does_nothing(cloud, no_gcloud):
  began = time.monotonic()
  done = cloud.run(
    "tpu_run",
    *("--dry-run", "--spot", "--", "--config.mesh.replica=2", "--config.data.path=it's a 'file'"),
    slices=2,
    environment=no_gcloud,
  )
  assert time.monotonic() - began < 3
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  what = ("git archive", "-m alignx_jax.compile", "create pod", "tpu-vm scp", "unpack", "install")
  what += ("start pod", "follow pod", "delete pod --force")
  places = [next(i for i, line in enumerate(lines) if part in line) for part in what]
  assert places == sorted(places)
  create = lines[places[2]]
  for part in (
    "--node-count=2",
    "--node-prefix=pod",
    "--spot",
    "--runtime-version=v2-alpha-tpuv5 ",
  ):
    assert part in create
  assert "--topology=v5p:2x2x2 --slices=2 --config.mesh.replica=2" in lines[places[1]]
  # The training gets its arguments as they are, through two shells.
  start = subprocess.run(
    ["bash", "-c", f"printf '%s\\n' {lines[places[6]]}"], capture_output=True, text=True
  ).stdout
  command = next(line for line in start.splitlines() if line.startswith("--command="))
  words = subprocess.run(
    ["bash", "-c", f"printf '%s\\n' {command.removeprefix('--command=')}"],
    capture_output=True,
    text=True,
  ).stdout.splitlines()
  assert words[-1] == "--config.data.path=it's a 'file'"
  assert not cloud.calls() and not list(cloud.bucket.iterdir())


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"name": None}, "--name is missing"),
    ({"name": "Pod"}, "lower-case letters"),
    ({"type": "v5litepod-63"}, "there are v5litepod-1 v5litepod-4 "),
    ({"slices": "no"}, "give a number"),
    ({"workdir": "runs/first"}, "give gs://BUCKET/DIRECTORY"),
    (
      {"workdir": "gs://nowhere/run"},
      "gcloud storage buckets create gs://nowhere --location=us-test1",
    ),
    ({"config": "configs/none.py"}, "no file configs/none.py in the commit"),
    ({"zone": "us-test1-b"}, "Zone us-test1-b has no v5p-16"),
    ({"zone": "mars"}, "Zone mars has no v5p-16"),
    ({"spott": "1"}, "no option --spott=1"),
  ],
)
def test_what_cannot_be_is_refused_with_a_remedy_and_nothing_is_asked_for(cloud, options, said):
  done = cloud.run("tpu_run", **options)
  assert done.returncode == 1
  assert said in done.stderr and done.stderr.startswith("Error: ")
  assert not cloud.created()


@pytest.mark.parametrize(
  ("fault", "said"),
  [
    ("logged_out", "run: gcloud auth login"),
    ("no_api", "gcloud services enable tpu.googleapis.com --project=p"),
    ("read_only", "gs://runs/first cannot be written to"),
    (
      "no_quota",
      "no quota for v5p-16 in us-test1-a: ask for it at https://console.cloud.google.com",
    ),
    (
      "late_quota",
      "no quota for v5p-16 in us-test1-a: ask for it at https://console.cloud.google.com",
    ),
  ],
)
def test_what_google_refuses_is_said_with_a_remedy_and_nothing_is_left(cloud, fault, said):
  (cloud.state / fault).touch()
  done = cloud.run("tpu_run")
  assert done.returncode == 1
  assert said in done.stderr
  assert cloud.created() == (fault in ("no_quota", "late_quota")) and not cloud.requests()


def test_without_gcloud_it_says_where_to_get_it(cloud, no_gcloud):
  done = cloud.run("tpu_run", environment=no_gcloud)
  assert done.returncode == 1 and "https://cloud.google.com/sdk/docs/install" in done.stderr


def test_a_program_that_does_not_fit_is_not_paid_for_and_one_that_fits_is_compiled_once(cloud):
  python = cloud.state / "python"
  python.write_text('#!/bin/sh\necho "$@" >>"$STAND_IN/compiled"\necho knob\nexit "$FITS"\n')
  python.chmod(0o755)
  environment = {"PYTHON": str(python)}
  arguments = ("--", "--config.train.rows=4", "--noevaluate")
  done = cloud.run("tpu_run", *arguments, environment=environment | {"FITS": "2"})
  assert done.returncode == 1 and "does not fit on 1 × v5p-16" in done.stderr
  assert "knob" in done.stdout and not cloud.created()
  (cloud.state / "no_quota").touch()
  for _ in range(2):
    done = cloud.run("tpu_run", *arguments, environment=environment | {"FITS": "0"})
    assert "no quota" in done.stderr
  compiled = (cloud.state / "compiled").read_text().splitlines()
  assert len(compiled) == 2
  assert "--topology=v5p:2x2x2 --slices=1 --config.train.rows=4" in compiled[1]
  assert "--noevaluate" not in compiled[1]  # no flag of compile


def test_what_is_not_committed_is_refused_or_taken_as_told(cloud):
  base = cloud.repo / "configs" / "base.py"
  base.write_text(base.read_text() + "# changed\n")
  done = cloud.run("tpu_run", "--dry-run")
  assert done.returncode == 1 and "configs/base.py" in done.stderr and "--dirty" in done.stderr
  names = []
  for _ in range(2):
    done = cloud.run("tpu_run", "--dry-run", "--dirty")
    assert done.returncode == 0, done.stderr
    names.append(next(word for word in done.stdout.split() if word.startswith("--prefix=")))
  assert names[0] == names[1] and names[0].endswith("-dirty/")
  cloud.git("checkout", "-q", "configs/base.py")
  (cloud.repo / "configs" / "new.py").write_text("")
  done = cloud.run("tpu_run", "--dry-run", config="configs/new.py")
  assert done.returncode == 1 and "configs/new.py" in done.stderr
  done = cloud.run("tpu_run", "--dry-run", "--dirty", config="configs/new.py")
  assert done.returncode == 1 and "git add" in done.stderr


def test_the_types_are_topologies_that_there_are(monkeypatch):
  monkeypatch.setattr(chips, "_describe", lambda name, options: ())
  rows = [
    line.split("\t")
    for line in (ROOT / "launch/tpu_types.tsv").read_text().splitlines()
    if not line.startswith("#")
  ]
  generations = (ROOT / "launch/tpu_generations.tsv").read_text()
  assert len(rows) > 30
  for name, topology, hosts in rows:
    found = chips.parse_topology(topology)
    count = math.prod(found.shape)
    # TensorCores name a v4 and a v5p.
    assert int(name.split("-")[1]) == count * (2 if found.chip.dimensions == 3 else 1), name
    flat = found.chip.dimensions == 2
    assert int(hosts) == (1 if flat and count <= 8 else count // 4), name
    assert f"\n{found.chip.name}\t" in generations


def test_the_page_shows_a_command_that_runs(cloud):
  (command,) = shown_on_pages(r"^launch/tpu_run\.sh ")
  done = subprocess.run(
    ["bash", "-c", command.replace(" -- ", " --dry-run -- ")],
    cwd=cloud.repo,
    env=cloud.environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "--topology=v5e:8x8" in done.stdout


# From asking for a pod to deleting it, on hosts that train nothing.


def test_a_run_left_and_taken_up_again_starts_and_installs_once_and_is_deleted_once(cloud):
  with cloud.running("--keep") as first:
    says(first, "step 3")
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(60) == 130
    assert "8 v5p chips, about $33.60 an hour" in first.log.read_text()
    assert "launch/tpu_delete.sh --name=pod" in first.log.read_text()
  assert cloud.requests()["pod"]["state"] == "ACTIVE"

  status = cloud.run("tpu_status")
  assert status.returncode == 0
  assert "pod-w-0 running" in status.stdout and "pod-w-1 running" in status.stdout

  other = cloud.run("tpu_run", "--", "--config.seed=1")
  assert other.returncode == 1 and "trains something else" in other.stderr
  assert cloud.requests()  # and is left alone

  for host, lines in cloud.on_hosts("trained").items():
    assert len(lines) == 1, host
  for host, lines in cloud.on_hosts("uv_calls").items():
    assert [line.split()[0] for line in lines] == ["venv", "pip"], host
    assert lines[1].endswith("[tpu,gguf]"), host

  with cloud.running() as second:
    says(second, "runs already")
    says(second, "step 4")  # of the log there was
    (cloud.state / "exit").write_text("0")
    assert second.wait(60) == 0
  said = second.log.read_text()
  assert "nothing of it costs any more" in said and "step 1\n" in said
  assert not cloud.requests() and cloud.created() == 1
  logs = sorted(path.name[:7] for path in (cloud.bucket / "first/launch_logs").iterdir())
  assert logs == ["pod-w-0", "pod-w-1"]

  done = cloud.run("tpu_run")
  assert done.returncode == 0 and "has finished already" in done.stderr
  assert cloud.created() == 1 and not cloud.requests()


def test_a_preempted_pod_is_asked_for_again_and_the_training_goes_on(cloud):
  with cloud.running("--spot") as driver:
    says(driver, "step 3")
    cloud.gcloud("stand-in", "preempt", "pod")
    wait_for(lambda: cloud.created() == 2)
    wait_for(lambda: cloud.on_hosts("trained"))
    (cloud.state / "exit").write_text("0")
    assert driver.wait(60) == 0, driver.log.read_text()
  assert "The pod is gone or going" in driver.log.read_text()
  logs = [path.read_text() for path in (cloud.bucket / "first/launch_logs").iterdir()]
  assert len(logs) == 4 and sum(log.endswith("saved\n") for log in logs) == 2
  assert all(call[-1] == "--quiet" and "--spot" in call for call in cloud.calls(*CREATE))
  assert not cloud.requests()


def test_a_training_that_was_asked_to_stop_is_started_again_where_it_was(cloud):
  with cloud.running() as driver:
    says(driver, "step 3")
    for times, code in enumerate((EXIT_CODE, 143), start=1):
      (cloud.state / "exit").write_text(str(code))
      wait_for(lambda times=times: driver.log.read_text().count("starting it again") == times)
    (cloud.state / "exit").write_text("0")
    assert driver.wait(60) == 0, driver.log.read_text()
  assert cloud.created() == 1


def test_a_training_that_fails_is_said_and_its_pod_deleted_and_its_logs_kept(cloud):
  (cloud.state / "exit").write_text("1")
  done = cloud.run("tpu_run")
  assert done.returncode == 1
  assert "The training failed" in done.stderr and "pod-w-1 ended 1" in done.stderr
  assert not cloud.requests() and cloud.created() == 1
  for path in (cloud.bucket / "first/launch_logs").iterdir():
    assert path.read_text().startswith("step 1")
  assert not (cloud.bucket / "first" / "launch_pod.txt").exists()  # not taken for finished


def test_ctrl_c_lets_the_training_save_and_deletes_the_pod(cloud):
  with cloud.running() as driver:
    says(driver, "step 3")
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(60) == 130
  said = driver.log.read_text()
  assert "$33.60 an hour" in said and "nothing of it costs any more" in said
  assert not cloud.requests()
  for path in (cloud.bucket / "first/launch_logs").iterdir():
    assert path.read_text().endswith("saved\n")


def test_two_slices_are_two_tpus_of_one_request_and_one_training(cloud):
  (cloud.state / "exit").write_text("0")
  done = cloud.run("tpu_run", "--keep", "--", "--config.data.path=gs://runs/data", slices=2)
  assert done.returncode == 0, done.stderr
  assert "16 v5p chips, about $67.20 an hour" in done.stderr
  trained = cloud.on_hosts("trained")
  assert list(trained) == ["pod-0-w-0", "pod-0-w-1", "pod-1-w-0", "pod-1-w-1"]
  gcs = cloud.state / "gcs" / "runs"
  for lines in trained.values():
    (line,) = lines
    assert f"--workdir={gcs}/first --config=configs/base.py --config.data.path={gcs}/data" in line
  status = cloud.run("tpu_status")
  assert "pod-1-w-1 ended 0" in status.stdout and "16 v5p chips" in status.stdout
  other = cloud.run("tpu_run", type="v5p-8")
  assert other.returncode == 1 and "pod is 2 × v5p-16, not 1 × v5p-8" in other.stderr


def test_deleting_lets_the_training_save_and_does_nothing_where_there_is_nothing(cloud):
  with cloud.running("--keep") as driver:
    says(driver, "step 3")
    assert cloud.run("tpu_delete").returncode == 0
  assert not cloud.requests()
  for path in (cloud.bucket / "first/launch_logs").iterdir():
    assert path.read_text().endswith("saved\n")
  done = cloud.run("tpu_delete")
  assert done.returncode == 0 and "nothing to delete" in done.stdout
  assert cloud.run("tpu_status").returncode == 1


def test_a_workdir_that_hosts_cannot_write_to_ends_the_run(cloud):
  """gcloud may, here; the hosts' service account may not."""
  (cloud.bucket / "first").mkdir()
  (cloud.bucket / "first" / "launch_logs").write_text("a file")
  done = cloud.run("tpu_run")
  assert done.returncode == 1
  assert "roles/storage.objectUser" in done.stderr and not cloud.requests()


# GKE.


def test_the_jobset_is_the_same_run(cloud):
  path = cloud.state / "buckets" / "other"
  path.mkdir()
  arguments = ("--spot", "--", "--config.data.path=gs://other/x", "--config.data.space=it's")
  done = cloud.run("gke_jobset", *arguments, type="v5litepod-64", slices=2)
  assert done.returncode == 0, done.stderr
  jobset = yaml.safe_load(done.stdout)
  assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "pod"
  (job,) = jobset["spec"]["replicatedJobs"]
  assert job["replicas"] == 2
  spec = job["template"]["spec"]
  assert spec["parallelism"] == spec["completions"] == 16 and spec["backoffLimit"] == 0
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "8x8",
    "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  *_, archive, workdir, config, data, space = container["command"]
  assert archive.startswith("/gcs/runs/first/launch_code/")
  assert (cloud.state / "buckets" / archive.removeprefix("/gcs/")).exists()
  assert (workdir, config) == ("--workdir=/gcs/runs/first", "--config=configs/base.py")
  assert (data, space) == ("--config.data.path=/gcs/other/x", "--config.data.space=it's")
  buckets = [volume["csi"]["volumeAttributes"]["bucketName"] for volume in pod["volumes"]]
  assert buckets == ["other", "runs"]
  mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
  assert mounts == ["/gcs/other", "/gcs/runs"]


# With the real trainer.


@pytest.mark.slow
def test_two_hosts_train_are_preempted_resume_finish_and_are_deleted(tmp_path):
  folders = ("launch", "configs", "alignx_jax")
  cloud = Cloud(tmp_path, folders, PYTHON=sys.executable, PYTHONPATH="", POLL_SECONDS="1")
  data = cloud.bucket / "records.json"
  data.write_text(json.dumps([small_record(i) for i in range(48)]))
  settings = {
    "data.path": "gs://runs/records.json",
    "model.weights": "preset:tiny",
    "history.policy": "all",
    "regions.context": 512,
    "regions.response": 32,
    "regions.examples": 3,
    "train.rows": 8,
    "train.epochs": 20,
    "train.checkpoint_every": 1000,
    "optimizer.learning_rate": 1e-3,
  }
  arguments = [f"--config.{name}={value}" for name, value in settings.items()]
  steps = lambda: [line["step"] for line in read_metrics(cloud.bucket / "first")]
  try:
    with cloud.running("--spot", "--", *arguments) as driver:
      wait_for(lambda: len(steps()) >= 4 or driver.poll() is not None, 300)
      assert driver.poll() is None, driver.log.read_text()[-3000:]
      cloud.gcloud("stand-in", "preempt", "pod")
      seen = steps()
      checkpoints = {path.name for path in (cloud.bucket / "first/checkpoints").iterdir()}
      assert driver.wait(300) == 0, driver.log.read_text()[-3000:]
    said = driver.log.read_text()
    assert "Compiling the program for 1 × v5p:2x2x2" in said
    assert "The pod is gone or going" in said and cloud.created() == 2
    # It was asked to save, and went on from there: each step once.
    assert str(max(seen) + 1) in checkpoints
    assert steps() == list(range(max(steps()) + 1)) and max(steps()) > max(seen)
    assert (cloud.bucket / "first/results.json").exists()
    assert "| policy" in said and not cloud.requests()

    again = cloud.run("tpu_run", "--spot", "--", *arguments)
    assert again.returncode == 0 and "has finished already" in again.stderr
    assert cloud.created() == 2
  finally:
    cloud.close()
