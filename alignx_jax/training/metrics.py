"""Metrics as (numerator, denominator) pairs, and where they are written."""

import json
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter


def divide(metrics: dict) -> dict[str, float]:
  """Pairs summed over devices and steps to their means; 0 / 0 is NaN."""
  with np.errstate(invalid="ignore", divide="ignore"):
    return {name: float(np.divide(a, b)) for name, (a, b) in metrics.items()}


class MetricWriter:
  """Writes each step's metrics to `metrics.jsonl`, where null is not finite, and to TensorBoard.

  A resumed run first drops the lines of the steps that it will do again.
  """

  def __init__(self, workdir: Path, first_step: int = 0):
    self._path = workdir / "metrics.jsonl"
    kept = [line for line in read_metrics(workdir) if line["step"] < first_step]
    self._file = self._path.open("w", encoding="utf-8")
    for line in kept:
      self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    finite = {name: value for name, value in metrics.items() if np.isfinite(value)}
    line = {"step": step, "time": time.time(), **dict.fromkeys(metrics), **finite}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in finite.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    self._board.close()


def read_metrics(workdir: Path) -> list[dict]:
  """The lines written so far; a last line cut short by a kill is left out."""
  path = Path(workdir) / "metrics.jsonl"
  lines = []
  if path.exists():
    for line in path.read_text(encoding="utf-8").splitlines():
      try:
        lines.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return lines
