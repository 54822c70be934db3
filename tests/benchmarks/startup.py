"""Seconds from a command to the end of its first training step, at the first and the second start.

  python -m tests.benchmarks.startup --output=startup.json

ICA of configs/study_simulated.py, each start a process of its own. The first finds no compiled
programs and no reference log-probs; the second those that the first left, as a command's second
start does: programs in the user's cache directory, log-probs in the workdir. Told are

  imports     from the interpreter's start until JAX has its devices
  data        simulated users, their split, the tokenizer, and what the model is
  weights     read and placed, once the workdir is held and the data known
  reference   log-probs of all training examples; at the second start, read
  between     the optimiser's state, and the first batch packed
  trace       the step as Python says it, to a program
  compile     that program, or it is read
  first step  run

The second start should take at most 12 s. --records=100 makes it a minute's work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PHASES = ("imports", "data", "weights", "reference", "between", "trace", "compile", "first step")
TARGET = 12.0  # seconds of the second start


class Stepped(Exception):
  """The first step is done; the rest of the run is not needed."""


def start(workdir: str, began: float, records: int) -> dict[str, float]:
  """Trains for one step as alignx_jax.train does; seconds of each phase.

  Args:
    began: when this process was started, as time.time().
  """
  from alignx_jax import command_line

  command_line._keep_programs()
  import jax

  from alignx_jax.experiments import experiment as experiments
  from alignx_jax.training import loop
  from configs import study_simulated

  seconds, last = {}, began

  def mark(phase):
    nonlocal last
    now = time.time()
    seconds[phase], last = now - last, now

  def timed_reference(*args, cached_reference=loop.cached_reference):
    found = cached_reference(*args)
    mark("reference")
    return found

  def timed_steps(*args, make_steps=loop.make_steps):
    programs = make_steps(*args)

    def train(*arguments):
      jax.block_until_ready(arguments)
      mark("between")
      lowered = programs.train.lower(*arguments)
      mark("trace")
      compiled = lowered.compile()
      mark("compile")
      jax.block_until_ready(compiled(*arguments))
      mark("first step")
      raise Stepped

    return programs._replace(train=train)

  jax.devices()
  mark("imports")
  config = study_simulated.get_config()
  if records:
    config.data.train_records = records
  experiment = experiments.load_experiment(config)
  experiment = experiment.with_objective("ica", fields=config.study.ica)
  loader = experiments.training_loader(experiment)
  mark("data")

  def load():
    params = jax.block_until_ready(experiment.load_base())
    mark("weights")
    return params

  loop.cached_reference, loop.make_steps = timed_reference, timed_steps
  model, mesh = experiment.model, experiment.mesh
  try:
    loop.train(experiment.config, workdir, model=model, load=load, mesh=mesh, loader=loader)
  except Stepped:
    return seconds


def in_a_process(folder: Path, records: int) -> dict[str, float]:
  """A start of which the folder holds what is left for the next."""
  env = os.environ | {
    "XDG_CACHE_HOME": str(folder / "cache"),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as a command starts itself anew with
    "JAX_COMPILATION_CACHE_DIR": "",
  }
  command = [sys.executable, "-m", "tests.benchmarks.startup", f"--records={records}"]
  command += [f"--workdir={folder / 'run'}", f"--began={time.time()}"]
  done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--records", type=int, default=0, help="training users; 0: the config's")
  parser.add_argument("--rounds", type=int, default=1)
  parser.add_argument("--output", type=Path)
  parser.add_argument("--workdir", help=argparse.SUPPRESS)  # of a start; then that is all
  parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.workdir:
    print(json.dumps(start(args.workdir, args.began, args.records)))
    return
  starts = {"first": [], "second": []}
  for _ in range(args.rounds):
    with tempfile.TemporaryDirectory() as folder:
      for found in starts.values():
        found.append(in_a_process(Path(folder), args.records))
  result = {
    name: {phase: statistics.median(one[phase] for one in found) for phase in PHASES}
    | {"all": statistics.median(sum(one.values()) for one in found)}
    for name, found in starts.items()
  }
  print(f"{'seconds':<12}{'first start':>12}{'second':>12}")
  for phase in (*PHASES, "all"):
    target = f"  (at most {TARGET:.0f})" if phase == "all" else ""
    print(f"{phase:<12}{result['first'][phase]:>12.1f}{result['second'][phase]:>12.1f}{target}")
  if args.output:
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
