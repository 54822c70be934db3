"""Kills a small run of two processes and starts it again, over and over.

  python tests/faults/kill_and_resume.py --kills=100

A run prepares its data set, then trains on it. It is killed by SIGKILL: while it prepares; in
training one of the two processes, then the other, at any moment from its start on (compiling,
computing the reference, training), or just when a checkpoint is being written. What the runs
give is held against an undisturbed one. The last line is a JSON object: `kills`, and as
`moments` how many were while `preparing`, `saving` or at `other` moments; of the examples of
the stream, how many were `lost` and how many came `repeated` in what the run finally stands on;
and `different`, steps whose loss is not the same bit for bit. Ends with 1 if any of the last
three is not 0.

Processes are forked from one that has imported everything, and programs are compiled once.
"""

import argparse
import collections
import functools
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
PROCESSES = 2
RECORDS = 48
SETTINGS = {
  "model.weights": "preset:tiny",
  "history.policy": "all",
  "regions.context": 512,
  "regions.response": 32,
  "regions.examples": 3,
  "train.rows": 2,
  "train.epochs": 4,
  "train.checkpoint_every": 3,
  "train.keep_checkpoints": 3,
  "train.barrier_seconds": 60.0,
  "optimizer.learning_rate": 1e-3,
}
# Of kills, how many are aimed at the writing of the data set and of checkpoints.
AIMED = {"preparing": 0.15, "saving": 0.4}
ENVIRONMENT = {
  "PYTHONPATH": str(ROOT),
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def prepare_in(workdir: Path, records: Path) -> None:
  """Prepares the data set; in a process of its own."""
  _log_to(workdir / "log_prepare.txt")
  from alignx_jax.data.alignx import get_config
  from alignx_jax.data.preparing import prepare, run_in_processes

  one = functools.partial(run_in_processes, workers=1)
  config = get_config("train", validation_share=0.2)
  prepare([str(records)], workdir / "data", config, shard_records=4, run_all=one)


def train_in(workdir: Path, cache: Path, port: int, index: int) -> None:
  """Trains as one of the processes; in a process of its own."""
  _log_to(workdir / f"log_{index}.txt")
  _keep_programs(cache / str(index))
  os.environ |= {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(PROCESSES),
    "JAX_PROCESS_ID": str(index),
  }
  from configs import base
  from tests.faults.small_run import run

  config = base.get_config()
  config.update_from_flattened_dict(SETTINGS | {"data.path": str(workdir / "data")})
  run(config, workdir)


def _keep_programs(directory: Path) -> None:
  """Compiled programs are kept by each process for itself.

  JAX lets the first process alone write its cache, in which the others' programs are not.
  """
  import jax
  from jax._src import compiler, distributed

  jax.config.update("jax_compilation_cache_dir", str(directory))
  write = compiler._cache_write

  def write_as_first(*args):
    state, process = distributed.global_state, distributed.global_state.process_id
    state.process_id = 0
    try:
      write(*args)
    finally:
      state.process_id = process

  compiler._cache_write = write_as_first


def _log_to(path: Path) -> None:
  with path.open("ab") as log:
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())


class Forker:
  """Starts processes that have imported everything, without a JAX backend."""

  def __init__(self, cache: Path):
    os.environ |= ENVIRONMENT
    self._cache = cache
    self._context = multiprocessing.get_context("forkserver")
    self._context.set_forkserver_preload(
      ["tests.faults.small_run", "alignx_jax.data.preparing", "configs.base"]
    )

  def prepare(self, workdir: Path, records: Path) -> list:
    """The process that prepares."""
    return self._start([(prepare_in, workdir, records)])

  def train(self, workdir: Path) -> list:
    """The processes that train."""
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      port = probe.getsockname()[1]
    return self._start(
      [(train_in, workdir, self._cache, port, index) for index in range(PROCESSES)]
    )

  def _start(self, calls):
    running = [self._context.Process(target=call, args=args) for call, *args in calls]
    for process in running:
      process.start()
    return running


def stop(running: list) -> None:
  for process in running:
    process.kill()
    process.join()


def ended(running: list) -> bool:
  return all(process.exitcode is not None for process in running)


def check_ended_well(running: list, workdir: Path) -> None:
  """Ends this program with their logs if a process ended with an error."""
  if any(process.exitcode for process in running):
    logs = [path.read_text(errors="replace")[-3000:] for path in sorted(workdir.glob("log_*.txt"))]
    sys.exit("\n".join(logs))


def consumed(workdir: Path) -> dict[int, tuple[str, tuple[str, ...]]]:
  """{step: (loss, examples of all processes)}, of each step as it was done last."""
  losses, examples = {}, collections.defaultdict(dict)
  for path in sorted(workdir.glob("consumed_*.jsonl")):
    index = path.stem
    for line in path.read_text(encoding="utf-8").splitlines():
      try:
        line = json.loads(line[line.rindex('{"step"') :])  # after one that a kill cut short
      except ValueError:
        continue
      losses[line["step"]] = line["loss"]
      examples[line["step"]][index] = line["examples"]
  return {
    step: (losses[step], tuple(id for index in sorted(of) for id in of[index]))
    for step, of in examples.items()
  }


