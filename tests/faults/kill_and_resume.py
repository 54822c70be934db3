"""Kills a small run of two processes at random moments and starts it again, over and over.

  python tests/faults/kill_and_resume.py --kills=100

Each time one of the two processes gets SIGKILL, at any moment from its start on: while it
imports, compiles, prepares data, trains or saves; then the other. What the runs give is held
against an undisturbed one. The last line is a JSON object: `kills`; of the examples of the
stream, how many were `lost` and how many came `repeated` in what the run finally stands on; and
`different`, steps whose loss is not the same bit for bit. Ends with 1 if any of these is not 0.
"""

import argparse
import collections
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
PROCESSES = 2
SETTINGS = {
  "model.weights": "preset:tiny",
  "history.policy": "all",
  "regions.context": 512,
  "regions.response": 32,
  "regions.examples": 3,
  "data.test_share": 0.2,
  "train.rows": 2,
  "train.epochs": 10,
  "train.checkpoint_every": 3,
  "train.keep_checkpoints": 3,
  "train.barrier_seconds": 60,
  "optimizer.learning_rate": 1e-3,
}


def start(workdir: Path, data: Path, cache: Path) -> list[subprocess.Popen]:
  """Both processes of the run."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  settings = SETTINGS | {"data.path": data}
  flags = [f"--config.{name}={value}" for name, value in settings.items()]
  workdir.mkdir(parents=True, exist_ok=True)
  running = []
  for index in range(PROCESSES):
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": str(PROCESSES),
      "JAX_PROCESS_ID": str(index),
      "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.faults.small_run", "--config=configs/base.py"]
    with (workdir / f"log_{index}.txt").open("ab") as log:
      running.append(
        subprocess.Popen(
          [*command, f"--workdir={workdir}", *flags], cwd=ROOT, env=environment, stderr=log
        )
      )
  return running


def stop(running: list[subprocess.Popen]) -> None:
  for process in running:
    process.kill()
    process.wait()


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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--workdir", type=Path, help="kept; by default a directory that is removed")
  options = parser.parse_args()
  from tests.small_records import small_record

  with tempfile.TemporaryDirectory() as temporary:
    root = options.workdir or Path(temporary)
    root.mkdir(parents=True, exist_ok=True)
    data, cache = root / "records.json", root / "cache"
    data.write_text(json.dumps([small_record(i) for i in range(48)]), encoding="utf-8")

    for name in ("first", "whole"):  # the second has compiled programs, as all that follow
      began = time.monotonic()
      running = start(root / name, data, cache)
      codes = [process.wait() for process in running]
      seconds = time.monotonic() - began
      if any(codes):
        sys.exit((root / name / "log_0.txt").read_text(errors="replace")[-3000:])
    whole = consumed(root / "whole")
    print(f"undisturbed: {len(whole)} steps in {seconds:.0f} s", flush=True)

    rng = random.Random(options.seed)
    kills, runs = 0, 0
    found = collections.Counter(lost=0, repeated=0, different=0)
    with tqdm(total=options.kills, unit="kill") as bar:
      while kills < options.kills:
        runs += 1
        workdir, ended = root / f"run{runs}", False
        while not ended:
          running = start(workdir, data, cache)
          moment = time.monotonic() + rng.uniform(0, seconds)
          while time.monotonic() < moment or kills >= options.kills:
            if all(process.poll() is not None for process in running):
              break
            time.sleep(0.01)
          codes = [process.poll() for process in running]
          ended = codes == [0] * PROCESSES
          if not ended and None not in codes:
            sys.exit((workdir / "log_0.txt").read_text(errors="replace")[-3000:])
          if not ended:
            victim = rng.randrange(PROCESSES)
            running[victim].kill()
            time.sleep(rng.uniform(0, 0.5))
            kills += 1
            bar.update(1)
          stop(running)
        found.update(compare(whole, consumed(workdir)))
  print(json.dumps({"kills": kills, "runs": runs, "steps": len(whole), **found}))
  sys.exit(any(found.values()))


if __name__ == "__main__":
  main()
