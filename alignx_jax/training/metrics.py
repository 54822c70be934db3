"""Metrics as (numerator, denominator) pairs, and where they are written."""

import json
import time
from pathlib import Path

import numpy as np
from absl import logging
from tensorboardX import SummaryWriter

from alignx_jax.files import as_path, write_text


def divide(metrics: dict) -> dict[str, float]:
  """Pairs summed over devices and steps to their means; 0 / 0 is NaN."""
  with np.errstate(invalid="ignore", divide="ignore"):
    return {name: float(np.divide(a, b)) for name, (a, b) in metrics.items()}


class MetricWriter:
  """Writes each step's metrics to `metrics.jsonl`, where null is not finite, and to TensorBoard.

  A resumed run first drops the lines of the steps that it will do again.
  """

  def __init__(self, workdir: Path, first_step: int = 0):
    path = workdir / "metrics.jsonl"
    kept = [_to_json(line) for line in read_metrics(workdir) if line["step"] < first_step]
    write_text(path, "".join(kept))
    self._file = path.open("a", encoding="utf-8")
    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    self._file.write(_to_json({"step": step, "time": time.time(), **metrics}))
    self._file.flush()
    for name, value in metrics.items():
      if not np.isnan(value):  # the mean of nothing is no point
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    self._board.close()


def _to_json(line: dict) -> str:
  """JSON has no NaN and no infinity."""
  return json.dumps({k: v if np.isfinite(v) else None for k, v in line.items()}) + "\n"


def read_metrics(workdir: Path) -> list[dict]:
  """The lines written so far, NaN for null; those that are damaged are left out, with a warning.

  A last line cut short by a kill is none.
  """
  path = as_path(workdir) / "metrics.jsonl"
  lines, damaged = [], 0
  if path.exists():
    for line in path.read_bytes().splitlines(keepends=True):
      try:
        values = {k: np.nan if v is None else v for k, v in json.loads(line).items()}
        np.isfinite(list(values.values()))  # numbers, all of them
        lines.append(values | {"step": int(values["step"])})
      except (ValueError, TypeError, AttributeError, KeyError):
        damaged += line.endswith(b"\n")
  if damaged:
    logging.warning("%s: %d lines are damaged and left out.", path, damaged)
  return lines
