"""What a sweep costs beside its trials: sixteen tiny ones, all caches warm.

  python -m tests.benchmarks.sweep --output=sweep.json

The same trials are run by one process in a loop, with all CPUs and with imports; by the sweep, one
at a time with all CPUs; and by the sweep, as many at once as there are CPUs. The loss is the second
over the first, less 1: at most 10 %. They take turns; medians over the rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.small_records import write_small_records

ROOT = Path(__file__).parents[2]
LOOP = """
import sys
from pathlib import Path
from alignx_jax.sweeps.plan import make_plan
from alignx_jax.sweeps.trial import run_trial
from tests import small_sweep
config = small_sweep.get_config()
for trial in make_plan(small_sweep.__file__, config, Path(sys.argv[1])):
  run_trial(trial)
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--trials", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=1)
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  cpus = len(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder) / "sweep"
    # They differ in how often they save, so all share reference and programs.
    trials = {f"t{i}": {"train.checkpoint_every": 100 + i} for i in range(args.trials)}
    environment = os.environ | {
      "SMALL_RECORDS": str(write_small_records(Path(folder) / "records.json")),
      "SMALL_TRIALS": json.dumps(trials),
      "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
      "NPROC": str(cpus),
      "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
      "PYTHONPATH": str(ROOT),
    }
    sweep = ["-m", "alignx_jax.sweep", "--sweep=tests/small_sweep.py", f"--workdir={workdir}"]
    ways = {
      "loop": ["-c", LOOP, str(workdir)],
      "sweep, one at once": [*sweep, f"--config.sweep.cpus={cpus}"],
      f"sweep, {cpus} at once": [*sweep, "--config.sweep.cpus=1"],
    }

    def seconds(way, trials=trials):
      for name in ("trials", "sweep.json"):
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
      given = environment | {"SMALL_TRIALS": json.dumps(trials)}
      started = time.perf_counter()
      command = [sys.executable, *ways[way]]
      done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
      assert done.returncode == 0, done.stderr[-3000:]
      return time.perf_counter() - started

    for way in ways:
      seconds(way, {"warm": {}})
    found = {way: [] for way in ways}
    for _ in range(args.rounds):
      for way in ways:
        found[way].append(seconds(way))
        print(f"{way:<22} {found[way][-1]:7.1f} s for {args.trials} trials", flush=True)
  result = {way: statistics.median(each) for way, each in found.items()}
  result["loss"] = result["sweep, one at once"] / result["loop"] - 1
  print(f"{'lost to scheduling':<22} {100 * result['loss']:7.1f} %")
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
