"""Asynchronous successive halving (ASHA; Li et al. 2020): who goes on at which step."""

import json
import math
from pathlib import Path


class Halving:
  """Compares trials at the rungs `first`, `first`·η, `first`·η², … steps; of what it is told it
  keeps a file, so that a resumed sweep compares with the same.

  Nobody waits for others: a trial goes on if it is among the best 1/η of those that have come to
  its rung so far.
  """

  def __init__(self, path: str | Path, *, eta: int, first: int):
    self._path, self._eta, self._first = Path(path), eta, first
    self._accuracy = {}  # (step, trial) -> accuracy
    if self._path.exists():
      for line in self._path.read_text(encoding="utf-8").splitlines():
        try:
          step, trial, accuracy = json.loads(line)
        except ValueError:  # cut short by a kill
          continue
        self._accuracy[step, trial] = accuracy

  def goes_on(self, trial: str, step: int, accuracy: float) -> bool:
    """Whether a trial of this accuracy after so many steps is worth more of them."""
    if not self._is_rung(step):
      return True
    self._accuracy[step, trial] = accuracy
    with self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps([step, trial, accuracy]) + "\n")
    here = [value for (rung, _), value in self._accuracy.items() if rung == step]
    better = sum(value > accuracy for value in here)
    return better < math.ceil(len(here) / self._eta)

  def _is_rung(self, step: int) -> bool:
    rung = self._first
    while rung < step:
      rung *= self._eta
    return rung == step
