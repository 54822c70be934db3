"""A training step on a CPU with arrays in huge pages, as commands have them, and in small ones.

  python -m tests.benchmarks.huge_pages --output=huge_pages.json

ICA of configs/study_simulated.py, on some of its users. Both take turns, each a run of its own;
told are the medians of their steps' seconds, and the median of the pairs' ratios. Some minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from alignx_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PAGES = {"huge": "glibc.malloc.hugetlb=1", "small": "glibc.malloc.hugetlb=0"}
WARM = 6  # first steps, not counted


def seconds(tunables: str, steps: int) -> float:
  """Of the median step of a run."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, "-m", "tests.benchmarks.huge_pages", f"--steps={steps}"]
    env = os.environ | {"GLIBC_TUNABLES": tunables}
    subprocess.run([*command, f"--workdir={folder}"], cwd=ROOT, env=env, check=True)
    lines = read_metrics(Path(folder))[WARM:]
  return statistics.median(line["seconds/step"] for line in lines)


def train(workdir: Path, steps: int) -> None:
  """Some steps of the study's ICA."""
  from alignx_jax.experiments import experiment as experiments
  from configs import study_simulated

  config = study_simulated.get_config()
  config.data.update(train_records=2 * steps + 20, validation_records=4, test_records=4)
  config.train.steps = steps
  experiment = experiments.load_experiment(config)
  experiments.run_training(experiment.with_objective("ica", fields=config.study.ica), workdir)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=40)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--output", type=Path)
  parser.add_argument("--workdir", type=Path, help=argparse.SUPPRESS)  # of one run; that is all
  args = parser.parse_args()
  if args.workdir:
    train(args.workdir, args.steps)
    return
  found = {name: [] for name in PAGES}
  for _ in range(args.rounds):
    for name, tunables in PAGES.items():
      found[name].append(seconds(tunables, args.steps))
  ratios = [huge / small for huge, small in zip(*found.values(), strict=True)]
  result = {name: statistics.median(each) for name, each in found.items()}
  result["ratio"] = statistics.median(ratios)
  print(f"{'pages':<8}{'seconds a step':>16}")
  for name in PAGES:
    print(f"{name:<8}{result[name]:>16.3f}")
  print(f"ratio   {result['ratio']:>16.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