def compare(whole: dict, other: dict) -> dict[str, int]:
  """What a disturbed run lost, repeated and made different, against the undisturbed one."""
  count = lambda run: collections.Counter(id for _, ids in run.values() for id in ids)
  expected, found = count(whole), count(other)
  return {
    "lost": sum((expected - found).values()),
    "repeated": sum((found - expected).values()),
    "different": sum(whole[step] != other.get(step) for step in whole),
  }


# ------------------------------------------------------------------ kills


def half_saved(workdir: Path) -> set[Path]:
  """Checkpoints that are not yet whole."""
  return set((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def wait(running: list, until) -> bool:
  """Waits for `until()`; whether it came before the processes ended."""
  while not ended(running):
    if until():
      return True
    time.sleep(0.002)
  return False


def kill_preparing(running, workdir: Path, rng, seconds: float) -> str | None:
  """Kills at any moment since the first file is there; None if it ended before."""
  if not wait(running, (workdir / "data.incomplete").exists):
    return None
  moment = time.monotonic() + rng.uniform(0, seconds)
  if not wait(running, lambda: time.monotonic() >= moment):
    return None
  stop(running)
  return "preparing"


def kill_training(running, workdir: Path, rng, seconds: float, *, saving: bool) -> str | None:
  """Kills one process and then the other; tells at what moment it was, None if all had ended.

  Args:
    saving: wait for one of the next checkpoints.
  """
  old = half_saved(workdir)  # of earlier kills, until this start has cleared them away
  if saving:
    seen, which = set(), rng.randrange(3)

    def appeared():
      now = half_saved(workdir)
      old.intersection_update(now)
      seen.update(now - old)
      return len(seen) > which

    if not wait(running, appeared):
      return None
    time.sleep(rng.uniform(0, 0.03))
  else:
    moment = time.monotonic() + rng.uniform(0, seconds)
    if not wait(running, lambda: time.monotonic() >= moment):
      return None
  check_ended_well(running, workdir)
  running[rng.randrange(PROCESSES)].kill()
  moment = "saving" if saving and half_saved(workdir) - old else "other"
  time.sleep(rng.uniform(0, 0.3))
  stop(running)
  return moment


class Disturbed:
  """Runs that are killed, and the counts of it."""

  def __init__(self, forker: Forker, records: Path, seconds: dict[str, float], options):
    """
    Args:
      seconds: that each stage of an undisturbed run takes.
      options: of the command line: `kills`, `seed`.
    """
    self._forker, self._records, self._seconds = forker, records, seconds
    self._kills, self._rng = options.kills, random.Random(options.seed)
    self.moments = collections.Counter(preparing=0, saving=0, other=0)
    self._bar = tqdm(total=options.kills, unit="kill")

  @property
  def enough(self) -> bool:
    return self.moments.total() >= self._kills

  def run(self, workdir: Path) -> None:
    """A whole run, killed as often as there are kills left."""
    rng = self._rng

    def prepare(running):
      few = self.moments["preparing"] <= AIMED["preparing"] * self.moments.total()
      return few and kill_preparing(running, workdir, rng, self._seconds["preparing"])

    def train(running):
      saving = rng.random() < AIMED["saving"]
      return kill_training(running, workdir, rng, self._seconds["training"], saving=saving)

    self._stage(workdir, lambda: self._forker.prepare(workdir, self._records), prepare)
    self._stage(workdir, lambda: self._forker.train(workdir), train)

  def _stage(self, workdir, start, kill) -> None:
    while True:
      running = start()
      moment = None if self.enough else kill(running)
      if moment:
        self.moments[moment] += 1
        self._bar.update(1)
        continue
      wait(running, lambda: False)
      check_ended_well(running, workdir)
      return


def undisturbed(forker: Forker, workdir: Path, records: Path) -> dict[str, float]:
  """A whole run; the seconds of its stages."""
  workdir.mkdir()
  seconds = {}
  for stage, start in (
    ("preparing", lambda: forker.prepare(workdir, records)),
    ("training", lambda: forker.train(workdir)),
  ):
    since = time.monotonic()
    running = start()
    wait(running, lambda: False)
    check_ended_well(running, workdir)
    seconds[stage] = time.monotonic() - since
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--workdir", type=Path, help="kept; by default a directory that is removed")
  options = parser.parse_args()
  from tests.small_records import write_small_records

  began, runs = time.monotonic(), 0
  found = collections.Counter(lost=0, repeated=0, different=0)
  with tempfile.TemporaryDirectory() as temporary:
    root = options.workdir or Path(temporary)
    root.mkdir(parents=True, exist_ok=True)
    records = write_small_records(root / "records.json", RECORDS)
    forker = Forker(root / "cache")
    for name in ("first", "whole"):  # the second has compiled programs, as all that follow
      seconds = undisturbed(forker, root / name, records)
    whole = consumed(root / "whole")
    times = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    print(f"undisturbed: {len(whole)} steps; {times}", flush=True)

    disturbed = Disturbed(forker, records, seconds, options)
    while not disturbed.enough:
      runs += 1
      (workdir := root / f"run{runs}").mkdir()
      disturbed.run(workdir)
      found.update(compare(whole, consumed(workdir)))
  moments = disturbed.moments
  result = {"kills": moments.total(), "moments": moments, "runs": runs, "steps": len(whole)}
  result["minutes"] = round((time.monotonic() - began) / 60, 1)
  print(json.dumps(result | found))
  sys.exit(any(found.values()))


if __name__ == "__main__":
  main()
